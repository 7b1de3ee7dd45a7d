"""A sweep's recipe: what it expands to, written out by hand, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hooks.errors import BadArgument
from interp.training import cells as sweep
from interp.training import recipe

pytestmark = pytest.mark.contract

TEXT = """
name: small
base:
  steps: 10
  learning_rates: [1e-3]
  weight_decay: 1e-2
  model_config: {n_layers: 2, d_model: 8}
models:
  mamba: {model_config: {d_state: 4, d_model: 16}}
  linear: {model: linear_attention, learning_rates: [1.0E-2], batch_size: 32}
tasks:
  two: {task: linreg, task_config: {d: 2}}
  markov: {curriculum: 0}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def of(folder: Path, more: str = "") -> sweep.Sweep:
    return sweep.read(write(folder, TEXT + more))


def test_a_cell_is_base_then_model_and_task(tmp_path: Path) -> None:
    found = of(tmp_path)
    assert found.name == "small"
    assert [cell.name for cell in found.cells] == ["mamba-two", "mamba-markov", "linear-two", "linear-markov"]
    first, last = found.cell("mamba-two").recipe, found.cell("linear-markov").recipe
    assert (first.model, first.task, first.steps, first.batch_size, first.seed) == ("mamba", "linreg", 10, 64, 0)
    assert first.model_config == {"n_layers": 2, "d_model": 16, "d_state": 4}
    assert (first.task_config, first.learning_rates, first.weight_decay) == ({"d": 2}, (1e-3,), 0.01)
    assert (last.model, last.task, last.learning_rates) == ("linear_attention", "markov", (1e-2,))
    assert (last.batch_size, last.curriculum) == (32, 0.0)
    assert last.model_config == {"n_layers": 2, "d_model": 8}


def test_sizes_and_seeds_are_in_the_name_where_there_are_any(tmp_path: Path) -> None:
    found = of(tmp_path, "seeds: [3, 5]\nsizes: {s: {n_layers: 1}, l: {n_layers: 9}}\nonly: ['mamba-two-*']")
    assert [cell.name for cell in found.cells] == [f"mamba-two-{size}-seed{seed}" for size in "sl" for seed in (3, 5)]
    last = found.cells[-1]
    assert (last.size, last.seed, last.recipe.seed) == ("l", 5, 5)
    assert last.recipe.model_config == {"n_layers": 9, "d_model": 16, "d_state": 4}
    assert of(tmp_path, "seeds: [3]").cells[0].recipe.seed == 3


def test_only_and_skip_choose_cells(tmp_path: Path) -> None:
    found = of(tmp_path, "only: ['*-two', 'mamba-*']\nskip: ['linear-*']")
    assert [cell.name for cell in found.cells] == ["mamba-two", "mamba-markov"]


def test_recipes_are_cells_after_the_grid_whatever_the_seeds(tmp_path: Path) -> None:
    (tmp_path / "tiny-deep-markov.json").write_text(
        '{"task": "markov", "model": "mamba", "steps": 7, "learning_rates": [1e-3], "seed": 4}'
    )
    found = of(tmp_path, "seeds: [3, 5]\nrecipes: [tiny-deep-markov]\nskip: [linear-*]")
    assert [cell.beside for cell in found.cells] == [False] * 4 + [True]
    last = found.cells[-1]
    assert (last.name, last.model, last.task, last.size, last.seed) == (
        "tiny-deep-markov",
        "tiny-deep",
        "markov",
        "",
        4,
    )
    assert last.recipe == recipe.read(tmp_path / "tiny-deep-markov.json") and last.recipe.steps == 7
    for value, said in (
        ("[tiny-dep-markov]", 'did you mean "tiny-deep-markov"'),
        ("tiny-deep-markov", "give a list of names"),
        ("[]", "give a list of names"),
        ("[../tiny-deep-markov]", "cannot name a folder"),
        ("[tiny-deep-markov, tiny-deep-markov]", "two cells are called tiny-deep-markov"),
    ):
        with pytest.raises(BadArgument, match=re.escape(said)) as refused:
            of(tmp_path, f"recipes: {value}")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("models:", "model:", 'did you mean "models"'),
        ("steps: 10", "step: 10", 'field of base is called "step"; did you mean "steps"'),
        ("{model: linear_attention", "{modle: linear_attention", 'did you mean "model"'),
        ("steps: 10", "task: linreg", 'no field of base is called "task"'),
        ("curriculum: 0", "model_config: {}", 'did you mean "task_config"'),
        ("curriculum: 0", "batch_size: 8", "linear-markov: its model and its task both give batch_size"),
        ("steps: 10", "steps: ten", "cell mamba-two"),
        ("name: small", "name: a/b", "give a word"),
        ("name: small\n", "", "name is None"),
        ("  two: {", "  a/b: {", "cannot name a folder"),
        ("{task: linreg, task_config: {d: 2}}", "{task_config: [2]}", "give options as name: value"),
        ("  markov: {curriculum: 0}", "  two: {}", '"two" is given twice'),
        ("  markov: {curriculum: 0}", "  markov: [", "cannot read the sweep"),
        ("  markov: {curriculum: 0}", "  markov: {}\nseeds: [0, 0]", "different whole numbers"),
        ("  markov: {curriculum: 0}", "  markov: {}\nseeds: 3", "seeds is 3"),
        ("  markov: {curriculum: 0}", "  markov: {}\nsizes: {s: 3}", "sizes: s is 3"),
        ("  markov: {curriculum: 0}", "  markov: {}\nskip: [mamba-too]", 'did you mean "mamba-two"'),
        ("  markov: {curriculum: 0}", "  markov: {}\nskip: ['*']", "leave none of its 4 cells"),
        ("  markov: {curriculum: 0}", "  two-s: {}\nsizes: {s: {}}\nonly: [mamba-two-s]", None),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(before: str, after: str, said: str | None, tmp_path: Path) -> None:
    assert TEXT.count(before) == 1
    path = write(tmp_path, TEXT.replace(before, after))
    if said is None:  # the last case shows that a changed text can also be right
        assert [cell.name for cell in sweep.read(path).cells] == ["mamba-two-s"]
        return
    with pytest.raises(BadArgument) as refused:
        sweep.read(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("values", [{"seed": 1}, {}])
def test_a_seed_stands_in_one_place(values: dict[str, Any]) -> None:
    whole = {"name": "a", "base": values, "models": {"mamba": None}, "tasks": {"linreg": None}}
    assert sweep.expand(whole).cells[0].recipe.seed == values.get("seed", 0)
    if values:
        with pytest.raises(BadArgument, match="both seeds and a seed"):
            sweep.expand({**whole, "seeds": [1]})


def test_two_cells_of_one_name_are_refused() -> None:
    both = {"a": {"model": "mamba"}, "a-b": {"model": "mamba"}}
    with pytest.raises(BadArgument, match="two cells are called a-b-c"):
        sweep.expand({"name": "n", "models": both, "tasks": {"c": {"task": "linreg"}, "b-c": {"task": "linreg"}}})
