"""How a recurrence forgets: what is left of every write, half-lives, and tokens at which a channel is reset.

From the decays and writes that a run used, h_t = ā_t ⊙ h_{t−1} + w_t. *Direct* means through this layer's own decays,
with every decay and write held: the write w_s arrives at t as (∏_{s<u≤t} ā_u) w_s. What the token s does to h_t in all
ways together (also by being written again from a layer below) is :func:`interp.states.reach`.

A *channel* is a row of the state (d_inner of them), a *mode* one of its d_state numbers. A complex mode has one decay,
a complex factor; its modulus forgets and its angle does not.

Where a transition matrix takes the place of the decays (S4: ``hook_transition``), ∏ ā is the product of the matrices,
a channel's modes are the eigenvectors, and |ā| of a mode is the modulus of its eigenvalue. The matrix is not normal:
for some tokens it may keep less, or more, of a state than any mode says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument
from interp import seeds
from interp.arguments import whole_number
from interp.attention.recurrence import FACTORS, refuse_real_factors
from interp.states import missing, need, walk

SITES = ("hook_state", "hook_decay", "hook_write")
TINY = torch.finfo(torch.float32).tiny
FACTORED = ("hook_state", "hook_transition", "hook_write")
"""What takes their place where the transition is a matrix a ⊙ h + u ⟨q, h⟩, given by its factors."""


@dataclass(frozen=True)
class Forgetting:
    """Of every layer and prompt, up to position t.

    written    ‖w_s‖² over the layer's channels and modes
    left       Σ |∏_{s<u≤t} ā_u|² |w_s|², what is left of it at t
    slow       |ā_u| of the channel's slowest mode, the largest
    log_decay  mean of ln |ā_u| over the channel's modes
    lost       −½ ln(Σ_n |ā_u h_{u−1}|² / Σ_n |h_{u−1}|²): the rate at which the channel loses what it holds now, the
               modes weighted by what they contribute; NaN where it holds nothing
    error      largest over layers of ‖Σ_s (∏ ā) w_s − h_t‖ / ‖h_t‖, over all prompts
    """

    written: Float[Tensor, "layer batch pos"]
    left: Float[Tensor, "layer batch pos"]
    slow: Float[Tensor, "layer batch pos d_inner"]
    log_decay: Float[Tensor, "layer batch pos d_inner"]
    lost: Float[Tensor, "layer batch pos d_inner"]
    error: float

    __repr__ = brief


def forgetting(model: Any, tokens: Tensor, position: int) -> Forgetting:
    """The quantities of :class:`Forgetting` for states that start at zero, positions 0 … ``position``.

    Raises :class:`BadArgument`, with the sites that are missing, for a model that has neither decays nor transitions,
    and for transitions with real factors.
    """
    sites = FACTORED if not missing(model, FACTORED) else SITES
    need(model, sites, "what is left of a write")
    for name in model.hook_dict:
        if name.endswith(FACTORS):
            refuse_real_factors(model, name.removesuffix(FACTORS), "forgetting()")
    parts: list[list[tuple[Tensor, ...]]] = []
    gaps: list[list[Tensor]] = []
    for _, layers in walk(model, tokens[:, : position + 1], sites):
        if sites is FACTORED:
            measured = [_factored(*(each.double() for each in layer)) for layer in layers]
        else:
            measured = [_layer(*(as_complex(model, each) for each in layer)) for layer in layers]
        parts.append([one[:-1] for one in measured])
        gaps.append([one[-1] for one in measured])
    written, left, slow, log_decay, lost = (
        torch.cat([torch.stack([layer[i] for layer in part]) for part in parts], dim=1) for i in range(5)
    )
    gap = torch.stack([torch.stack(part) for part in gaps]).sum(0)  # layer, (‖difference‖², ‖h‖²)
    error = float((gap[:, 0] / gap[:, 1].clamp(min=1e-300)).sqrt().max())
    return Forgetting(written, left, slow, log_decay, lost, error)


def half_life(rate: Float[Tensor, "layer batch pos d_inner"]) -> Float[Tensor, "layer d_inner"]:
    """ln 2 / mean rate over prompts and positions after the first (−ln ā, ≥ 0), in tokens; inf where nothing is lost.

    Position 0 decays a state of zeros, and says nothing.
    """
    mean = rate[:, :, 1:].nanmean(dim=(1, 2)).clamp(min=0)
    return math.log(2) / mean


def survival(
    energy: Float[Tensor, "layer batch pos"], base: Float[Tensor, "layer batch pos"] | None, stride: int
) -> Float[Tensor, "layer batch lag"]:
    """Energy at t by the age of its example, newest first, the tokens of an example added up.

    With ``base`` (what was written) divided by it: the share that is left. Without, relative to the newest example.
    Tokens before the first whole example are left out.
    """
    top = _by_example(energy.double(), stride)
    return top / (_by_example(base.double(), stride) if base is not None else top[..., :1]).clamp(min=1e-300)


def _by_example(energy: Tensor, stride: int) -> Tensor:
    examples = energy.shape[-1] // stride
    whole = energy[..., energy.shape[-1] - examples * stride :]
    return whole.unflatten(-1, (examples, stride)).sum(-1).flip(-1)


@dataclass(frozen=True)
class Resets:
    """Share of (prompt, channel) pairs that are reset at a token of each kind; (layer, kind).

    control, low, high: mean, 2.5 % and 97.5 % point with the tokens of every prompt in random order
    p: two-sided, (1 + permutations at least as far from their mean) / (1 + n_perm)
    """

    rate: Float[Tensor, "layer kind"]
    control: Float[Tensor, "layer kind"]
    low: Float[Tensor, "layer kind"]
    high: Float[Tensor, "layer kind"]
    p: Float[Tensor, "layer kind"]

    __repr__ = brief


def reset_events(slow: Float[Tensor, "layer batch pos d_inner"], threshold: float) -> Bool[Tensor, "layer batch pos c"]:
    """Where even the slowest mode keeps less than ``threshold`` times its median over prompts and positions ≥ 1.

    Position 0 is never an event: there is nothing to forget. Raises :class:`BadArgument` for a threshold that is not
    between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise BadArgument(f"reset={threshold} does not work; give a share of the median decay, between 0 and 1")
    median = slow[:, :, 1:].flatten(1, 2).median(dim=1).values
    events = slow < threshold * median[:, None, None]
    events[:, :, 0] = False
    return events


def resets(
    slow: Float[Tensor, "layer batch pos d_inner"],
    kinds: Int[Tensor, "pos"],
    threshold: float = 0.5,
    n_perm: int = 200,
    seed: int = 0,
) -> Resets:
    """The rate of :func:`reset_events` by kind of token, beside the same count with Δ permuted over positions.

    A prompt's decays are moved to other tokens of it (all channels together, position 0 stays), so that the number of
    events is the same and only what they have to do with the token is lost.
    """
    whole_number("n_perm", n_perm, least=1)
    share = reset_events(slow, threshold).double().mean(-1)[..., 1:]
    kinds = kinds.cpu()[1:]
    names = range(int(kinds.max()) + 1)

    def by_kind(values: Tensor) -> Tensor:
        return torch.stack([values[..., kinds == kind].mean(dim=(1, 2)) for kind in names], dim=-1)

    rate, generator = by_kind(share), seeds.generator("resets", seed)
    draws = []
    for _ in range(n_perm):
        order = seeds.uniform(share.shape[1:], generator).argsort(-1)
        draws.append(by_kind(share.gather(-1, order.expand_as(share))))
    chance = torch.stack(draws)
    mean = chance.mean(0)
    ends = chance.quantile(chance.new_tensor([0.025, 0.975]), dim=0)
    far = ((chance - mean).abs() >= (rate - mean).abs() - 1e-12).sum(0)
    return Resets(rate, mean, ends[0], ends[1], (1 + far).double() / (1 + n_perm))


def as_complex(model: Any, values: Tensor) -> Tensor:
    """A site of the state in fp64; complex where the model shows complex states as (real, imaginary) halves."""
    wide = values.double()
    point = next(point for name, point in model.hook_dict.items() if name.endswith("hook_state"))
    return torch.complex(*wide.chunk(2, dim=-1)) if getattr(point, "parts", 1) == 2 else wide


def _layer(state: Tensor, decay: Tensor, write: Tensor) -> tuple[Tensor, ...]:
    """Everything of one layer and one chunk of prompts; a product of decays is formed from the decays, never in logs:
    they may be 0.
    """
    size, last = decay.abs(), state.shape[1] - 1
    reached, rebuilt = torch.ones_like(decay[:, 0]), torch.zeros_like(state[:, 0])
    left = write.new_zeros(write.shape[:2], dtype=torch.float64)
    for s in range(last, -1, -1):
        arrived = reached * write[:, s]
        rebuilt = rebuilt + arrived
        left[:, s] = arrived.abs().square().sum((-2, -1))
        reached = reached * decay[:, s]
    held = state[:, :-1].abs().square()
    kept = (size[:, 1:].square() * held).sum(-1)
    return _measured(
        state, write, left, rebuilt, size.amax(-1), size.clamp(min=TINY).log().mean(-1), kept, held.sum(-1)
    )


def _factored(state: Tensor, factors: Tensor, write: Tensor) -> tuple[Tensor, ...]:
    """The same for transitions given by their factors; complex numbers are real and imaginary halves, as at the sites.

    Every write is carried along by itself, so that no product of matrices is formed.
    """
    arrived = write[:, :0]
    for t in range(state.shape[1]):
        if t:
            arrived = _step(factors[:, t : t + 1], arrived)
        arrived = torch.cat([arrived, write[:, t : t + 1]], dim=1)
    left = arrived.square().sum((-2, -1))
    # One matrix for each channel, unless an edit made it vary.
    constant = bool((factors == factors[:1, :1]).all())
    some = factors[:1, :1] if constant else factors
    size = torch.linalg.eigvals(_matrix(some)).abs().clamp(min=TINY)
    shape = state.shape[:3]
    slow, log_decay = (each.expand(shape) for each in (size.amax(-1), size.log().mean(-1)))
    kept = _step(factors[:, 1:], state[:, :-1]).square().sum(-1)
    held = state[:, :-1].square().sum(-1)
    return _measured(state, write, left, arrived.sum(1), slow, log_decay, kept, held)


def _step(factors: Float[Tensor, "batch pos d_inner 3 n"], state: Tensor) -> Tensor:
    """a ⊙ h + u ⟨q, h⟩."""
    a, u, q = factors.unbind(-2)
    (re, im), (p, r) = a.chunk(2, dim=-1), state.chunk(2, dim=-1)
    return torch.cat([re * p - im * r, re * r + im * p], dim=-1) + u * (q * state).sum(-1, keepdim=True)


def _matrix(factors: Float[Tensor, "batch pos d_inner 3 n"]) -> Float[Tensor, "batch pos d_inner n n"]:
    """The matrix of :func:`_step`: its columns are what becomes of the unit vectors."""
    n = factors.shape[-1]
    units = torch.eye(n, dtype=factors.dtype, device=factors.device)
    columns = [_step(factors, unit.expand(*factors.shape[:3], n)) for unit in units]
    return torch.stack(columns, dim=-1)


def _measured(
    state: Tensor,
    write: Tensor,
    left: Tensor,
    rebuilt: Tensor,
    slow: Tensor,
    log_decay: Tensor,
    kept: Float[Tensor, "batch later d_inner"],
    held: Float[Tensor, "batch later d_inner"],
) -> tuple[Tensor, ...]:
    """The fields of :class:`Forgetting`; ``kept`` is what the next token leaves of ``held``, both squared."""
    # 0 / 0 is NaN where the channel holds nothing; what is lost whole is lost at a finite rate.
    lost = -0.5 * torch.where(held > 0, (kept / held).clamp(min=TINY), math.nan).log()
    gap = torch.stack([(rebuilt - state[:, -1]).abs().square().sum(), state[:, -1].abs().square().sum()])
    return (
        write.abs().square().sum((-2, -1)).cpu(),
        left.cpu(),
        slow.float().cpu(),
        log_decay.float().cpu(),
        torch.nn.functional.pad(lost, (0, 0, 1, 0), value=math.nan).float().cpu(),
        gap.cpu(),
    )
