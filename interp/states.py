"""What the states of a recurrence hold, for any model with ``hook_state``: recording, positions, ranks, norms, reach.

States are read chunk by chunk of prompts, so that memory never holds the states of all prompts, layers and positions
at once. A complex state is a real one with twice the last axis (real parts, then imaginary parts); norms, ranks and
principal components of the two are the same thing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import hooks
from hooks import Record
from hooks.errors import BadArgument
from hooks.inputs import fed, first_weight
from interp import seeds
from interp.arguments import listed, whole_number
from interp.lens import joint, query_tokens
from interp.similarity import effective_rank
from interp.tasks.base import Batch

BUDGET = 2**25
"""Numbers of recorded sites that one chunk of prompts may hold (128 MB in fp32)."""


def missing(model: Any, kinds: Sequence[str]) -> list[str]:
    """Which of these kinds of site (``hook_state`` …) the model does not have."""
    have = {name.rsplit(".", 1)[-1] for name in model.hook_dict}
    return [kind for kind in listed("kinds", kinds) if kind not in have]


def need(model: Any, kinds: Sequence[str], what: str, name: str = "the model") -> None:
    """Nothing, or a :class:`BadArgument` that names the sites that ``what`` would read and ``model`` does not have."""
    lacking = missing(model, kinds)
    if lacking:
        raise BadArgument(
            f"{name} has no {' and no '.join(lacking)}: {what} needs a recurrence with "
            f"{', '.join(listed('kinds', kinds))}; hooks.sites(model) lists what there is"
        )


def walk(
    model: Any, tokens: Tensor, kinds: Sequence[str] = ("hook_state",), budget: int = BUDGET
) -> Iterator[tuple[slice, list[list[Tensor]]]]:
    """Chunks of prompts, each with its sites: ``for part, layers in walk(…)``, ``layers[i]`` in the order of ``kinds``.

    ``budget``: numbers that a chunk's sites may hold. Layers without the first kind are left out.
    """
    kinds = listed("kinds", kinds)
    sites = [[n.rsplit(".", 1)[0] + f".{kind}" for kind in kinds] for n in hooks.resolve(model, f"*.{kinds[0]}")]
    names = [name for layer in sites for name in layer]
    tokens = fed(model, tokens)
    one = hooks.record(model, tokens[:1], names)
    size = max(1, budget // sum(value.numel() for value in one.values()))
    for start in range(0, len(tokens), size):
        part = slice(start, min(start + size, len(tokens)))
        record = hooks.record(model, tokens[part], names)
        yield part, [[record[name] for name in layer] for layer in sites]


def query(batch: Batch, k: int) -> int:
    """The position of example k's query among a prompt's tokens (joint tokens: of pair k)."""
    return int(batch.read[k]) if len(batch.read) > 1 else k


def stride(batch: Batch) -> int:
    """Tokens for each example: 2 where x and y are tokens of their own."""
    return int(batch.read[1] - batch.read[0]) if len(batch.read) > 1 else 1


def at(model: Any, tokens: Tensor, positions: Sequence[int]) -> list[Float[Tensor, "batch chosen d_inner n"]]:
    """Each layer's states at these positions only."""
    parts = [[layer[0][:, list(positions)].cpu() for layer in layers] for _, layers in walk(model, tokens)]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def alone(batch: Batch) -> Float[Tensor, "batch 1 d_token"]:
    """Example 0's query as a prompt of its own, k = 0: no example before it, and where a token holds x and y no label.

    There is no state before this token (it is zero), so what a model holds after 0 examples is read at it.
    """
    return query_tokens(batch)[:, :1] if joint(batch) else batch.tokens[:, :1]


def norms(model: Any, tokens: Tensor) -> Float[Tensor, "layer batch pos"]:
    """‖h_t‖_F of every layer, prompt and position."""
    parts = [torch.stack([h.flatten(2).norm(dim=-1) for (h,) in layers]) for _, layers in walk(model, tokens)]
    return torch.cat(parts, dim=1).cpu()


def rank_across(rows: Float[Tensor, "batch width"]) -> float:
    """Effective rank of vec(h_t) across prompts, its mean over prompts taken off.

    At most batch − 1, so compare it between models at the same number of prompts only.
    """
    return float(effective_rank(rows - rows.mean(0)))


def reach(
    model: Any, tokens: Tensor, position: int, probes: int = 1, seed: int = 0
) -> Float[Tensor, "layer batch pos"]:
    """An unbiased estimate of ‖∂h_t/∂x_s‖_F² at t = ``position``, for every layer, prompt and source token s.

    The total derivative: through the layer's own scan, its decays and writes, the convolution's taps, and all layers
    below. ‖vᵀJ‖² with v ~ N(0, I) on the state has mean ‖J‖_F²; one backward gives it for all s. Its relative standard
    deviation for one prompt is sqrt(2 / (probes · r)), r the participation ratio of J (at most d_token); an interval
    over prompts holds this error too, so that more prompts are better than more probes. In units of the token, so that
    models can be compared. Tokens after ``position`` have exactly 0. ``tokens`` (batch, pos, d_token); raises
    :class:`BadArgument` for integers.
    """
    whole_number("probes", probes, least=1)
    if not tokens.is_floating_point():
        raise BadArgument("the derivative of a state by its tokens needs tokens that are real vectors, not integers")
    found = []
    for start, part in _chunks(model, tokens):
        leaf = fed(model, part).detach().requires_grad_()
        record = _graph(model, leaf)
        layers = []
        for i, state in enumerate(record.values()):
            wide = torch.promote_types(leaf.dtype, torch.float32)
            h, total = state[:, position], torch.zeros(leaf.shape[:2], dtype=wide, device="cpu")
            for probe in range(probes):
                v = seeds.normal(h.shape, seeds.generator("reach", seed, i, probe, start)).to(h)
                (gradient,) = torch.autograd.grad((h * v).sum(), leaf, retain_graph=True)
                total += gradient.to(wide).square().sum(-1).cpu() / probes
            layers.append(total)
        found.append(torch.stack(layers))
    return torch.cat(found, dim=1)


def reach_gap(
    model: Any, tokens: Float[Tensor, "batch pos d_token"], position: int, step: float = 1e-2, seed: int = 0
) -> float:
    """How far the backward pass behind :func:`reach` is from central differences: ‖difference − slope‖ / ‖slope‖.

    One random direction u of all tokens and one random v_l of each layer's state; both norms are over the layers, so
    that no sum of slopes cancels. The differences' own error is of the order step² + rounding / step, which
    in half precision is no small number: then a copy of the model in fp32 is asked.
    """
    weight = first_weight(model)
    if weight is not None and weight.dtype.itemsize < 4:
        model = copy.deepcopy(model).to(torch.float32)
    leaf = fed(model, tokens).detach().requires_grad_()
    u = seeds.normal(tokens.shape, seeds.generator("reach", seed, 0)).to(leaf)
    record = _graph(model, leaf)
    vs = [
        seeds.normal(h[:, position].shape, seeds.generator("reach", seed, 1, i)).to(h)
        for i, h in enumerate(record.values())
    ]
    slopes = []
    for h, v in zip(record.values(), vs, strict=True):
        (gradient,) = torch.autograd.grad((h[:, position] * v).sum(), leaf, retain_graph=True)
        slopes.append((gradient.double() * u.double()).sum())
    ends = []
    for sign in (1, -1):
        moved = hooks.record(model, leaf.detach() + sign * step * u, "*.hook_state")
        ends.append([h[:, position].double() for h in moved.values()])
    differences = [((up - down) * v.double()).sum() / (2 * step) for up, down, v in zip(*ends, vs, strict=True)]
    slope, difference = torch.stack(slopes), torch.stack(differences)
    return float((difference - slope).norm() / slope.norm().clamp(min=1e-300))


def _graph(model: Any, leaf: Tensor) -> Record:
    """Every layer's states with their graph down to the tokens, and none to the weights: half of the backward pass."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        return hooks.record(model, leaf, "*.hook_state", grad=True)
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _chunks(model: Any, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Parts whose graph (about eight tensors for each state) stays within the budget."""
    one = hooks.record(model, fed(model, tokens[:1]), "*.hook_state")
    size = max(1, BUDGET // (8 * sum(value.numel() for value in one.values())))
    for start in range(0, len(tokens), size):
        yield start, tokens[start : start + size]
