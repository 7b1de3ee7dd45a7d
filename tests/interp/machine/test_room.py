"""What a run takes is counted before it starts: the number that fits is the largest that does."""

from __future__ import annotations

import pytest
import torch

import models
from hooks.errors import TooLarge
from hooks.memory import human
from interp import tasks
from interp.machine import room
from interp.machine.room import Held, Part

pytestmark = pytest.mark.law

GB = 10**9


@pytest.fixture(autouse=True)
def ten_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 10 * GB)


@pytest.mark.parametrize("pair", [0.0, 0.5, 1000.0])
@pytest.mark.parametrize("each", [1.0, 1e6])
def test_what_fits_fits_and_one_more_does_not(each: float, pair: float) -> None:
    fits = Part("prompts", 1, each, pair).fits(5e9)
    assert Part("prompts", fits, each, pair).size <= 5e9 < Part("prompts", fits + 1, each, pair).size
    assert Part("prompts", 1, each, pair).fits(0.0) == 0


def test_too_many_are_refused_with_the_number_that_fits() -> None:
    few = Part("reference", 100, 1e6)
    with pytest.raises(
        TooLarge, match=r"--prompts 1000000000 would take about 1e\+03 TB .*: about (\d+) fit"
    ) as refused:
        room.check(Part("prompts", 10**9, 1e6), few)
    fits = int(str(refused.value).split()[-2])
    assert "\n" not in str(refused.value) and human(10 * GB) in str(refused.value)
    need = room.check(Part("prompts", fits, 1e6), few)
    assert need == room.LIBRARIES + (fits + 100) * 1e6 <= 10 * GB
    with pytest.raises(TooLarge):
        room.check(Part("prompts", fits + 1, 1e6), few)


def test_the_largest_part_is_named() -> None:
    with pytest.raises(TooLarge, match="--reference 1000000 "):
        room.check(Part("prompts", 10, 1e6), Part("reference", 10**6, 1e6))
    with pytest.raises(TooLarge, match="smaller model"):
        room.check(Part("prompts", 10, 1.0, fixed=2e10))


def test_a_device_that_has_less_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: GB if device.type == "cuda" else 10 * GB)
    part = Part("prompts", 1000, 2e6)
    room.check(part)
    with pytest.raises(TooLarge, match="about 425 fit"):
        room.check(part, device="cuda")


def test_the_units_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a linear regression: tokens 41 × 6, x and y of 21, and so on; twice the model is twice its sites."""
    task = tasks.build("linreg", d=5, n_pairs=21)
    model = models.build("mamba", d_in=task.d_token, d_out=1, d_model=8, n_layers=2, d_state=4)
    batch = task.sample(64, torch.Generator())
    own = [batch.tokens, batch.targets, batch.read, batch.kinds, batch.x, batch.y, *batch.truth.values()]
    monkeypatch.setitem(room.HELD, "example", Held(own=1.0))
    each = room.prompts("example", "prompts", 3, task, [model]).each
    assert each == pytest.approx(sum(one.numel() * one.element_size() for one in own) / 64, rel=0.1)
    monkeypatch.setitem(room.HELD, "example", Held(sites=1.0, pair=7.0))
    one, two = (room.prompts("example", "prompts", 3, task, [model] * count) for count in (1, 2))
    record = [
        value
        for name, value in model.run_with_cache(batch.tokens[:1])[1].items()
        if name.rsplit(".", 1)[-1] not in room.SCAN
    ]
    assert one.each == sum(value.numel() * value.element_size() for value in record)
    assert two.each == 2 * one.each and one.pair == 14.0
