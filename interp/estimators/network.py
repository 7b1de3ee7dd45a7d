"""A two-layer network trained on the k pairs before each example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from interp import seeds
from interp.arguments import whole_number
from interp.estimators.base import Estimator, Pairs, blank, exact, only
from interp.estimators.iterative import positive
from interp.machine.progress import progress
from interp.machine.workers import threads

PROMPTS = 64
"""Networks trained side by side: their activations stay in the cache."""


def mlp(
    hidden: int = 100,
    rate: float = 5e-3,
    steps: int = 100,
    seed: int = 0,
    ks: Sequence[int] | None = None,
    workers: int | None = None,
) -> Estimator:
    """v·relu(W x + b) + c, trained from new weights on the k pairs before each example; 0 at k = 0.

    ``steps`` steps of Adam on the mean squared error of all k pairs. The defaults are those of the
    released baseline of arXiv 2208.01066, but not of the curve that was released with its models: on
    that paper's ReLU networks (d = 20, 1280 prompts) this one has an error of 0.32 ± 0.02 after 40
    pairs and 0.171 ± 0.007 after 100, that curve 0.248 and 0.109, which more steps do not reach
    either. arXiv 2402.03170 found 0.165 to 0.182 after 100 with the released code. Weights start
    uniform in ±1 / sqrt(fan in), drawn for each prompt from ``seed`` and the same for every k.

    ks        only these numbers of examples; the other predictions are NaN. All unless given.
    workers   threads, one for each core unless given. Each trains the networks of many prompts side by
              side; the numbers do not depend on how many there are.
    """
    whole_number("hidden", hidden, least=1)
    whole_number("steps", steps, least=1)
    positive("rate", rate)
    if workers is not None:
        whole_number("workers", workers, least=1)

    def predict(pairs: Pairs) -> Float[Tensor, "batch n_pairs"]:
        from sklearn.utils.parallel import Parallel, delayed

        x, y = exact(pairs)
        chosen = only(ks, y.shape[1])
        found = blank(pairs, chosen)
        start = _draw(len(x), x.shape[2], hidden, seed)
        pieces = [(k, slice(first, first + PROMPTS)) for k in chosen if k > 0 for first in range(0, len(x), PROMPTS)]
        work = (
            delayed(_predict)([w[part] for w in start], x[part, : k + 1], y[part, :k], rate, steps)
            for k, part in pieces
        )
        # Matrices this small are slower on two cores than on one.
        with threads(1), progress(len(pieces), "mlp") as done:
            predicted = Parallel(n_jobs=workers or -1, prefer="threads", return_as="generator")(work)
            for (k, part), values in zip(pieces, predicted, strict=True):
                found[part, k] = values
                done()
        return found.to(pairs.y)

    return predict


def _draw(n: int, d: int, hidden: int, seed: int) -> list[Tensor]:
    """W, b, v, c of ``n`` networks."""
    generator = seeds.generator("mlp", seed)
    shapes = (((n, hidden, d), d), ((n, hidden), d), ((n, hidden), hidden), ((n, 1), hidden))
    return [(2 * seeds.uniform(shape, generator, torch.float64) - 1) / fan_in**0.5 for shape, fan_in in shapes]


def _forward(weights: list[Tensor], x: Float[Tensor, "batch k d"]) -> Float[Tensor, "batch k"]:
    w, b, v, c = weights
    active = torch.relu(einsum(x, w, "batch k d, batch hidden d -> batch k hidden") + b[:, None])
    return einsum(active, v, "batch k hidden, batch hidden -> batch k") + c


# Whoever measures a model has gradients off.
@torch.inference_mode(False)
@torch.enable_grad()
def _predict(
    start: list[Tensor], x: Float[Tensor, "batch k_and_1 d"], y: Float[Tensor, "batch k"], rate: float, steps: int
) -> Float[Tensor, " batch"]:
    """What each network says of the last input, once it is trained on the others of its own prompt."""
    weights = [w.clone().requires_grad_() for w in start]
    x, y = x.clone(), y.clone()  # a tensor made in inference mode cannot take part in a gradient, its copy can
    optimizer = torch.optim.Adam(weights, lr=rate)
    for _ in range(steps):
        # Adam takes every weight on its own, so the sum over prompts trains each as if it were alone. No backward():
        # once nnsight is loaded, each parses the source of its caller, which no two threads may do at once.
        loss = (_forward(weights, x[:, :-1]) - y).square().mean(dim=1).sum()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
    return _forward(weights, x[:, -1:])[:, 0].detach()
