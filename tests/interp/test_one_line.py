"""Whatever is put into a public verb: a result, or one short line of our family without the numbers put in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hooks.errors import LONGEST, BadArgument
from interp.arguments import whole_number
from tests.interp.verbs import batches

pytestmark = pytest.mark.contract


@pytest.mark.slow
def test_no_value_brings_more_than_one_short_line(tmp_path: Path) -> None:
    out, root = tmp_path / "faults.json", Path(__file__).resolve().parents[2]
    # A program of its own: the checks of signatures that the tests run under would answer before the verbs do.
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(
        [sys.executable, "-m", "tests.interp.hostile", str(out)], cwd=root, env=environment, check=True, timeout=300
    )
    assert json.loads(out.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text", ["x" * 10_000, "a\nb\n" * 5_000, f"asked {torch.zeros(9000)} try this"], ids=["long", "lines", "a tensor"]
)
def test_the_family_itself_keeps_to_one_line(text: str) -> None:
    message = str(BadArgument(text))
    assert "\n" not in message and len(message) <= LONGEST
    assert message.endswith(" ".join(text.split())[-20:])  # what to try stands at the end


def test_a_batch_in_the_place_of_a_number_is_told_in_a_few_words() -> None:
    with pytest.raises(BadArgument, match=r"^n=a Batch does not work; give a whole number, at least 1$"):
        whole_number("n", batches()[0], least=1)
