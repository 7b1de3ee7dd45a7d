"""One model on single-index prompts: its error, what can be read of β from its states, its label transforms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import hooks
from analyses.feature_learning.transform import Transform, Unpaired, even, features, transform, unpaired, writes
from analyses.feature_learning.variants import ablated
from hooks.brief import brief
from hooks.inputs import fed
from interp import evaluate, probe, seeds, states
from interp.arguments import listed
from interp.tasks.base import Batch

NEEDED = ("hook_state", "hook_delta", "hook_delta_write", "hook_B", "hook_x", "hook_gate_pre")
WRITE, HELD, STEP = "write", "write, Δ at its mean", "Δ"
LINEAR, BENT = "Σ y φ(x)", "Σ (y, y², tanh y) φ(x)"
"""The running sums: the label as it is, and the simplest transforms of it."""
FORKED = 32
"""Prompts whose states at every position are held at a time."""


@dataclass(frozen=True)
class Plan:
    """What every model is asked: the same prompts for all.

    batch    prompts whose error counts; ``probed`` others for the probes, ``split`` in two; ``some`` for the writes
    ks       numbers of examples after which states are read
    order    1, or 2 where the link is even and β can be found up to its sign only
    at       examples before an unpaired token
    means    prompts whose mean takes Δ's place
    """

    task: Any
    batch: Batch
    probed: Batch
    split: probe.Split
    some: Batch
    asked: Unpaired
    means: Batch
    ks: tuple[int, ...]
    order: int
    at: int
    components: int
    seed: int

    @property
    def target(self) -> str:
        """What of β can be found: β itself, or ββᵀ, which does not change with its sign."""
        return "β" if self.order == 1 else "ββᵀ"

    @property
    def truth(self) -> Float[Tensor, "batch output"]:
        """The target, in coordinates of the subspace; of ββᵀ the entries less their mean, each once."""
        inside = self.probed.truth["coordinates"].double()
        return inside if self.order == 1 else features(inside * inside.shape[-1] ** 0.5, 2)


def plan(task: Any, prompts: int, components: int, seed: int) -> Plan:
    """``prompts`` for the errors, twice as many for the probes, a quarter for the writes (an even number)."""
    last, n = task.n_pairs - 1, max(16, prompts // 4)
    ks = {k for k in (max(1, task.d // 2), task.d, 2 * task.d, 4 * task.d, last) if 1 <= k <= last}
    return Plan(
        task=task,
        batch=evaluate.prompts(task, prompts, seed),
        probed=evaluate.prompts(task, 2 * prompts, seed, "probe"),
        split=probe.split(2 * prompts, seed=seed),
        some=evaluate.prompts(task, n, seed, "ablate"),
        asked=unpaired(task, n, seeds.generator("unpaired", seed)),
        means=evaluate.prompts(task, 64, seed, "reference"),
        ks=tuple(sorted(ks)),
        order=2 if even(task) else 1,
        at=(last + 1) // 2,
        components=min(components, (2 * prompts * 3) // 8),
        seed=seed,
    )


@dataclass(frozen=True)
class Subject:
    """A model and how it is run. ``how``: trained, untrained, ablated or retrained; ``variant``: what is changed."""

    name: str
    how: str
    model: Any
    variant: str | None = None
    means: Any = None

    def edited(self) -> AbstractContextManager[None]:
        """The model as this subject runs it."""
        return ablated(self.model, self.variant if self.how == "ablated" else None, self.means)


@dataclass(frozen=True)
class Found:
    """What was found of one subject.

    error       of each prompt and number of examples
    reading     (layer, k) → probe of the target from the state
    transforms  (what, layer) → label transform; a what that does not move with the token is left out
    """

    subject: Subject
    error: Float[Tensor, "batch n_pairs"]
    reading: dict[tuple[int, int], probe.Probe]
    transforms: dict[tuple[str, int], Transform]

    __repr__ = brief

    def best(self, k: int) -> int:
        """The layer from which most is read, judged by the prompts that fit the probes."""
        folds = {layer: one.folds for (layer, at), one in self.reading.items() if at == k}
        return max(folds, key=lambda layer: folds[layer])


def study(subject: Subject, asked: Plan, ks: Sequence[int], whats: Sequence[str], shuffles: int = 5) -> Found:
    """Everything in :class:`Found`, states read after ``ks`` examples.

    Raises :class:`BadArgument` naming the sites that are missing for a model without the step, B and C of a Mamba.
    """
    states.need(subject.model, NEEDED, "the label transform", subject.name)
    with subject.edited():
        error = errors(subject.model, asked.task, asked.batch)
        held = _held(subject.model, asked, ks)
        layers = writes(subject.model, asked.some, asked.asked, asked.at)
    reading = {
        (layer, k): _probe(values[:, i].flatten(1), asked, shuffles)
        for layer, values in enumerate(held)
        for i, k in enumerate(ks)
    }
    transforms = {}
    for layer, one in enumerate(layers):
        for what in listed("whats", whats):
            values = one.step if what == STEP else one.write(held=what == HELD)
            order = 0 if what == STEP else asked.order
            made = transform(values, asked.asked, order, asked.order, seed=asked.seed)
            if made is not None:
                transforms[what, layer] = made
    return Found(subject, error, reading, transforms)


def errors(model: Any, task: Any, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
    """``evaluate.errors`` of these prompts, of joint tokens with every query of a prompt in one forward.

    The context is run once; the state that it has reached before each query is put together from its sites, h from
    ``hook_state`` and the taps from ``hook_x_in``, with whatever edits are on. Walking from query to query
    takes ten times as long.
    """
    if task.layout.tokens != "joint":
        return evaluate.errors(model, task, batch=batch)
    parts = []
    for start in range(0, len(batch), FORKED):
        tokens = fed(model, batch.tokens[start : start + FORKED])
        state = _reached(model, tokens[:, :-1]) if tokens.shape[1] > 1 else None
        queries = torch.cat([tokens[..., :-1], torch.zeros_like(tokens[..., :1])], dim=-1).flatten(0, 1)[:, None]
        with torch.no_grad():
            out = model(queries, state=state)
        parts.append(out[:, 0, 0].unflatten(0, tokens.shape[:2]).cpu())
    return task.error(torch.cat(parts), batch)


def _reached(model: Any, tokens: Float[Tensor, "batch pos d_token"]) -> list[Any]:
    """Each layer's state before positions 0, 1, … pos of every prompt, one row each."""
    found = hooks.record(model, tokens, ["*.hook_state", "*.hook_x_in"], return_state=True)
    held = zip(found.output[1], found.stack("*.hook_state"), found.stack("*.hook_x_in"), strict=True)
    states = []
    for after, h, x_in in held:
        taps, pos = after.conv.shape[-1], x_in.shape[1]
        h = torch.cat([torch.zeros_like(h[:, :1]), h], dim=1)
        padded = torch.cat([x_in.new_zeros(len(x_in), taps, x_in.shape[-1]), x_in], dim=1)
        conv = (
            padded.unfold(1, taps, 1)[:, : pos + 1] if taps else x_in.new_zeros(len(x_in), pos + 1, x_in.shape[-1], 0)
        )
        states.append(after._replace(conv=conv.flatten(0, 1), h=h.flatten(0, 1)))
    return states


def running_sums(asked: Plan) -> dict[tuple[str, int], probe.Probe]:
    """(features, k) → probe of what adding up the prompt gives, of the label as it is and of simple transforms of it.

    φ(x) is x, and where the link is even the products of two coordinates of x.
    """
    x, y = asked.probed.x.double(), asked.probed.y.double() / asked.task.functions.scale**0.5
    phi = features(x, asked.order)
    found: dict[tuple[str, int], probe.Probe] = {}
    for name, parts in {LINEAR: [y], BENT: [y, y.square(), torch.tanh(y)]}.items():
        sums = torch.cat([(part[..., None] * phi).cumsum(1) for part in parts], dim=-1)
        found |= {(name, k): _probe(sums[:, k - 1], asked, shuffles=1) for k in asked.ks}
    return found


def _probe(values: Float[Tensor, "batch feature"], asked: Plan, shuffles: int) -> probe.Probe:
    """The probe of the target; of untrained weights the caller makes a probe of its own."""
    made = probe.ridge(
        values,
        {asked.target: asked.truth},
        untrained=None,
        running_sum=None,
        split=asked.split,
        components=asked.components,
        shuffles=shuffles,
        seed=asked.seed,
    )
    return made[asked.target]


def mean_steps(model: Any, asked: Plan) -> hooks.Record:
    """Δ on the prompts whose mean takes its place."""
    return hooks.record(model, fed(model, asked.means.tokens), "*.hook_delta")


def _held(model: Any, asked: Plan, ks: Sequence[int]) -> list[Float[Tensor, "batch k d_inner n"]]:
    stride = states.stride(asked.probed) if len(asked.probed.read) > 1 else 1
    tokens = asked.probed.tokens[:, : stride * max(ks)]
    return states.at(model, tokens, [stride * k - 1 for k in ks])
