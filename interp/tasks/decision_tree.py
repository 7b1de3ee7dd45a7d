"""Decision trees in context, another for each prompt. One prompt, d = 2, depth = 2:

                 x[1] > 0 ?                     nodes and leaves are numbered from the top, left to right;
               no /     \\ yes                   each node asks about one coordinate, each leaf has a value
           x[0] > 0 ?   x[1] > 0 ?              the right half asks again what is known: its left leaf is never reached
            /     \\      /     \\
         -0.3     1.2   0.8    -2.0                                             drawn, never shown

    tokens   (2.0, 1.0)  (-2.0, 0)  (1.0, -1.0)  (1.2, 0)  (-2.0, -0.5)
    kind      x_0         y_0        x_1          y_1       x_2                 the model should say y_2 = -0.3

Source: arXiv 2208.01066 §4 and 2402.03170 §3. The released code can fix a tree by a seed, on a path that does not run;
here every tree comes from the generator that draws the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import seeds
from interp.arguments import whole_number
from interp.tasks.base import Batch
from interp.tasks.layout import Layout
from interp.tasks.regression import Regression, classical, pairs_or


@dataclass(frozen=True)
class DecisionTree:
    """f(x): the value of the leaf that x falls into; at a node x goes right if its coordinate is above 0.

    ``truth``: coordinate (batch, 2^depth - 1), uniform on 0 … d - 1 at each node; leaf (batch, 2^depth) ~ N(0, 1).
    The children of node i are 2 i + 1 (left) and 2 i + 2.
    """

    d: int
    depth: int

    @property
    def scale(self) -> float:
        """E[f(x)²] = 1: the value of any leaf."""
        return 1.0

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A tree for each prompt over all d coordinates. A node that asks about one that is zero sends all x left: with
        fewer active coordinates the tree is smaller, as in the papers' curriculum.
        """
        return {
            "coordinate": seeds.integers(0, self.d, (n, 2**self.depth - 1), generator),
            "leaf": seeds.normal((n, 2**self.depth), generator),
        }

    def __call__(
        self, x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch n_pairs"]:
        """The value of the leaf of each x."""
        return truth["leaf"].gather(1, self.leaf_of(x, truth))

    def leaf_of(self, x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]) -> Int[Tensor, "batch n_pairs"]:
        """The number of the leaf of each x, from the left."""
        node = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        for _ in range(self.depth):
            asked = truth["coordinate"].gather(1, node)
            right = x.gather(2, asked[..., None])[..., 0] > 0
            node = 2 * node + 1 + right.long()
        return node - (2**self.depth - 1)

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """root (batch,): the coordinate of the first node; leaf (batch, n_pairs): the one that example k falls into."""
        return {"root": batch.truth["coordinate"][:, 0], "leaf": self.leaf_of(batch.x, batch.truth)}

    def rivals(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """The classical estimators, and mean_in_leaf: told the nodes but not the values, it predicts the mean label of
        the earlier examples in the leaf of x_k, 0 if there are none.
        """
        leaf = self.leaf_of(batch.x, batch.truth)
        same = (leaf[:, :, None] == leaf[:, None, :]).tril(-1).to(batch.y)
        mean = (same * batch.y[:, None, :]).sum(dim=2) / same.sum(dim=2).clamp(min=1)
        return {**classical(batch), "mean_in_leaf": mean}


def decision_tree(
    d: int = 5,
    n_pairs: int | None = None,
    tokens: str = "interleaved",
    depth: int = 4,
) -> Regression:
    """Prompts of decision trees, x ~ N(0, I).

    depth    number of questions on the way to a leaf
    n_pairs  5 d + 1 unless given, as in the papers (101 for d = 20)
    tokens   "interleaved" or "joint" (``Layout``)
    """
    layout = Layout(tokens, d)
    whole_number("depth", depth, 1, 16)
    return Regression(
        name="decision_tree",
        functions=DecisionTree(d, depth),
        layout=layout,
        n_pairs=pairs_or(n_pairs, 5 * d + 1),
        options={"depth": depth},
    )
