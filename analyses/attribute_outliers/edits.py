"""Is the outliers' gate used? Edits that take what sets outliers apart away, or give it to clean examples.

    Δ / output gate of outliers := clean      the mean over clean examples in place of the outliers' own, per channel
    Δ / output gate of clean := outliers'     the reverse
    Δ / output gate / x / B and C of outliers := twin's   each outlier's own value in the run in which all outliers are
                                              clean; the others of these are held at what they are in the prompt
    outliers out of the scan / taps / both    no later token reads them there (``interp.patch``); decays stay
    outliers frozen, out of the taps          Δ := 0 as well: neither written nor forgotten

in all layers at once. Means come from other prompts. Each edit has a *whole* that its recovery is measured against:
the prompt in which the same examples really are what the edit pretends (the twins in the outliers' place, the clean
examples contaminated, the examples left out: each prompt shorter by as many as it has of them). Recovery is the slope
of f_edit − f on f_whole − f over prompts, f the prediction: 1 where the edit does all that the real change does, 0
where it does nothing.

Recovery says whether the edit acts as the real change, not whether that helps. The *share of the outliers' error that
is undone* says that, with one denominator for all edits (:func:`undone`).

Controls: as many random clean examples get the same edit; the outliers get their own mean; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import hooks
from analyses.attribute_outliers.prompts import Examples, Prompts, as_many, tokens_each, tokens_of
from analyses.attribute_outliers.rows import ENOUGH
from hooks.brief import brief
from hooks.errors import BadArgument
from hooks.inputs import fed
from interp import seeds
from interp.patch.knockout import between, has_taps, knock_out
from interp.stats import Interval, bootstrap, ratio
from interp.tasks.base import Batch, outputs

GATES = {"Δ": "hook_delta", "output gate": "hook_gate"}
ROLES = {"Δ, writing": "hook_delta_write", "Δ, forgetting": "hook_delta_decay"}
SIGNALS = {"Δ": ("hook_delta",), "output gate": ("hook_gate",), "x": ("hook_x",), "B and C": ("hook_B", "hook_C")}
NOTHING = "nothing (identity)"
FROM_TWINS = " of outliers := twin's"
Edits = Mapping[str, Any]


@dataclass(frozen=True)
class Intervention:
    """What is edited, and the prompts that its recovery is measured against."""

    name: str
    edits: Edits
    whole: Batch
    control: bool = False

    __repr__ = brief


def put(mask: Bool[Tensor, "batch pos"], value: Tensor) -> Callable[[Tensor], Tensor]:
    """The edit that puts ``value``, (pos, channel) or (batch, pos, …), at the positions in ``mask``, which may differ
    between prompts.
    """

    def change(tensor: Float[Tensor, "batch pos *channel"]) -> Tensor:
        chosen = mask.reshape(*mask.shape, *[1] * (tensor.ndim - 2)).to(tensor.device)
        return torch.where(chosen, value.to(tensor), tensor)

    return change


class Reference:
    """Means of Δ and of the output gate over the outliers and over the clean examples of other prompts."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        kinds = {name.rsplit(".", 1)[-1] for name in model.hook_dict}
        wanted = [f"*.{kind}" for kind in GATES.values() if kind in kinds]
        self.means: dict[str, dict[str, Tensor]] = {"outlier": {}, "clean": {}}
        if not wanted:
            return
        tokens = prompts.batch.tokens
        record = hooks.record(model, fed(model, tokens), wanted)
        parts = tokens_each(prompts.batch, prompts.context.shape[1])
        for which, examples in (("outlier", prompts.outlier), ("clean", prompts.context & ~prompts.outlier)):
            at = tokens_of(prompts.batch, examples)
            if bool(examples.any()):
                for site, value in record.items():
                    self.means[which][site] = _mean_by_part(value, at.to(value.device), parts)

    def of(self, which: str, kind: str) -> dict[str, Tensor]:
        """``{site: mean (pos, channel)}`` over the sites of one kind; both roles of Δ take the mean of Δ."""
        base = "hook_delta" if kind in ROLES.values() else kind
        found = self.means[which]
        return {site.removesuffix(base) + kind: mean for site, mean in found.items() if site.endswith(f".{base}")}


def interventions(model: Any, prompts: Prompts, reference: Reference, seed: int = 0) -> list[Intervention]:
    """Every edit that ``model`` has the sites for, controls last; none where the prompts have no outliers.

    Edits that need clean examples are left out where there are none.
    """
    outlier, clean = prompts.outlier, prompts.context & ~prompts.outlier
    if not bool(outlier.any()):
        return []
    found: list[Intervention] = []
    wholes = {"outlier": prompts.cleaned(outlier), "clean": prompts.contaminated(clean)}
    some = as_many(clean, outlier, seeds.generator("as many", seed))

    def gate(name: str, examples: Examples, source: str, kinds: tuple[str, ...], whole: str, control: bool) -> None:
        means = {site: mean for kind in kinds for site, mean in reference.of(source, kind).items()}
        if means and bool(examples.any()):
            at = tokens_of(prompts.batch, examples)
            edits = {site: put(at, mean) for site, mean in means.items()}
            found.append(Intervention(name, edits, wholes[whole], control))

    for label, kind in {**GATES, **ROLES}.items():
        gate(f"{label} of outliers := clean", outlier, "clean", (kind,), "outlier", False)
    gate("Δ and output gate of outliers := clean", outlier, "clean", tuple(GATES.values()), "outlier", False)
    for label, kind in GATES.items():
        gate(f"{label} of clean := outliers'", clean, "outlier", (kind,), "clean", False)
    found += _from_twins(model, prompts, wholes["outlier"])
    found += _knock_outs(model, prompts, outlier, "outliers", False)
    for label, kind in GATES.items():
        gate(f"{label} of as many clean := clean", some, "clean", (kind,), "outlier", True)
        gate(f"{label} of outliers := outliers'", outlier, "outlier", (kind,), "outlier", True)
    if bool(some.any()):
        found += _knock_outs(model, prompts, some, "as many clean", True)
    same = identity(model)
    return [*found, Intervention(NOTHING, same, wholes["outlier"], True)] if same else found


def identity(model: Any) -> dict[str, Any]:
    """Edits that return what they are given, wherever a gate or the scan is edited here."""
    touched = (*GATES.values(), *ROLES.values(), "hook_x_pre", "hook_y")
    return {name: torch.clone for name in model.hook_dict if name.rsplit(".", 1)[-1] in touched}


def lacking(model: Any) -> list[str]:
    """What these interventions cannot do on ``model``, one line each."""
    kinds = {name.rsplit(".", 1)[-1] for name in model.hook_dict}
    lines = [f"no {site}: {label} cannot be exchanged" for label, site in GATES.items() if site not in kinds]
    if "hook_write" not in kinds:
        lines.append("no hook_decay, hook_write, hook_state: there is no scan to knock a token out of")
    elif "hook_x_pre" not in kinds:
        lines.append("no hook_x_pre: there are no taps to knock a token out of")
    return lines


def undefined(prompts: Prompts) -> list[str]:
    """What these interventions cannot do on these prompts, whatever the model, one line each."""
    outlier, clean = prompts.outlier, prompts.context & ~prompts.outlier
    if not bool(outlier.any()):
        return []
    if not bool(clean.any()):
        return ["these prompts have no clean examples: there is no mean to put at outliers, and no control of as many"]
    fewer = int((clean.sum(1) < outlier.sum(1)).sum())
    if not fewer:
        return []
    return [f"as many clean: {fewer} of {len(outlier)} prompts have fewer than outliers, and all of theirs are edited"]


def undone(after: Float[Tensor, "n"], before: Float[Tensor, "n"], clean: Float[Tensor, "n"]) -> Interval:
    """The share of the error that outliers cause which an edit undoes, by the errors of the same prompts.

        Σ (e_before − e_after) / Σ (e_before − e_clean)

    over prompts, ``clean`` those with their outliers replaced by their twins: in regression the examples drawn in their
    place, with the prompt's own w; where only inputs are contaminated the twins keep the label, a wrong one too. 1
    where the edit is as good as clean examples, 0 where it does nothing, negative where it does harm. Examples
    that are gone do not become clean ones: what the real prompt without the outliers undoes is as far as a knock-out
    can be expected to come.

    Raises :class:`BadArgument` where outliers cause no error that can be told from 0, the interval of the sum below the
    line holding 0, or cause it in fewer than ``ENOUGH`` prompts.
    """
    cost = bootstrap(before - clean)
    if float(cost.low) <= 0:
        seen = f"{float(cost.mean):.3g} [{float(cost.low):.3g}, {float(cost.high):.3g}]"
        raise BadArgument(f"outliers raise the error by {seen}, not surely above 0: there is nothing to undo")
    if (some := int((before != clean).sum())) < ENOUGH:
        raise BadArgument(f"outliers change the error of {some} prompts, and at least {ENOUGH} are needed")
    return ratio(before - after, before - clean)


def run(model: Any, batch: Batch, edits: Edits | None = None) -> Float[Tensor, "batch"]:
    """The prediction at the query of every prompt, under these edits."""
    if edits is None:
        return _predict(model, batch)
    with hooks.edit(model, edits):
        return _predict(model, batch)


def _predict(model: Any, batch: Batch) -> Float[Tensor, "batch"]:
    # All prompts in one forward: the masks are those of the whole batch.
    with torch.no_grad():
        said = outputs(model, fed(model, batch.tokens), 1)[..., 0].cpu()
    return said.gather(1, batch.read[..., -1:].cpu().expand(len(said), 1))[:, 0]


def _from_twins(model: Any, prompts: Prompts, twins: Batch) -> list[Intervention]:
    """The outliers' own values as they are in the run on ``twins``, one kind of site at a time and all together."""
    kinds = {name.rsplit(".", 1)[-1] for name in model.hook_dict}
    have = {label: group for label, group in SIGNALS.items() if kinds.issuperset(group)}
    if not have:
        return []
    sites = [f"*.{kind}" for group in have.values() for kind in group]
    own, theirs = (hooks.record(model, fed(model, one.tokens), sites) for one in (prompts.batch, twins))
    at = tokens_of(prompts.batch, prompts.outlier)

    def exchanged(labels: Collection[str]) -> dict[str, Any]:
        kinds = {kind for label in labels for kind in have[label]}
        return {site: put(at, (theirs if site.rsplit(".", 1)[-1] in kinds else own)[site]) for site in own}

    groups = {label: (label,) for label in have} | ({", ".join(have): tuple(have)} if len(have) > 1 else {})
    return [Intervention(f"{name}{FROM_TWINS}", exchanged(labels), twins) for name, labels in groups.items()]


def _knock_outs(model: Any, prompts: Prompts, examples: Examples, label: str, control: bool) -> list[Intervention]:
    kinds = {name.rsplit(".", 1)[-1] for name in model.hook_dict}
    if "hook_write" not in kinds:
        return []
    at = tokens_of(prompts.batch, examples)
    pairs = between(at, torch.ones_like(at), at.shape[1])
    whole = prompts.without(examples)
    ways: dict[str, tuple[str, ...]] = {"the scan": ("scan",)}
    if has_taps(model) and "hook_x_pre" in kinds:
        ways |= {"the taps": ("taps",), "both": ("scan", "taps")}
    found = [
        Intervention(f"{label} out of {way}", knock_out(model, pairs, inside=inside), whole, control)
        for way, inside in ways.items()
    ]
    if "hook_delta" in kinds:
        frozen: dict[str, Any] = {}
        for site in hooks.resolve(model, "*.hook_delta"):
            frozen[site] = put(at, torch.zeros(1, 1, device="cpu"))
        taps = knock_out(model, pairs, inside="taps") if "the taps" in ways else {}
        name = f"{label} frozen" + (", out of the taps" if taps else "")
        found.append(Intervention(name, {**frozen, **taps}, whole, control))
    return found


def _mean_by_part(value: Tensor, at: Tensor, parts: int) -> Float[Tensor, "pos channel"]:
    """The mean over the chosen tokens, apart for the tokens of one example where each has several."""
    means = torch.zeros(value.shape[1], value.shape[2], dtype=value.dtype, device=value.device)
    for part in range(parts):
        here = at.clone()
        here[:, [t for t in range(value.shape[1]) if t % parts != part]] = False
        means[part::parts] = value[here].mean(0) if bool(here.any()) else 0
    return means
