"""Figures: files as ``savefig`` writes them, curves where they are, and a session's matplotlib left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from interp import plot

ROOT = Path(__file__).resolve().parents[2]


def figure() -> Figure:
    made, panels = plot.canvas([1.0, 2.0], 2.0, 5.0)
    for axes in panels:
        axes.plot(np.geomspace(1, 1e4, 9), label="a long name")
        axes.set_yscale("log")
        axes.set_ylabel("error")
    plot.beside(made, panels)
    return made


@pytest.mark.law
def test_the_files_are_those_of_savefig(tmp_path: Path) -> None:
    theirs, ours = figure(), figure()
    theirs.savefig(tmp_path / "theirs.png", dpi=200)
    plot.png(ours, tmp_path / "ours.png")
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()
    assert ours.dpi == figure().dpi
    places = [axes.get_position().bounds for axes in ours.axes]
    plot.svg(ours, tmp_path / "ours.svg")
    text = (tmp_path / "ours.svg").read_text(encoding="utf-8")
    assert "a long name</text>" in text and "date" not in text  # letters stay letters
    assert [axes.get_position().bounds for axes in ours.axes] == places
    assert f'width="{5 * 72}pt" height="{2 * 72}pt"' in text


@pytest.mark.law
def test_an_svg_alone_has_its_layout_too(tmp_path: Path) -> None:
    theirs, ours = figure(), figure()
    theirs.savefig(tmp_path / "theirs.svg", metadata={"Date": None})
    plot.svg(ours, tmp_path / "ours.svg")
    for one, other in zip(ours.axes, theirs.axes, strict=True):
        np.testing.assert_allclose(one.get_position().bounds, other.get_position().bounds, atol=0.01)


# --- what lies outside a panel ----------------------------------------------------------------


def drawn(axes: Axes) -> dict[str, np.ndarray]:
    """The y of every named curve of a panel."""
    return {str(line.get_label()): np.asarray(line.get_ydata(orig=True)) for line in axes.lines}


def written(axes: Axes) -> str:
    return " ".join([*(text.get_text() for text in axes.texts), axes.get_xlabel()]).replace("\n", " ")


def ends(mean: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    value = np.array(mean)
    return value, 0.9 * value, 1.1 * value


@pytest.mark.planted
def test_curves_are_drawn_where_they_are() -> None:
    _, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    lines = {"high": [0.5, 0.4, 0.3], "falls": [0.5, 1e-9, 0.0], "dips": [0.5, 1e-7, 0.4]}
    plot.curves(axes, np.arange(3), {name: ends(line) for name, line in lines.items()}, floor=1e-3)
    plot.baseline(axes, np.arange(3), np.array([2e-15, 2e-15, 2e-15]), "exact")
    for name, line in lines.items():
        np.testing.assert_array_equal(drawn(axes)[name], line)
    np.testing.assert_array_equal(drawn(axes)["exact"], 2e-15)
    assert axes.get_ylim()[0] == 1e-3
    before = len(axes.lines)
    assert plot.mark_outside(axes) == ["below: falls 0 to 1e-09, exact 2e-15"]
    marks = axes.lines[before:]
    assert [list(mark.get_xdata()) for mark in marks] == [[pytest.approx(x)] for x in inside(axes, [1, 1, 0])]
    assert written(axes).strip() == "below: falls 0 to 1e-09, exact 2e-15"


def inside(axes: Axes, xs: list[float]) -> list[float]:
    """x as a share of the panel."""
    low, high = axes.get_xlim()
    return [(x - low) / (high - low) for x in xs]


@pytest.mark.planted
def test_a_family_below_its_floor_leaves_the_panel() -> None:
    _, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    line = np.array([[0.5, 0.4, 0.6], [1e-5, 1e-6, 1e-4], [1e-6, 1e-7, 1e-5]])
    plot.families(axes, {"mamba": {"left": (np.arange(3), line)}}, floor=1e-3)
    np.testing.assert_array_equal(drawn(axes)["_mamba left"], line[:, 0])
    assert axes.get_ylim()[0] == 1e-3
    assert plot.mark_outside(axes) == ["below: mamba left 1e-06 to 1e-05"]
    _, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    plot.families(axes, {"mamba": {"left": (np.arange(1), line[:1])}}, floor=1e-3)
    assert plot.mark_outside(axes) == []


@pytest.mark.planted
def test_dots_outside_are_named_on_each_side() -> None:
    _, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    plot.dots(axes, ["a", "b"], {"ours": ends([0.5, 2e-9]), "theirs": ends([0.4, 30.0])})
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 1.0)
    assert plot.mark_outside(axes) == ["left of it: ours 2e-09", "right of it: theirs 30"]


@pytest.mark.planted
def test_nothing_is_said_of_a_panel_that_holds_everything() -> None:
    _, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    axes.plot([1, 2, 3], [0.0, 1.75, -1.75], label="a")  # limits that are not yet found from the data
    plot.baseline(axes, np.arange(3), np.array([np.nan, 1.0, np.inf]), "b")
    axes.axhline(1e9, label="c")
    assert plot.mark_outside(axes) == []


@dataclass
class Line:
    who: str
    kind: str
    levels: np.ndarray
    ks: np.ndarray = field(default_factory=lambda: np.arange(4.0))


@pytest.mark.planted
def test_a_rival_below_the_models_is_no_line_on_the_floor() -> None:
    """Three rivals below half of the best model's error: one is near, one exact, one above 0 for some k only."""
    lines = [
        Line("model", "model", np.stack(ends([0.9, 0.6, 0.5, 0.42]))),
        Line("ridge", "rival", np.stack(ends([0.9, 0.1, 0.028, 0.028]))),
        Line("averaging", "rival", np.stack(ends([0.19, 0.19, 0.19, 0.19]))),
        Line("ols", "rival", np.stack(ends([1.0, 0.5, 2e-15, 2e-15]))),
        Line("oracle", "rival", np.zeros((3, 4))),
    ]
    order = {"model": ["model"], "rival": ["ridge", "averaging", "ols", "oracle"]}
    _, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    plot.learning(axes, lines, order, log=True)
    shown = drawn(axes)
    for line in lines:
        np.testing.assert_array_equal(shown[line.who], line.levels[0])
    assert 0.01 < axes.get_ylim()[0] < 0.028
    assert plot.mark_outside(axes) == ["below: ols 2e-15, oracle 0"]


@pytest.mark.planted
def test_zero_is_no_smallest_value_of_a_map() -> None:
    figure, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    plot.level_map(axes, np.array([[0.0, 1e-3, 1.0]]), ["a"], label="error")
    (image,) = axes.images
    zero, least, _ = image.cmap(image.norm(image.get_array()))[0]
    assert tuple(zero) == (0, 0, 0, 1)
    assert tuple(least) != tuple(zero)
    assert float(np.asarray(image.get_array())[0, 1]) == 1e-3
    assert len(figure.axes) == 2


@pytest.mark.planted
def test_a_share_below_zero_is_said_and_not_stacked() -> None:
    _, (axes,) = plot.canvas([1.0], 2.0, 5.0)
    parts = {"layer": (-0.1, -0.2, 0.0), "channel": (0.8, 0.7, 0.9), "content": (0.3, 0.2, 0.4)}
    plot.shares(axes, {"all": parts}, ["layer", "channel", "content"], label="share")
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.8, 0.3])
    assert axes.get_ylim() == (0, pytest.approx(1.1))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["all\nlayer -0.10"]


# --- the session's matplotlib -----------------------------------------------------------------

DRAWN = """
import numpy as np, pandas as pd
from analyses import learning_curves
from interp import plot
from interp.machine.progress import progress
from interp.result import Result

with progress(1, "work") as tick:
    tick()
arrays = dict(settings=["a"], prompts=[8], trained=[-1], metric="error", who_0=["m"], kind_0=["model"], n_0=[8])
arrays["line_0_0"] = np.array([[0., 1., 2.], [1., .5, .1], [.9, .4, .05], [1.1, .6, .2]])
result = Result(dict(task="t", models=["m"]), pd.DataFrame(dict(k=[1])), {k: np.array(v) for k, v in arrays.items()})
result = Result.load(result.save(folder, analysis="learning_curves").folder)
figure = learning_curves.plot(result)
plot.png(figure, folder / "figure.png")
plot.svg(figure, folder / "figure.svg")
figure.savefig(folder / "saved.png", dpi=200, facecolor="white")
"""
STYLED = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
import matplotlib
import matplotlib.pyplot as pyplot

def settings():
    return dict(dict.items(matplotlib.rcParams)), [matplotlib.colors.to_rgb(code) for code in "bgrk"]

pyplot.style.use("dark_background")
matplotlib.rcParams.update({"text.usetex": True, "font.size": 25, "axes.spines.left": False})
before = settings()
exec(sys.argv[2])
import interp.plot.backend, captum.attr
after = settings()
assert after == before, [name for name in before[0] if before[0][name] != after[0][name]]
"""
UNKNOWN = """
import os, sys
from interp import plot
assert os.environ["MPLBACKEND"] == "inline_", "the process's own setting stays"
figure, (axes,) = plot.canvas([1.0], 2.0, 2.0)
plot.png(figure, sys.argv[1] + "/figure.png")
"""


def started(backend: str, code: str, *arguments: str) -> None:
    env = {**os.environ, "MPLBACKEND": backend}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.hygiene
@pytest.mark.slow
def test_figures_and_progress_leave_the_sessions_settings(tmp_path: Path) -> None:
    """Whatever they are, and with a back end that is not installed: the figures are equal, to the byte."""
    plain, styled = tmp_path / "plain", tmp_path / "styled"
    plain.mkdir()
    exec(DRAWN, {"folder": plain})
    started("module://not_installed", STYLED, str(styled), DRAWN)
    for file in ("figure.png", "figure.svg", "saved.png"):
        assert (styled / file).read_bytes() == (plain / file).read_bytes(), file


@pytest.mark.hygiene
@pytest.mark.slow
def test_a_back_end_that_matplotlib_does_not_know(tmp_path: Path) -> None:
    started("inline_", UNKNOWN, str(tmp_path))
    assert (tmp_path / "figure.png").exists()


@pytest.mark.law
@pytest.mark.parametrize("zero", [False, True])
def test_only_a_zero_is_black_in_a_map(zero: bool) -> None:
    """In the pixels that are drawn: the smallest value was black too, by rounding."""
    smallest, largest = 0.0016040253, 1.4106169  # of a map of mamba-linreg
    values = np.geomspace(smallest, largest, 9 * 42).reshape(9, 42).astype(np.float32)
    if zero:
        values[4, 22] = 0.0
    made, (axes,) = plot.canvas([5.0], 3.0, 5.0)
    plot.level_map(axes, values, [str(i) for i in range(9)], label="error")
    axes.set_axis_off()
    canvas = FigureCanvasAgg(made)
    canvas.draw()
    left, low, right, high = (round(edge) for edge in axes.get_window_extent().extents)
    pixels = np.asarray(canvas.buffer_rgba())[::-1][low + 2 : high - 2, left + 2 : right - 2, :3]
    share = float((pixels.sum(-1) == 0).mean())
    assert share == pytest.approx(1 / values.size, rel=0.3) if zero else share == 0
