"""The figure of an ablation of Δ, drawn from its result alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analyses.ablate_delta import RIVALS
from interp import plot as draw
from interp.plot import called
from interp.variance import LEVELS, STATIC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.result import Result


def figure(result: Result) -> Figure:
    """Error against k for each mode, and for each factor; the change by layer and mode; shares of log Δ's variance."""
    arrays, config = result.arrays, result.config
    k, floor = arrays["k"], 1e-5
    named = {str(name): curve for name, curve in zip(arrays["curve_names"], arrays["curves"], strict=True)}
    own = f"{config['model']}|delta|"
    modes = [name.removeprefix(own) for name in named if name.startswith(own)]
    swept = [mode for mode in modes if mode.startswith("scale×")]
    whole, panels = draw.canvas((1.4, *([0.85] if swept else []), 1.35, 0.75), height=4.8, width=14.5)
    left, middle, right = panels[0], *panels[-2:]

    lines = {"Δ as it is": f"{config['model']}||clean"}
    lines |= {mode + _left_in_taps(mode, arrays): own + mode for mode in modes if mode not in swept}
    lines["all-mean (Δ, B, C)"] = f"{config['model']}|delta,B,C|all-mean"
    lines |= {f"{stem} (own training)": f"{stem}-{config['task']}||clean" for stem in RIVALS}
    scaled = {"Δ as it is": f"{config['model']}||clean"} | {mode.replace("scale", "Δ "): own + mode for mode in swept}
    for panel, drawn in ((left, lines), (panels[1], scaled))[: 2 if swept else 1]:
        draw.curves(panel, k, {label: tuple(named[key]) for label, key in drawn.items() if key in named}, floor=floor)
        draw.baseline(panel, k, named["ols||clean"][0], "least squares")
        panel.set_xlabel("examples seen, k")
        # On a ground of its own: the line of least squares falls through it.
        ground = {"framealpha": 0.85, "edgecolor": "none"}
        panel.legend(fontsize=6.5, ncols=2 if panel is left else 1, loc="lower left", **ground)
    left.set_ylabel("squared error ÷ E[y²]")

    value, low, high = arrays["map"]
    draw.heat_map(
        middle,
        value,
        list(arrays["map_layers"]),
        list(arrays["map_modes"]),
        label=f"change of error at k = {int(arrays['map_k'])}",
        unsure=(low <= 0) & (high >= 0),
    )
    middle.set_ylabel("edited layer")

    both = dict(zip(LEVELS, map(tuple, arrays["shares"].T.tolist()), strict=True))
    moving = dict(zip(LEVELS[len(STATIC) :], map(tuple, arrays["moving"].T.tolist()), strict=True))
    draw.shares(right, {"all": both, "without\nstatic part": moving}, LEVELS, label="share of the variance of log Δ")
    whole.suptitle(_title(result, named), fontsize=11)
    whole.supxlabel(
        f"n = {config['prompts']} prompts, {config['reference']} others for the means; bands and brackets: 95 % "
        "bootstrap over prompts; grey italics: the interval holds 0",
        fontsize=7.5,
        color="0.35",
    )
    return draw.settle(whole)


def _left_in_taps(mode: str, arrays: Mapping[str, Any]) -> str:
    """For a frozen kind of token: its share in the others' convolution output, over the layers."""
    kinds = [str(kind) for kind in arrays.get("tap_share_kinds", ())]
    kind = mode.removeprefix("freeze:")
    if kind == mode or kind not in kinds:
        return ""
    share = 100 * arrays["tap_share"][kinds.index(kind), 0]
    return f" ({share.min():.0f}–{share.max():.0f} % left in taps)"


def _title(result: Result, named: Mapping[str, Any]) -> str:
    """The sentence that the figure supports, made from its numbers."""
    model, k = result.config["model"], int(result.arrays["map_k"])
    name = called(model)
    clean = named[f"{model}||clean"][:, k]
    key = next((key for key in (f"{model}|delta|mean", f"{model}|delta|position-mean") if key in named), None)
    if key is None:
        return f"{name}: error {clean[0]:.3g} after {k} examples"
    fixed = named[key][:, k]
    what = "one fixed step per channel" if key.endswith("|mean") else "a step that ignores content"
    verdict = "costs" if fixed[1] > clean[2] else "does not clearly change"
    if verdict != "costs":
        return f"{name}: {what} in place of Δ does not clearly change the error after {k} examples"
    return (
        f"{name}: {what} in place of Δ takes the error after {k} examples from {clean[0]:.2g} "
        f"[{clean[1]:.2g}, {clean[2]:.2g}] to {fixed[0]:.2g} [{fixed[1]:.2g}, {fixed[2]:.2g}]"
    )
