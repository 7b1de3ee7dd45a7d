"""A figure's files are what matplotlib's own ``savefig`` writes, though each is drawn once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from interp import plot


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
