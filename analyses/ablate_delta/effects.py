"""What is lost when a signal inside a recurrence is replaced: the ways to replace it, and the runs that measure it.

A *mode* says what a signal is replaced by. Means come from reference prompts that are not evaluated:

    mean           one value per channel
    position-mean  one value per channel and position: keeps the schedule, drops the content
    token-mean     one value per channel and kind of token (x and y apart)
    resample       the value of another prompt of the batch, at the same position
    freeze:y       0 at the tokens of that kind; as Δ, neither written nor forgotten there
    scale×2        that many times the value

A *cell* is one mode on one signal, in all layers or in one; for Δ also in one of its two roles, forgetting
(decay) or writing (write). Editing one layer leaves the residual stream before it alone, so such a run starts
at that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

import hooks
from hooks.errors import BadArgument, unknown
from hooks.inputs import fed
from interp.arguments import listed
from interp.evaluate import errors
from interp.machine.workers import at_once, side_by_side
from interp.tasks.base import Batch, Task

ROLES = {"both": "hook_delta", "decay": "hook_delta_decay", "write": "hook_delta_write"}
SIGNALS = {
    "delta": ("hook_delta",),
    "B": ("hook_B",),
    "C": ("hook_C",),
    "gate": ("hook_gate",),
    "delta,B,C": ("hook_delta", "hook_B", "hook_C"),
}
MEANS: dict[str, tuple[str, ...]] = {
    "mean": ("batch", "pos"),
    "position-mean": ("batch",),
    "token-mean": ("batch", "kind"),
}
NAMES = {"delta": "Δ", "B": "B", "C": "C", "gate": "the output gate", "delta,B,C": "Δ, B and C together"}
ALL_MEAN = "all-mean"
"""The mode ``mean`` on Δ, B and C together: time invariance."""


@dataclass(frozen=True)
class Cell:
    """``mode`` on ``signal``, in one ``role`` (of Δ) or both, in ``layer`` or in all (None)."""

    mode: str
    signal: str = "delta"
    role: str = "both"
    layer: int | None = None

    @property
    def label(self) -> str:
        """The mode's name in tables and figures."""
        return ALL_MEAN if self.signal == "delta,B,C" else self.mode


def has(model: Any, signal: str) -> bool:
    """Whether ``model`` has every site that ``signal`` stands for."""
    kinds = {name.rsplit(".", 1)[-1] for name in model.hook_dict}
    return kinds.issuperset(SIGNALS[signal])


def lacking(model: Any) -> list[str]:
    """What cannot be replaced in ``model`` and for want of which sites, one line each."""
    kinds = {name.rsplit(".", 1)[-1] for name in model.hook_dict}
    return [
        f"no {', '.join(sorted(set(sites) - kinds))}: {NAMES[signal]} cannot be replaced"
        for signal, sites in SIGNALS.items()
        if not kinds.issuperset(sites)
    ]


def modes_of(kinds: Iterable[str], scales: Iterable[float]) -> list[str]:
    """Every mode on Δ for these kinds of token and these factors; without all-mean."""
    freeze = [f"freeze:{kind}" for kind in listed("kinds", kinds)]
    return [*MEANS, "resample", *freeze, *(f"scale×{factor:g}" for factor in scales)]


def cells_of(
    model: Any, kinds: Iterable[str], scales: Iterable[float], modes: Sequence[str] = (), layers: Sequence[int] = ()
) -> list[Cell]:
    """The cells of a Δ ablation: each mode in all layers, in each of ``layers`` alone, and in all layers by role.

    Then the same modes on B, C and the output gate in all layers. ``mean`` by role, and on B, C and the gate, is also
    in each layer alone.
    ``kinds`` are those of the prompts' tokens. ``modes`` and ``layers`` pick from what there is; empty means all.
    Signals that the model lacks are left out (``lacking`` names them). Raises :class:`BadArgument` for a mode or a
    layer that there is not, and where nothing is left.
    """
    known, modes = [*modes_of(kinds, scales), ALL_MEAN], listed("modes", modes)
    for mode in modes:
        if mode not in known:
            raise BadArgument(unknown("mode", mode, known))
    count = len(model.blocks)
    for layer in layers:
        if not 0 <= layer < count:
            raise BadArgument(f"there is no layer {layer}: the model has layers 0 to {count - 1}")
    places: list[int | None] = [None, *(layers or range(count))]
    chosen = list(modes or known)
    cells = []
    for mode in chosen:
        signal = "delta,B,C" if mode == ALL_MEAN else "delta"
        if has(model, signal):
            plain = "mean" if mode == ALL_MEAN else mode
            cells += [Cell(plain, signal, "both", place) for place in places]
            alone = places if mode == "mean" else [None]
            cells += [Cell(plain, signal, role, place) for role in ROLES if role != "both" for place in alone]
    for signal in ("B", "C", "gate"):
        if has(model, signal):
            for mode in (m for m in chosen if m != ALL_MEAN):
                cells += [Cell(mode, signal, "both", place) for place in (places if mode == "mean" else [None])]
    if not cells:
        raise BadArgument(f"nothing is left of the modes {', '.join(chosen)}: {'; '.join(lacking(model))}")
    return cells


class Reference:
    """The signals on reference prompts, and their means as the values that take a signal's place."""

    def __init__(self, model: Any, batch: Batch, kind_names: Sequence[str]) -> None:
        wanted = [f"*.{SIGNALS[s][0]}" for s in ("delta", "B", "C", "gate") if has(model, s)]
        if not has(model, "delta"):
            raise BadArgument("the model has no hook_delta: there is no time step to replace")
        self.kinds, self.kind_names = batch.kinds.cpu(), listed("kind_names", kind_names)
        self.record = hooks.record(model, fed(model, batch.tokens), wanted)
        self._means: dict[str, dict[str, Tensor]] = {mode: {} for mode in MEANS}
        for name, value in self.record.items():
            for mode, over in MEANS.items():
                average = hooks.mean(over, kinds=self.kinds if mode == "token-mean" else None)
                # In fp64: the mean of a constant Δ is then that constant to the last bit, and takes its fast path.
                self._means[mode][name] = average(value.double(), name)[:1].to(value.dtype)

    def mean(self, mode: str, site: str) -> Tensor:
        """The mean that replaces ``site``; both roles of Δ take the mean of Δ itself."""
        return self._means[mode][_whole(site)]

    @property
    def present(self) -> list[str]:
        """The kinds of token that the prompts have, in the task's order."""
        return [name for i, name in enumerate(self.kind_names) if bool((self.kinds == i).any())]

    def of_kind(self, kind: str) -> Tensor:
        """Positions of the tokens of one kind."""
        if kind not in self.kind_names:
            raise BadArgument(unknown("kind of token", kind, self.kind_names))
        return (self.kinds == self.kind_names.index(kind)).nonzero().reshape(-1)


def _whole(site: str) -> str:
    for role in ("_decay", "_write"):
        site = site.removesuffix(role) if site.endswith(f"hook_delta{role}") else site
    return site


def edits(cell: Cell, model: Any, reference: Reference, seed: int = 0) -> dict[str, Any]:
    """``cell`` as ``{site: edit}``; :class:`BadArgument` for a mode, signal, role or layer that there is not."""
    if cell.signal not in SIGNALS:
        raise BadArgument(unknown("signal", cell.signal, SIGNALS))
    if cell.role not in ROLES or (cell.role != "both" and "hook_delta" not in SIGNALS[cell.signal]):
        raise BadArgument(f'"{cell.role}" is no role of {cell.signal}; Δ has {", ".join(ROLES)}')
    count = len(model.blocks)
    if cell.layer is not None and not 0 <= cell.layer < count:
        raise BadArgument(f"there is no layer {cell.layer}: the model has layers 0 to {count - 1}")
    made: dict[str, Any] = {}
    for layer in range(count) if cell.layer is None else (cell.layer,):
        for kind in SIGNALS[cell.signal]:
            name = f"blocks.{layer}.mixer.{ROLES[cell.role] if kind == 'hook_delta' else kind}"
            made[name] = _replacement(cell.mode, name, reference, seed)
    return made


def _replacement(mode: str, site: str, reference: Reference, seed: int) -> hooks.Edit:
    if mode in MEANS:
        return hooks.set_to(reference.mean(mode, site))
    if mode == "resample":
        return hooks.resample(seed=seed)
    name, _, argument = mode.partition("×")
    if name == "scale" and argument:
        return hooks.scale(float(argument))
    name, _, argument = mode.partition(":")
    if name == "freeze" and argument:
        return hooks.zero(pos=reference.of_kind(argument))
    raise BadArgument(unknown("mode", mode, [*MEANS, "resample", "freeze:y", "scale×2"]))


class Ablation:
    """Runs edits on one model and one batch of prompts, all of whose examples are read out of one forward.

    ``clean`` is the error of the unedited run, (n, n_pairs): squared, divided by the task's scale. At most ``chunk``
    prompts are run at once.
    """

    def __init__(self, model: Any, task: Task, batch: Batch, reference: Reference, chunk: int = 128) -> None:
        self.model, self.task, self.batch, self.reference = model, task, batch, reference
        # Chunks as equal as can be: one prompt alone has no other whose value it could take.
        self.chunk = chunk = -(-len(batch) // -(-len(batch) // chunk))
        self.clean = errors(model, task, batch=batch, batch_size=chunk)
        self._before = hooks.record(model, fed(model, batch.tokens), "blocks.*.hook_resid_pre")

    def run(self, cell: Cell, seed: int = 0) -> Float[Tensor, "n n_pairs"]:
        """Errors under one cell."""
        return self.under(edits(cell, self.model, self.reference, seed), cell.layer)

    def under(self, changes: Mapping[str, Any], layer: int | None = None) -> Float[Tensor, "n n_pairs"]:
        """Errors under any ``{site: edit}``; ``layer`` says that nothing before that layer is edited."""
        model: Any = self.model
        if layer:
            model = _From(model, self._before[f"blocks.{layer}.hook_resid_pre"], layer, self.chunk)
        with hooks.edit(self.model, changes):
            return errors(model, self.task, batch=self.batch, batch_size=self.chunk)

    def unedited(self, sites: Iterable[str]) -> Float[Tensor, "n n_pairs"]:
        """``clean`` again, with hooks that only look at these sites: on the path that edits of them would take."""
        with self.model.hooks(fwd_hooks=[(site, lambda value, hook: None) for site in sites]):
            return errors(self.model, self.task, batch=self.batch, batch_size=self.chunk)

    def sweep(self, cells: Sequence[Cell], tick: Callable[[], object] = lambda: None) -> dict[Cell, Tensor]:
        """``{cell: errors}``, on as many copies of the model as can run at once; ``tick`` is called after each."""
        device = next(self.model.parameters()).device
        copies = at_once(len(cells), device)
        runs = [self, *(self._again() for _ in range(copies - 1))]

        def some(start: int) -> list[Float[Tensor, "n n_pairs"]]:
            found = []
            for cell in cells[start::copies]:
                found.append(runs[start].run(cell))
                tick()
            return found

        parts = side_by_side([partial(some, start) for start in range(copies)], device=device)
        return {cell: parts[i % copies][i // copies] for i, cell in enumerate(cells)}

    def _again(self) -> Ablation:
        """The same on a copy of the model: edits of the one are not seen by the other."""
        other = copy(self)
        other.model = deepcopy(self.model)
        return other


class _From(nn.Module):
    """The model as a function of tokens that starts at a layer, from a residual stream computed before.

    ``errors`` calls it on one chunk of prompts after another, in order.
    """

    def __init__(self, model: nn.Module, before: Tensor, layer: int, chunk: int) -> None:
        super().__init__()
        self.model, self.layer, self.parts = model, layer, iter(before.split(chunk))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(next(self.parts), start_at_layer=self.layer)
