"""Arguments are refused in one line that says what was given and what there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analyses.ablate_delta import effects
from analyses.learning_curves import errors as curves
from hooks.errors import BadArgument
from interp import rivals, seeds, tasks
from interp.arguments import between, known_options, listed, one_of, usable_device, whole_number
from interp.training.recipe import TrainConfig

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [(0, 1, None), (2.0, 1, None), ("3", 1, None), (True, 0, 5), (6, 0, 5)],
)
def test_what_is_no_number_of_things_is_refused(value: object, least: int, most: int | None) -> None:
    with pytest.raises(BadArgument, match=f"d={value!r} does not work") as refused:
        whole_number("d", value, least, most)
    assert f"{least}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_whole_number_in_range_is_given_back() -> None:
    assert [whole_number("d", value, 1, 3) for value in (1, 2, 3)] == [1, 2, 3]
    assert whole_number("d", 10**6, 1) == 10**6


HUGE = 999999999999999999999999999999


@pytest.mark.parametrize("value", [HUGE, int("9" * 4200), 2**31])
def test_more_than_any_tensor_holds_is_refused_in_a_short_line(value: int) -> None:
    with pytest.raises(
        BadArgument, match=r"d=\d.* does not work; give a whole number, from 1 to 2147483647"
    ) as refused:
        whole_number("d", value, 1)
    assert len(str(refused.value)) < 150
    assert whole_number("d", 2**31 - 1, 1) == 2**31 - 1


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -1, True, "1"])
def test_what_is_no_number_between_is_refused(value: object) -> None:
    with pytest.raises(BadArgument, match=r"noise=.* does not work; give a number of at least 0") as refused:
        between("noise", value, 0.0)
    assert len(str(refused.value)) < 150
    assert between("noise", 10**300, 0.0) == 1e300


@pytest.mark.parametrize("name", tasks.names())
def test_every_number_of_every_task_refuses_what_is_too_large(name: str) -> None:
    config = tasks.build(name).config
    whole = [key for key, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]
    assert whole
    for key in whole:
        with pytest.raises(BadArgument):
            tasks.build(name, **{key: HUGE})


@pytest.mark.parametrize("seed", [-1, HUGE])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(BadArgument, match=r"seed=.* does not work"):
        seeds.number("probe", seed)
    assert seeds.number("probe", 2**63 - 1) >= 0


def test_a_recipe_refuses_more_steps_than_it_could_take() -> None:
    with pytest.raises(BadArgument, match=f"steps is {HUGE}; it must be a whole number from 1 to 2147483647"):
        TrainConfig("linreg", "mamba", steps=HUGE)


def test_one_of_names_the_nearest() -> None:
    assert one_of("tokens", "joint", ("interleaved", "joint")) == "joint"
    with pytest.raises(BadArgument, match='"jiont"; did you mean "joint"'):
        one_of("tokens", "jiont", ("interleaved", "joint"))
    with pytest.raises(BadArgument, match=r'"3"; .*there is: interleaved, joint'):
        one_of("tokens", 3, ("interleaved", "joint"))


def test_known_options_are_the_parameters_of_the_function() -> None:
    def make(width: int, depth: int = 2) -> int:
        return width * depth

    known_options("thing", make, {"width": 1, "depth": 2})
    with pytest.raises(BadArgument, match='option of thing is called "widht"; did you mean "width"'):
        known_options("thing", make, {"widht": 1})
    with pytest.raises(BadArgument, match="there is: width, depth"):
        known_options("thing", make, {"colour": 1})


def test_a_text_is_one_name_wherever_several_are_taken() -> None:
    """Of every command's configuration too, in a notebook (where no types are checked); on a command line it is one."""
    assert listed("n", "abc") == ["abc"] == listed("n", ["abc"])
    assert listed("n", ("a", "b")) == ["a", "b"] and listed("n", ()) == []
    with pytest.raises(BadArgument, match="names=a dict of 1 does not work; give one or a list"):
        listed("names", {"a": torch.zeros(3)})
    done = subprocess.run([sys.executable, "-c", CONFIGS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 15, done.stderr


CONFIGS = """
import dataclasses, importlib
from analyses import __main__ as listing
seen = 0
for name in listing.questions():
    config = importlib.import_module(f"analyses.{name}").Config
    needed = {field.name: "zoo" for field in dataclasses.fields(config) if field.default is dataclasses.MISSING}
    for field in dataclasses.fields(config):
        if field.type.startswith("tuple["):
            for given in ("mamba-linreg", ["mamba-linreg"], ("mamba-linreg",)):
                assert getattr(config(**needed, **{field.name: given}), field.name) == ("mamba-linreg",), field
            seen += 1
print(seen)
"""


def test_one_text_is_taken_by_what_walks_over_names() -> None:
    task = tasks.build("linreg", d=2, n_pairs=4)
    assert [rival.name for rival in rivals.build(task, "ols")] == ["ols"]
    assert [one.name for one in curves.settings(task, "label_noise", 1, 8)[0]] == ["as trained", "label_noise"]
    assert curves.settings(task, "none", 1, 8)[0][1:] == []
    assert effects.modes_of("x", (0.5,))[-2:] == ["freeze:x", "scale×0.5"]


def test_a_device_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, why in ((None, "is built without CUDA"), ("12.8", "finds no GPU")):
        monkeypatch.setattr(torch.version, "cuda", built)
        for name in ("cuda", "cuda:1"):
            with pytest.raises(BadArgument, match=f'"{name}".*{why}.*cpu') as refused:
                usable_device(name)
            assert "\n" not in str(refused.value)
    assert usable_device("cpu") == torch.device("cpu")
