"""One model's states on shared prompts: what can be read from them, how they forget, and what moves with them.

Everything that ``analyses.compare_states`` puts side by side, for one model. The same prompts, the same split, the same
number of principal components and the same permutations serve every model, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import hooks
from hooks.brief import brief
from hooks.errors import BadArgument
from hooks.inputs import fed
from interp import evaluate, probe, seeds, states, variance
from interp.arguments import whole_number
from interp.forgetting import FACTORED, SITES, Forgetting, Resets, forgetting, resets
from interp.lens import joint
from interp.metric import one_arithmetic, recovery
from interp.patch.swap import Swap
from interp.similarity import coordinates, effective_rank
from interp.stats import Interval
from interp.tasks.base import Batch, Task

OF_EXAMPLE = ("y", "label", "outlier", "index", "features")
"""Variables whose entry k is about example k itself: they are looked for at its query, all others just before it."""
OF_PAIR = ("y", "outlier")
"""Those of them that the first query says nothing of where a task contaminates pairs and asks clean queries."""
SUMS = ("Xty", "XtX")
SHUFFLES = 4
SOME, FEW = 4, 16
"""Decays, ranks within a prompt and lengths beyond the trained one are measured on every 4th prompt, derivatives on
every 16th (at least 8): there the cost is the model's, and the spread between prompts small."""
REMEMBERS = 2
"""With fewer examples before the last query there is nothing to remember: no age but one, and no later decay."""
CLEAN = 640
"""At least so many prompts for the error that the card's is compared with: it has a heavy tail."""
TRIPLE = NDArray[np.float64]
"""Estimate, low end and high end on the last axis."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every model: prompts, their split, and the numbers of examples k after which a state is read.

    After k ≥ 1 examples it is the state before the query; after none, where that state is zero, the state at the query.
    """

    task: Task
    batch: Batch
    longer: Batch
    ks: tuple[int, ...]
    swap_k: int
    split: probe.Split
    components: int
    permutations: int
    reset: float
    seed: int

    @property
    def some(self) -> int:
        """Prompts for decays, ranks within a prompt, and longer prompts."""
        return max(len(self.batch) // SOME, 8)

    @property
    def few(self) -> int:
        """Prompts for derivatives."""
        return max(len(self.batch) // FEW, 8)

    @property
    def middle(self) -> int:
        """The number of examples after which models are compared layer by layer."""
        return min(self.ks, key=lambda k: (abs(2 * k - self.last), -k))

    @property
    def last(self) -> int:
        """Every example but the queried one has been read."""
        return self.ks[-1]

    @property
    def remembers(self) -> bool:
        """Whether what a state keeps of earlier examples can be measured."""
        return self.last >= REMEMBERS

    @property
    def targets(self) -> dict[str, Tensor]:
        """The task's real-valued variables as (batch, m), or (batch, n_pairs, m) where they change along the prompt."""
        found = {}
        changing = _changing(self.task)
        for name, value in self.task.variables(self.batch).items():
            if value.is_floating_point():
                axes = 2 if name in changing else 1
                value = value.reshape(*value.shape[:axes], -1)
                if name == "XtX":  # symmetric: each product once
                    side = self.task.d
                    rows, columns = torch.tril_indices(side, side, device=value.device)
                    value = value[..., side * rows + columns]
                found[name] = value.cpu()
        return found


def plan(task: Task, prompts: int, *, components: int, permutations: int, reset: float, longer: int, seed: int) -> Plan:
    """The shared prompts and positions; a prompt of one pair has k = 0 only."""
    whole_number("permutations", permutations, least=1)
    if not 0 < reset < 1:
        raise BadArgument(f"reset={reset} does not work; give a share of the median decay, between 0 and 1")
    last = task.n_pairs - 1
    batch = evaluate.prompts(task, prompts, seed, "probe")
    more = task.sample(max(prompts // SOME, 8), seeds.generator("probe", seed, 1), n_pairs=longer * task.n_pairs)
    ks = sorted({min(last, max(1, round(last * part))) for part in (0, 0.125, 0.25, 0.5, 0.75, 1)} | {0})
    chosen = probe.split(prompts, seed=seed)
    if not 1 <= components < len(chosen.train):
        raise BadArgument(f"components={components}: the probes are fitted on {len(chosen.train)} prompts, give fewer")
    swap_k = min(last, max(1, round(last * 0.5))) if len(batch.read) > 1 else last
    return Plan(task, batch, more, tuple(ks), swap_k, chosen, components, permutations, reset, seed)


@dataclass(frozen=True)
class Reading:
    """R² of one target by layer and number of examples k: (layer, k, 3), NaN where it was not asked.

    ``shuffled`` and ``untrained`` the same of the controls; ``sums`` (k, 3) from what adding up the prompt gives.
    ``folds`` (2, layer, k): R² of the trained and the untrained model by folds over the prompts that fit the probes,
    by which a layer is chosen. ``lucky``: what R² of shuffled targets may be by chance (``probe.lucky``).
    """

    score: TRIPLE
    shuffled: TRIPLE
    untrained: TRIPLE
    sums: TRIPLE
    folds: NDArray[np.float64]
    lucky: float

    __repr__ = brief

    @property
    def best(self) -> int:
        """The layer from which most is read after the last example, judged by the prompts that fit the probes."""
        return int(np.nanargmax(self.folds[0, :, -1]))


@dataclass(frozen=True)
class Study:
    """What was found of one model; axes: layer, number of examples k (``Plan.ks``), prompt.

    error        of CLEAN prompts of their own, each example that is reported; ``long_error`` of the longer prompts
    rows         rows[k][layer] (n, few): the states after ``Plan.middle`` examples and after none, in coordinates of
                 equal products
    reading      by target
    by_count     R² of the first target, after ``last`` examples, at its best layer, by number of components
    within       effective rank of each prompt's own matrix (layer, some, k); ``across`` of vec(h) (layer, k)
    forgets      None where the model shows neither decays nor transitions, or not ``Plan.remembers``
    content      nested shares of the variance of ln ā; None without decays or where they never change at all
    reach        ‖∂h_t/∂x_s‖² (layer, few, s), and how far differences are from it; None unless ``Plan.remembers``
    norms        ‖h‖ after 0, 1, … examples of the longer prompts (layer, some, k)
    swaps        recovery (part, layer, 3), ``all_layers`` (part, 3); ``exact`` is the swap of everything against the
                 whole other context in one run; ``nothing`` the largest change under a swap of no part. No part and
                 None where there is no context to swap
    """

    name: str
    error: Float[Tensor, "clean asked"]
    long_error: Float[Tensor, "some longer"]
    rows: dict[int, list[Tensor]]
    reading: dict[str, Reading]
    by_count: dict[int, Interval]
    within: Float[Tensor, "layer some k"]
    across: Float[Tensor, "layer k"]
    forgets: Forgetting | None
    content: variance.Shares | None
    resets: Resets | None
    reach: Float[Tensor, "layer few pos"] | None
    reach_gap: float | None
    norms: Float[Tensor, "layer some examples"]
    parts: tuple[str, ...]
    swaps: TRIPLE
    all_layers: TRIPLE
    exact: Interval | None
    nothing: float | None

    __repr__ = brief


def study(name: str, model: Any, untrained: Any, asked: Plan) -> Study:
    """Everything in :class:`Study`; ``untrained`` is the same architecture with weights as they are drawn.

    Raises :class:`BadArgument` naming the sites that are missing for a model without states.
    """
    states.need(model, ("hook_state",), "the comparison of states", name)
    batch, task = asked.batch, asked.task
    held = _held(model, asked, asked.ks)
    fresh = _held(untrained, asked, tuple({0, asked.middle, asked.last}))
    reading, by_count = _read(held, fresh, asked)
    some = batch.tokens[: asked.some]
    before = states.query(batch, asked.last) - 1
    shown = asked.remembers and any(not states.missing(model, sites) for sites in (SITES, FACTORED))
    forgets = forgetting(model, some, before) if shown else None
    few = batch.tokens[: asked.few]
    where = [states.query(asked.longer, k) - 1 for k in range(1, asked.longer.y.shape[1])]
    norms = [states.norms(model, states.alone(asked.longer)), states.norms(model, asked.longer.tokens)[..., where]]
    return Study(
        name=name,
        error=evaluate.errors(model, task, n=max(CLEAN, len(batch)), seed=asked.seed, query_only=task.query_only),
        long_error=evaluate.errors(model, task, batch=asked.longer),
        rows={k: [layer[k, k == 0] for layer in held.rows] for k in sorted({0, asked.middle})},
        reading=reading,
        by_count=by_count,
        within=torch.stack([effective_rank(h) for h in held.matrices]),
        across=torch.tensor(
            [[states.rank_across(layer[k, k == 0]) for k in asked.ks] for layer in held.rows],
            dtype=torch.float32,
            device="cpu",
        ),
        forgets=forgets,
        content=None if forgets is None else _content(forgets, batch, asked.seed),
        resets=None
        if forgets is None
        else resets(forgets.slow, batch.kinds[: before + 1], asked.reset, asked.permutations, asked.seed),
        # Up to t: the query after it reaches nothing, and would shift the examples by a token.
        reach=states.reach(model, few, before, seed=asked.seed)[..., : before + 1] if asked.remembers else None,
        reach_gap=states.reach_gap(model, few[:4], before, seed=asked.seed) if asked.remembers else None,
        norms=torch.cat(norms, dim=-1),
        **_swaps(model, asked),
    )


@dataclass(frozen=True)
class _Held:
    """States by layer and place: (k, False) just before example k's query, (k, True) at it; of k = 0 at it only.

    ``matrices[layer]`` (some, k, d_inner, d_state): the first prompts' own.
    """

    rows: list[dict[tuple[int, bool], Tensor]]
    matrices: list[Tensor]


def _held(model: Any, asked: Plan, ks: Sequence[int]) -> _Held:
    batch, found = asked.batch, states.at(model, states.alone(asked.batch), [0])
    later = [(k, False) for k in ks if k] + [(k, True) for k in {asked.middle, asked.last} if k and k in ks]
    if later:
        rest = states.at(model, batch.tokens, [states.query(batch, k) - (not inside) for k, inside in later])
        found = [torch.cat(parts, dim=1) for parts in zip(found, rest, strict=True)]
    places = [(0, True), *later]
    return _Held(
        rows=[{place: coordinates(h[:, i].flatten(1)) for i, place in enumerate(places)} for h in found],
        matrices=[h[: asked.some, : len(ks)] for h in found],
    )


def _read(held: _Held, fresh: _Held, asked: Plan) -> tuple[dict[str, Reading], dict[int, Interval]]:
    """Ridge probes from equal numbers of principal components, each layer and k with its controls."""
    targets, layers, ks = asked.targets, len(held.rows), asked.ks
    blank = {name: np.full((4, layers, len(ks), 3), np.nan) for name in targets}
    folds = {name: np.full((2, layers, len(ks)), np.nan) for name in targets}
    for k, inside in held.rows[0]:
        goal, j = _at(targets, k, inside, asked), ks.index(k)
        if not goal:
            continue
        sums = _probe(_sums(targets, k, asked), goal, asked, asked.components)
        for layer in range(layers):
            found = _probe(held.rows[layer][k, inside], goal, asked, asked.components)
            plain = None
            if (k, inside) in fresh.rows[layer]:
                plain = _probe(fresh.rows[layer][k, inside], goal, asked, asked.components)
            for name, one in found.items():
                blank[name][0, layer, j] = _triple(one.score)
                folds[name][0, layer, j] = one.folds
                blank[name][1, layer, j] = _triple(one.controls["shuffled"])
                if plain is not None and name in plain:
                    blank[name][2, layer, j] = _triple(plain[name].score)
                    folds[name][1, layer, j] = plain[name].folds
                if name in sums:
                    blank[name][3, layer, j] = _triple(sums[name].score)
    reading = {
        name: Reading(v[0], v[1], v[2], v[3, 0], folds[name], _lucky(targets, name, asked))
        for name, v in blank.items()
        if np.isfinite(v[0]).any()
    }
    if not reading:
        raise BadArgument("none of the task's variables differs enough between these prompts to be read: give more")
    first = next(iter(reading))
    inside = asked.last == 0 or first in OF_EXAMPLE
    rows, goal = held.rows[reading[first].best][asked.last, inside], _at(targets, asked.last, inside, asked)
    counts = sorted({max(1, round(asked.components * part)) for part in (0.25, 0.5, 1, 2, 4)})
    usable = [count for count in counts if count < len(asked.split.train)]
    by_count = {count: _probe(rows, {first: goal[first]}, asked, count)[first].score for count in usable}
    return reading, by_count


def _probe(rows: Tensor, goal: Mapping[str, Tensor], asked: Plan, components: int) -> dict[str, probe.Probe]:
    """Probes by target, without those of too little spread among few prompts for R² to have an interval."""
    # Reduced once: the probe would do it again for every control.
    few = probe.reduce(rows, asked.split, components)[:, 0]
    found: dict[str, probe.Probe] = {}
    for names in [list(goal), *([name] for name in goal)]:
        chosen = {name: goal[name] for name in names if name not in found}
        try:
            found |= probe.ridge(
                few, chosen, untrained=None, running_sum=None, split=asked.split, shuffles=SHUFFLES, seed=asked.seed
            )
        except BadArgument:
            continue  # all targets together, else each alone
        if len(found) == len(goal):
            break
    return found


def _lucky(targets: Mapping[str, Tensor], name: str, asked: Plan) -> float:
    """What R² of shuffled targets may be by chance, at the k where it may be largest."""
    value = targets[name]
    each = [value] if value.ndim == 2 else [value[:, k] for k in asked.ks]
    return max(probe.lucky(one, asked.split, SHUFFLES) for one in each)


def _at(targets: Mapping[str, Tensor], k: int, inside: bool, asked: Plan) -> dict[str, Tensor]:
    """The targets after ``k`` examples that are looked for before (or at) the query and that differ between prompts.

    After none all of them are looked for at the query, but for those that are ``unasked``.
    """
    changing = _changing(asked.task)
    other = unasked(asked) if k == 0 else ()
    chosen = {
        name: value[:, k] if name in changing else value
        for name, value in targets.items()
        if ((name in OF_EXAMPLE) == inside or k == 0) and name not in other
    }
    parts = (asked.split.train, asked.split.test)
    return {name: v for name, v in chosen.items() if all(bool((v[part] != v[part][:1]).any()) for part in parts)}


def unasked(asked: Plan) -> list[str]:
    """The targets that are a contaminated pair's and not those of the clean query in its place."""
    targets = asked.targets
    return [name for name in OF_PAIR if name in targets] if "outlier" in targets and joint(asked.batch) else []


def unread(asked: Plan) -> list[str]:
    """The targets that are the same for every prompt where no example came before."""
    targets, other = asked.targets, unasked(asked)
    return [name for name in targets if name not in {*_at(targets, 0, True, asked), *other}]


def _sums(targets: Mapping[str, Tensor], k: int, asked: Plan) -> Tensor:
    """What adding up the prompt gives: Xᵀy and XᵀX where the task has them, the sum of the tokens otherwise."""
    have = [targets[name][:, k] for name in SUMS if name in targets]
    tokens = asked.batch.tokens[:, : states.query(asked.batch, k)]
    return torch.cat(have, dim=-1) if have else tokens.float().sum(1)


def _changing(task: Task) -> set[str]:
    """The variables that have an axis of examples: those whose second axis grows with the prompt."""
    one, two = (
        task.variables(task.sample(1, seeds.generator("probe", 0), n_pairs=task.n_pairs + more)) for more in (0, 1)
    )
    return {name for name in one if one[name].shape != two[name].shape}


def _content(forgets: Forgetting, batch: Batch, seed: int) -> variance.Shares | None:
    """Shares of the variance of ln ā (of a channel's modes' mean) after the first token; None if it never varies."""
    values = forgets.log_decay[:, :, 1:]
    if bool((values == values.flatten()[0]).all()):
        return None
    return variance.shares(values, batch.kinds[1 : values.shape[2] + 1].cpu(), seed=seed)


def _swaps(model: Any, asked: Plan) -> dict[str, Any]:
    """The second half of the prompts goes on from the states of the first half, at the query after ``swap_k``."""
    if asked.swap_k == 0:
        empty = np.zeros((0, len(hooks.resolve(model, "*.hook_state")), 3))
        return {"parts": (), "swaps": empty, "all_layers": empty[:, 0], "exact": None, "nothing": None}
    tokens, half = fed(model, asked.batch.tokens), len(asked.batch) // 2
    where = states.query(asked.batch, asked.swap_k)
    one, two = tokens[:half, : where + 1], tokens[half : 2 * half, : where + 1]
    with one_arithmetic(model), torch.no_grad():
        swap = Swap(model, one, two, where)
        other = model(torch.cat([one[:, :where], two[:, where:]], dim=1))[:, -1, 0]
        parts = swap.parts
        sets = [(part,) for part in parts] + ([parts] if len(parts) > 1 else [])
        own = swap.second[:, 0, 0]

        def slope(chosen: tuple[str, ...], layers: int | None) -> Interval:
            return recovery(swap.patched(chosen, layers)[:, 0, 0], other, own, seed=asked.seed)

        by_layer = [[_triple(slope(chosen, layer)) for layer in range(swap.n_layers)] for chosen in sets]
        everywhere = [slope(chosen, None) for chosen in sets]
        nothing = float((swap.patched(())[:, 0, 0] - own).abs().max())
    return {
        "parts": tuple("both" if len(chosen) > 1 else chosen[0] for chosen in sets),
        "swaps": np.array(by_layer),
        "all_layers": np.array([_triple(each) for each in everywhere]),
        "exact": everywhere[-1],
        "nothing": nothing,
    }


def _triple(interval: Interval) -> TRIPLE:
    return np.array([float(interval.mean), float(interval.low), float(interval.high)])
