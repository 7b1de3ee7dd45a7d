"""Prompts with outliers beside the prompts that they would be with fewer or more: what an outlier is compared with.

A task with outliers (``truth["outlier"]``; their share is its option ``alpha`` or ``p``) draws the same clean examples
from the same generator whatever the share is. So every example is there twice: as it is clean (share 0) and as it is
contaminated (share 1), at the same place and among the same others. An outlier's *twin* is its clean form. Where the
task has ``truth["clean"]``, the input alone is contaminated, and twins keep the label that the example has in the
prompt; elsewhere the whole example is replaced.

    cleaned        chosen outliers replaced by their twins
    contaminated   chosen clean examples replaced by their contaminated form
    without        the chosen examples left out, the prompt shorter by as many
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.errors import BadArgument
from interp import evaluate, seeds, tasks
from interp.tasks.base import Batch, Task

Examples = Bool[Tensor, "batch n_pairs"]
Tokens = Bool[Tensor, "batch pos"]
SHARES = ("alpha", "p")


@dataclass(frozen=True)
class Prompts:
    """Prompts under one share of outliers, and the same ones with none and with all context examples contaminated."""

    task: Task
    batch: Batch
    clean: Batch
    full: Batch

    @property
    def outlier(self) -> Examples:
        """Which examples are contaminated; never the query."""
        return self.batch.truth["outlier"]

    @property
    def context(self) -> Examples:
        """Every example but the query."""
        found = torch.ones_like(self.outlier)
        found[:, -1] = False
        return found

    @property
    def groups(self) -> dict[str, Examples]:
        """The context examples by kind: outlier or clean, with the query's pattern or the other one where there are
        patterns.
        """
        kinds = {"outlier": self.outlier, "clean": self.context & ~self.outlier}
        if "same" not in self.batch.truth:
            return kinds
        same = self.batch.truth["same"]
        return {f"{kind}, {name}": mask & at for kind, mask in kinds.items() for name, at in _patterns(same)}

    def votes(self, clean: bool = False) -> Float[Tensor, "batch n_pairs"]:
        """The sign that each example would give to the prediction if it counted: a contribution times it is positive
        where it pushes towards the example's own label.

        The label that it carries where the labels are classes; else the sign of y x·x_query, which one step of gradient
        descent adds. ``clean`` asks for that of the clean examples in the prompts' place.
        """
        if "same" in self.batch.truth:
            return self.batch.y
        batch = self.clean if clean else self.batch
        return torch.sign(batch.y * (batch.x * batch.x[:, -1:]).sum(-1))

    def cleaned(self, examples: Examples) -> Batch:
        """The prompts with these examples clean."""
        return self._with(self.clean, examples)

    def contaminated(self, examples: Examples) -> Batch:
        """The prompts with these examples contaminated."""
        return self._with(self.full, examples)

    def without(self, examples: Examples) -> Batch:
        """The prompts without these examples; only the last one is then read.

        Where prompts lose different numbers of them, the shorter ones are filled up with zeros after their query, and
        ``read`` says where each query is: no causal model sees there what comes later.

        Raises :class:`BadArgument` where a query is left out.
        """
        kept = ~examples.to(self.outlier.device)
        if not bool(kept[:, -1].all()):
            raise BadArgument("the query of a prompt is never left out")
        at = tokens_of(self.batch, kept)
        count = at.sum(1, keepdim=True)
        order = (~at).long().argsort(dim=1, stable=True)[:, : int(count.max())]
        tokens = self.batch.tokens.gather(1, order[..., None].expand(-1, -1, self.batch.tokens.shape[-1]))
        tokens[torch.arange(order.shape[1], device=order.device) >= count] = 0
        return dataclasses.replace(self.batch.last(), tokens=tokens, read=count - 1, kinds=self.batch.kinds[order])

    def _with(self, other: Batch, examples: Examples) -> Batch:
        at = tokens_of(self.batch, examples)[..., None]
        source = other.tokens
        if "clean" in self.batch.truth:  # only the input is contaminated, the label stays
            source = torch.cat([source[..., :-1], self.batch.tokens[..., -1:]], dim=-1)
        return dataclasses.replace(self.batch, tokens=torch.where(at, source, self.batch.tokens))


def share_of(task: Task) -> str:
    """The option that says how large the share of outliers is; raises :class:`BadArgument` for a task without."""
    for name in SHARES:
        if name in task.config:
            return name
    raise BadArgument(f'the task "{task.name}" has no share of outliers ({" or ".join(SHARES)})')


def draw(task: Task, n: int, seed: int, purpose: str, alpha: float, **changes: Any) -> Prompts:
    """``n`` prompts of ``task`` with this share of outliers and these options (``rule`` …), and their twins.

    Raises :class:`BadArgument` for a task without outliers, and where the twins are not of the same prompts.
    """
    name, config = share_of(task), {**task.config, **changes}
    own, *twins = (tasks.build(task.name, **{**config, name: share}) for share in (alpha, 0.0, 1.0))
    batch, clean, full = (evaluate.prompts(one, n, seed, purpose) for one in (own, *twins))
    outlier = tokens_of(batch, batch.truth["outlier"])[..., None]
    inputs = slice(None, -1) if "clean" in batch.truth else slice(None)
    if not torch.equal(batch.tokens[..., inputs], torch.where(outlier, full.tokens, clean.tokens)[..., inputs]):
        raise BadArgument(f'the task "{task.name}" draws other examples with another {name}: there are no twins')
    return Prompts(own, batch, clean, full)


def tokens_of(batch: Batch, examples: Examples) -> Tokens:
    """The positions of ``batch.tokens`` that show these examples: one each, or two where y is a token of its own."""
    each = tokens_each(batch, examples.shape[1])
    return examples.to(batch.tokens.device).repeat_interleave(each, dim=1)[:, : batch.tokens.shape[1]]


def tokens_each(batch: Batch, n_pairs: int) -> int:
    """1 where an example is one token, 2 where y is a token of its own, which the last example does not have."""
    length = batch.tokens.shape[1]
    if length not in (n_pairs, 2 * n_pairs - 1):
        raise BadArgument(f"{n_pairs} examples in {length} tokens: neither one token each nor two")
    return 1 if length == n_pairs else 2


def by_example(values: Float[Tensor, "batch pos"], n_pairs: int) -> Float[Tensor, "batch n_pairs each"]:
    """``values`` of tokens, those of one example side by side; 0 for the label that the last example lacks."""
    each = 1 if values.shape[1] == n_pairs else 2
    padded = torch.cat([values, values.new_zeros(len(values), each * n_pairs - values.shape[1])], dim=1)
    return padded.reshape(len(values), n_pairs, each)


def as_many(pool: Examples, like: Examples, generator: torch.Generator) -> Examples:
    """In each prompt as many random examples of ``pool`` as ``like`` has, all of them where there are fewer."""
    lot = seeds.uniform(pool.shape, generator).to(pool.device)
    place = torch.where(pool, lot, 2.0).argsort(dim=1).argsort(dim=1)
    return pool & (place < like.sum(1, keepdim=True))


def shuffled(prompts: Prompts, generator: torch.Generator) -> Examples:
    """The outliers' flags, dealt anew among the context examples of each prompt: as many, and meaning nothing."""
    return as_many(prompts.context, prompts.outlier, generator)


def _patterns(same: Examples) -> list[tuple[str, Examples]]:
    return [("same pattern", same), ("other pattern", ~same)]
