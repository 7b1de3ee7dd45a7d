"""The figure of feature learning, drawn from its result alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from interp import plot as draw
from interp.plot import called

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.result import Result


def figure(result: Result) -> Figure:
    """Error against k; the variants' errors; β read by k; the variants' reading; the label transform, its degrees."""
    arrays, config = result.arrays, result.config
    target, degree = str(arrays["target"]), int(arrays["order"])
    first, last = arrays["last_window"]
    whole, panels = draw.grid([(1.25, 0.9, 0.9), (1.0, 1.0, 1.1)], heights=(3.9, 3.7), width=14.5)
    error, changed, changed_read, reads, curve, degrees = panels

    lines = {
        _line(who, how): arrays["error"][i]
        for i, (who, how) in enumerate(zip(arrays["who"], arrays["how"], strict=True))
    }
    floor = 0.5 * min(float(one[0][1:].min()) for name, one in lines.items())
    shown = {name: tuple(one) for name, one in lines.items() if name}
    draw.curves(error, 1 + arrays["window"], shown, floor=max(floor, 1e-4))
    draw.baseline(error, 1 + arrays["window"], np.ones(len(arrays["window"])), "predict 0")
    error.set_xscale("log", base=2)
    error.set_xlabel("pairs seen + 1 (windows)")
    error.set_ylabel("error ÷ that of 0 on the same queries")
    error.legend(frameon=False, fontsize=7, loc="lower left")

    names = [str(name) for name in arrays["variants"]]
    level = float(arrays["error"][0, 0, -1])
    for panel, key, zero in (
        (changed, "change_error", level),
        (changed_read, "change_read", float(arrays["read_trained"][0, -1])),
    ):
        groups = {how: tuple(arrays[key][:, i].T) for i, how in enumerate(("only ablated", "retrained"))}
        draw.dots(panel, names, {how: ends for how, ends in groups.items() if np.isfinite(ends[0]).any()})
        panel.axvline(zero, color="0.45", linewidth=1.2, linestyle="--", zorder=0, label="as trained")
        panel.legend(
            frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1
        )
    seen = arrays["change_error"][np.isfinite(arrays["change_error"])]
    if seen.max(initial=level) > 4 * seen.min(initial=level):
        changed.set_xscale("log")
    changed.set_xlabel(f"error at k = {first}…{last} ÷ that of 0")
    changed_read.set_xlabel(f"R² of {target} at k = {arrays['ks'][-1]}, best layer")

    ks = arrays["ks"]
    draw.curves(
        reads, ks, {"trained": tuple(arrays["read_trained"]), "untrained": tuple(arrays["read_untrained"])}, floor=None
    )
    kept = {"shuffled": ("shuffled", 3), "linear": ("Σ y φ(x)", 0), "bent": ("Σ (y, y², tanh y) φ(x)", 1)}
    for key, (name, style) in kept.items():
        draw.baseline(reads, ks, arrays[f"read_{key}"][0], name, style=style)
    reads.set_xscale("log", base=2)
    reads.set_xticks(ks, [str(k) for k in ks])
    reads.set_ylim(-0.15, 1.45)  # room for the legend
    reads.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    reads.set_xlabel("pairs seen, k")
    reads.set_ylabel(f"R² of {target} from the state, best layer")
    reads.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)

    named = {"write": "write", "held": "write, Δ at its mean", "untrained": "write, untrained"}
    have = {key: name for key, name in named.items() if f"curve_{key}" in arrays}
    draw.curves(curve, arrays["label"], {name: tuple(arrays[f"curve_{key}"]) for key, name in have.items()}, floor=None)
    middle, root = arrays["label_line"]
    draw.baseline(curve, arrays["label"], (arrays["label"] - middle) / root, "the label itself")
    curve.set_xlabel("label y")
    curve.set_ylabel("t(y) of layer 0, root mean square 1")
    curve.legend(frameon=False, fontsize=7, loc="best")

    every = range(1, arrays["coefficient_write"].shape[1])
    bars = {name: tuple(arrays[f"coefficient_{key}"][:, 1:]) for key, name in have.items()}
    own = arrays["coefficient_label"][1:]
    draw.bars(degrees, [str(k) for k in every], {**bars, "the label itself": (own, own, own)})
    degrees.set_xlabel(f"Hermite degree in ⟨β, x⟩ ({degree} finds {target})")
    degrees.set_ylabel("coefficient of t(y), layer 0")
    degrees.legend(frameon=False, fontsize=7, loc="best")

    whole.suptitle(_title(result), fontsize=10.5)
    whole.supxlabel(
        f"n = {config['prompts']} prompts (errors), {2 * config['prompts']} others (probes; a quarter judges), "
        f"{max(16, config['prompts'] // 4)} others (e, f: half chooses the entries, half is shown); bands and lines: "
        "95 % bootstrap over prompts",
        fontsize=7.5,
        color="0.35",
    )
    return draw.settle(whole)


def _line(who: str, how: str) -> str:
    """What panel a calls a line; empty where it has no place in it."""
    return {"trained": "the model", "untrained": "", "ablated": "", "retrained": "", "rival": who}[how]


def _title(result: Result) -> str:
    """The sentences that the figure supports, made from its numbers."""
    arrays = result.arrays
    target, degree = str(arrays["target"]), int(arrays["order"])
    error = {
        (str(w), str(h)): arrays["error"][i][:, -1]
        for i, (w, h) in enumerate(zip(arrays["who"], arrays["how"], strict=True))
    }
    name = called(result.config["model"])
    kernel = min((error[f"kernel ridge, {kind}", "rival"] for kind in ("RBF", "polynomial")), key=lambda ends: ends[0])
    told = error["kernel ridge, told the subspace", "rival"]
    read, fresh, layer = arrays["read_trained"][:, -1], arrays["read_untrained"][0, -1], int(arrays["layers"][-1])
    own, first = error["published block", "trained"], arrays["last_window"][0]
    text = (
        f"From {first} pairs on {name} leaves {_said(own)} of the error of 0, kernel ridge {_said(kernel)}, told the "
        f"subspace {_said(told)};\n{target} is read from layer {layer}'s state with R² {_said(read)}, untrained "
        f"{fresh:.2f}"
    )
    words = {"write": "{}", "held": "with Δ at its mean {}", "untrained": "untrained {}"}
    parts = [
        word.format(_said(arrays[f"coefficient_{key}"][:, degree]))
        for key, word in words.items()
        if f"coefficient_{key}" in arrays
    ]
    if parts:
        text += f";\ncoefficient of degree {degree} of layer 0's label transform: " + ", ".join(parts)
    for i, how in enumerate(("only ablated", "retrained")):
        ends = arrays["change_error"][:, i]
        said = [
            f"{variant} {_said(one)}" for variant, one in zip(arrays["variants"], ends, strict=True) if one[0] == one[0]
        ]
        if said:
            text += f";\n{how}, the error is " + ", ".join(said)
    return text


def _said(ends: np.ndarray) -> str:
    """A number with its interval, to a thousandth where it is not smaller."""
    return "{} [{}, {}]".format(
        *(f"{end:.3f}".rstrip("0").rstrip(".") if abs(end) >= 0.05 else f"{end:.2g}" for end in ends)
    )
