"""Which algorithm predicts what a model predicts: whether any of them fits, which one, and what else it could be.

Each algorithm is fitted to the predictions themselves, never to labels: its settings, and in a second comparison a
scale and a shift too, on one half of the prompts. Its distance is measured on the other half:

    Σ (ŷ − p)² ÷ Σ (ŷ − mean ŷ)²         0: the same function; 1: what a constant would get

A name is given to what *fits*: the upper end of the distance's interval is at most FIT. Of those that are *level* with
the nearest, the named one is that at scale 1 before any with a scale, then the one with the fewest settings, then the
first in the list of candidates. The others that are level are ties, unless they predict the same as the named one.
As they are, predictions have no name where another algorithm with a scale leaves less than a tenth of what the nearest
one leaves: two steps of descent times 0.6 are close to a step of GD++, and are not that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.probe_layers.families import Candidates, Family, Where
from analyses.probe_layers.fitting import fewer, fitted, scale_and_shift
from hooks.brief import brief
from hooks.errors import BadArgument
from interp.stats import Interval, bootstrap, ratio

FIT = 0.01
"""The largest distance of an algorithm that is named: what it misses is then a tenth of the predictions' spread, as a
root mean square, and it has 99 % of it. Set before the first run. A looser bound would give a name to what is none of
these: all good predictors resemble one another, because all of them resemble the labels."""
MARGIN = 0.1
"""A distance that is larger by less than a tenth is level: no reason to prefer a scale of 0.99 to none."""
ROUNDING = 1e-10
"""Distances up to here are level too: predictions of fp32 are known to 1e-5 of their size, distances to its square."""
NONE = "none of these"


@dataclass(frozen=True)
class Fit:
    """One algorithm with the settings that were chosen, as it is or with a scale and a shift.

    distance   on the prompts that did not choose
    free       settings that were chosen, a scale and a shift among them
    steps      number of steps; −1 where none are counted
    power      whether the scale is a power of probabilities
    """

    name: str
    setting: str
    distance: Interval
    free: int
    steps: int = -1
    scale: float = 1.0
    shift: float = 0.0
    scaled: bool = False
    power: bool = False

    def said(self) -> str:
        """Name, settings, and the scale and shift where there are any."""
        text = f"{self.name} ({self.setting})" if self.setting else self.name
        if not self.scaled:
            return text
        if self.power:
            return f"{text} to the power {self.scale:.3g}"
        sign = "−" if self.shift < 0 else "+"
        return f"{text} × {self.scale:.3g}" + (f" {sign} {abs(self.shift):.2g}" if abs(self.shift) >= 5e-3 else "")


@dataclass(frozen=True)
class Verdict:
    """What a set of fits allows to be said.

    best     the named one; where nothing fits, the nearest
    fits     whether it does; only then it is named
    ties     others that are as near, and predict something else
    same     others that are as near because they predict the same
    outdone  whether another one with a scale is nearer by far; then there is no name either
    """

    best: Fit
    fits: bool
    ties: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    outdone: bool = False

    __repr__ = brief

    @property
    def name(self) -> str:
        """The algorithm's, or NONE."""
        return self.best.name if self.fits and not self.outdone else NONE

    @property
    def clear(self) -> bool:
        """Whether there is a name and no tie."""
        return self.name != NONE and not self.ties

    def said(self) -> str:
        """One phrase: the name with its ties, or none and the nearest."""
        if self.name == NONE:
            return f"{NONE}, nearest {self.best.said()}"
        return self.best.said() + (f", not told apart from {' or '.join(self.ties)}" if self.ties else "")


@dataclass(frozen=True)
class Match:
    """One block's predictions against all algorithms.

    raw, scaled   name → fit, as it is and with a scale and a shift
    as_it_is      the verdict on ``raw`` alone; what an algorithm's name should rest on
    named         the verdict on both
    truth         the distance of the targets themselves: an algorithm that is no nearer shows accuracy and no more;
                  None where there are no targets in this unit
    """

    raw: dict[str, Fit]
    scaled: dict[str, Fit]
    as_it_is: Verdict
    named: Verdict
    truth: Interval | None = None


_NOTHING = np.array(np.nan)
CONSTANT = Fit("a constant", "", Interval(_NOTHING, _NOTHING, _NOTHING, n=0), 1)
"""In the place of a match where predictions are the same for every prompt and k: there is nothing to explain."""


def match(
    predictions: Float[Tensor, "block batch n_pairs *symbol"],
    found: Candidates,
    ks: Sequence[int],
    by_k: bool = False,
    targets: Float[Tensor, "batch n_pairs"] | None = None,
    seed: int = 0,
) -> list[list[Match]]:
    """Each block's predictions against every algorithm, over the examples ``ks`` together or after each k alone: for
    each block one match, or one for each k. The first half of the prompts chooses settings and scale.

    Raises ``BadArgument`` where there are fewer than four prompts, or no examples.
    """
    at = torch.tensor(list(ks), dtype=torch.long, device="cpu")
    prompts = predictions.shape[1]
    half = prompts // 2
    if half < 2 or not len(at):
        raise BadArgument(
            f"{prompts} prompts and {len(at)} examples are too few to choose on one half and judge on another"
        )
    own = predictions.detach().double().cpu()
    own = (own if own.ndim > 3 else own[..., None])[:, :, at]
    truth = None if targets is None else targets.detach().double().cpu()[half:, at, None]
    choosing, judging = Where(slice(0, half), at), Where(slice(half, prompts), at)
    groups = len(at) if by_k else 1
    entries = list(_entries(own, found, choosing, judging, groups))
    return [
        [_match(entries, own[block, half:], truth, block, group, by_k, seed) for group in range(groups)]
        for block in range(len(own))
    ]


@dataclass(frozen=True)
class _Entry:
    """One algorithm, as it is or scaled: for each block and group its form, the settings, scale and shift, what it
    leaves of the choosing prompts, and what it predicts of the judging ones.
    """

    name: str
    scaled: bool
    power: bool
    order: int
    forms: list[list[tuple[Family, list[float]]]]
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    chosen: NDArray[np.float64]
    predicted: Float[Tensor, "block batch k symbol"]


def _entries(own: Tensor, found: Candidates, choosing: Where, judging: Where, groups: int) -> Iterator[_Entry]:
    """All as they are, then all scaled."""
    settled: dict[int, Tensor] = {}
    entries: dict[bool, list[_Entry]] = {False: [], True: []}
    # Scaled first: a scale takes a fit out of places where it would stay without, and what it has found is tried as it
    # is too. (Eight steps at a rate that diverges after few examples are otherwise taken for ten at another.)
    for scaled in (True, False):
        affine = scaled and not found.scaled
        families = found.scaled if scaled and found.scaled else found.families
        for order, name in enumerate(found.names):
            forms = [family for family in families if family.name == name]
            tried = []
            for form in forms:
                also = None if scaled else settled.get(id(form))
                tried.append(_tried(form, own, found, choosing, judging, groups, scaled, affine, also))
                settled[id(form)] = tried[-1][0]
            if forms:
                entries[scaled].append(_entry(name, order, scaled, scaled and not affine, forms, tried))
    return iter(entries[False] + entries[True])


def _tried(
    form: Family,
    own: Tensor,
    found: Candidates,
    choosing: Where,
    judging: Where,
    groups: int,
    scaled: bool,
    affine: bool,
    also: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Settings, scale, shift and cost of one form by block and group, and its predictions of the judging prompts."""
    mine = own[:, choosing.prompts]
    settings = fitted(form, mine, choosing, groups, affine, found.begun(form, fewer(choosing)), also)
    seen, guess = (form.predict(settings, where) for where in (choosing, judging))
    scale, shift = torch.ones_like(settings[..., 0]), torch.zeros_like(settings[..., 0])
    if affine:
        scale, shift = scale_and_shift(mine, seen, groups)
        seen, guess = (scale[:, None, :, None] * part + shift[:, None, :, None] for part in (seen, guess))
    elif scaled:
        scale = settings[..., -1]
    left = (mine - seen).square().sum((1, 3))
    cost = left if groups > 1 else left.sum(1, keepdim=True)
    return settings, scale, shift, cost.nan_to_num(torch.inf, torch.inf), guess


def _entry(
    name: str, order: int, scaled: bool, power: bool, forms: list[Family], tried: Sequence[tuple[Tensor, ...]]
) -> _Entry:
    """The best form for each block and group."""
    settings, *rest = zip(*tried, strict=True)
    scale, shift, cost, guess = (torch.stack(part) for part in rest)
    which = cost.argmin(0)  # (block, group)

    def of_best(part: Tensor) -> NDArray[np.float64]:
        return np.asarray(torch.take_along_dim(part, which[None], dim=0)[0].numpy())

    chosen = [
        [(forms[int(form)], settings[int(form)][block, group].tolist()) for group, form in enumerate(row)]
        for block, row in enumerate(which)
    ]
    predicted = torch.take_along_dim(guess, which[None, :, None, :, None], dim=0)[0]
    return _Entry(name, scaled, power, order, chosen, of_best(scale), of_best(shift), of_best(cost), predicted)


def _match(
    entries: list[_Entry], own: Tensor, truth: Tensor | None, block: int, group: int, by_k: bool, seed: int
) -> Match:
    at = slice(group, group + 1) if by_k else slice(None)
    mine = own[:, at]
    spread = (mine - mine.mean((0, 1), keepdim=True)).square().sum((1, 2)).numpy()
    if spread.sum() <= ROUNDING**2 * float(mine.square().sum()) or not spread.any():
        nothing = Verdict(CONSTANT, fits=False)
        return Match({}, {}, nothing, nothing)
    guesses = [entry.predicted[block][:, at] for entry in entries]
    compared = guesses if truth is None else [*guesses, truth[:, at]]
    miss = np.stack([(mine - guess).square().sum((1, 2)).numpy() for guess in compared], axis=1)
    bounded = np.minimum(np.nan_to_num(miss, nan=np.inf, posinf=np.inf), 1e12 * spread.mean())
    distance = ratio(bounded, spread[:, None].repeat(miss.shape[1], 1), seed=seed).each()
    fits = [_fit(entry, block, group, one) for entry, one in zip(entries, distance, strict=False)]
    bounded = bounded[:, : len(entries)] / spread.mean()
    chosen = np.array([entry.chosen[block, group] for entry in entries])

    def verdict(among: list[int]) -> Verdict:
        nearest = min(among, key=lambda i: float(chosen[i]))
        behind = bootstrap(bounded[:, among] - (1 + MARGIN) * bounded[:, [nearest]], seed=seed)
        level = [i for i, low in zip(among, behind.low, strict=True) if i == nearest or low <= ROUNDING]
        able = [i for i in level if float(fits[i].distance.high) <= FIT]
        if not able:  # told by what it leaves of the prompts that judge: what diverges there is near to nothing
            return Verdict(fits[min(among, key=lambda i: float(fits[i].distance.mean))], fits=False)
        best = min(able, key=lambda i: (fits[i].scaled, fits[i].free, entries[i].order))
        others = [i for i in level if entries[i].name != entries[best].name]
        apart = MARGIN * float(fits[best].distance.mean) + 10 * ROUNDING
        alike = {i: float((guesses[i] - guesses[best]).square().sum()) <= apart * spread.sum() for i in others}
        same = {entries[i].name for i in others if alike[i]}
        ties = {entries[i].name for i in others} - same
        ordered = list(dict.fromkeys(entry.name for entry in entries))
        ordered_ties, ordered_same = (tuple(name for name in ordered if name in names) for names in (ties, same))
        return Verdict(fits[best], True, ordered_ties, ordered_same)

    raw = [i for i, entry in enumerate(entries) if not entry.scaled]
    as_it_is, named = verdict(raw), verdict(list(range(len(entries))))
    if named.best.scaled and named.best.name != as_it_is.best.name:
        left = float(as_it_is.best.distance.mean)
        outdone = left > 10 * ROUNDING and float(named.best.distance.mean) < MARGIN * left
        as_it_is = replace(as_it_is, outdone=outdone)
    return Match(
        {entries[i].name: fits[i] for i in raw},
        {entry.name: one for entry, one in zip(entries, fits, strict=True) if entry.scaled},
        as_it_is,
        named,
        None if truth is None else distance[-1],
    )


def _fit(entry: _Entry, block: int, group: int, distance: Interval) -> Fit:
    form, row = entry.forms[block][group]
    steps = -1 if form.counts is None else round(row[form.counts])
    scale, shift = float(entry.scale[block, group]), float(entry.shift[block, group])
    free = form.free + 2 * entry.scaled
    return Fit(entry.name, form.words(row), distance, free, steps, scale, shift, entry.scaled, entry.power)
