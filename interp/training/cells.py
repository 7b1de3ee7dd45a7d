"""A sweep, as data: models × tasks × seeds × sizes, and the training recipe of each of its cells.

    name: zoo
    base: {steps: 4000, learning_rates: [1.5e-3, 3e-3, 6e-3]}     # fields of every recipe
    models:
      mamba: {model_config: {d_model: 32}}                         # model: the name, unless it says another
      linear-transformer: {model: linear_attention, learning_rates: [1e-3]}
    tasks:
      skewed: {task: linreg, task_config: {covariance: skewed}}
    seeds: [0, 1]                                                  # optional
    sizes: {small: {n_layers: 2}, large: {n_layers: 8}}            # optional: over the model's config
    recipes: [mamba-1layer-markov]                                 # optional: further cells, JSON files beside this one
    skip: ["*-skewed-large-*"]                                     # optional patterns of cells; or only: [...]

A cell is called ``<model>-<task>``, then ``-<size>`` where there are sizes and ``-seed<n>`` where there
are several seeds; one of ``recipes`` is called as its file, and is one cell whatever the seeds and
sizes. A field of a model or a task takes the place of the base's; two that say the same field
differently for one cell are refused, because neither is the more particular.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from hooks.errors import BadArgument, told, unknown
from interp.training import recipe as training
from interp.training.recipe import TrainConfig, from_dict

FIELDS = ("name", "base", "models", "tasks", "seeds", "sizes", "recipes", "skip", "only")
NESTED = ("task_config", "model_config")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Cell:
    """One training of a sweep: its name, what it is of, and its recipe. ``size`` is empty where there are none;
    ``beside`` says that it is one of ``recipes``, which nothing makes comparable to the grid.
    """

    name: str
    model: str
    task: str
    seed: int
    size: str
    recipe: TrainConfig
    beside: bool = False


@dataclass(frozen=True)
class Sweep:
    """A name and the cells, in the order of models, tasks, sizes and seeds, then those of ``recipes``."""

    name: str
    cells: tuple[Cell, ...]

    def cell(self, name: str) -> Cell:
        """The cell called ``name``; raises BadArgument with the near names."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise BadArgument(unknown(f"cell of the sweep {self.name}", name, [cell.name for cell in self.cells]))


def read(path: Path) -> Sweep:
    """The sweep in a YAML file; raises BadArgument for what is no sweep, in one line."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadArgument(f"cannot read the sweep {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BadArgument(f"{path} is not a sweep: it holds no mapping; its fields are {', '.join(FIELDS)}")
    return expand(values, str(path), path.parent)


def expand(values: Mapping[str, Any], source: str = "the sweep", folder: Path = Path()) -> Sweep:
    """The sweep that ``values`` describes, every cell with its whole recipe; ``folder`` is that of its ``recipes``.

    Raises BadArgument for a field that there is not (with the near names), a value of another kind,
    a field that is given twice for one cell, and a pattern that matches no cell.
    """
    for name in values:
        if name not in FIELDS:
            raise BadArgument(f"{source}: {unknown('field of a sweep', str(name), FIELDS)}")
    title = values.get("name")
    if not (isinstance(title, str) and _NAME.fullmatch(title)):
        raise BadArgument(f"{source}: name is {told(title)}; give a word, it names the folder of the runs")
    base = _recipe_fields(source, "base", values.get("base") or {}, {"task", "model", "mix"})
    models = _named(source, "models", values.get("models"), {"task", "task_config", "mix", "seed"})
    tasks = _named(source, "tasks", values.get("tasks"), {"model", "model_config", "seed"})
    sizes = _sizes(source, values.get("sizes"))
    seeds = _seeds(source, values.get("seeds"), base)
    cells = []
    for model, of_model in models.items():
        for task, of_task in tasks.items():
            for size, of_size in sizes.items():
                for seed in seeds:
                    name = "-".join(filter(None, (model, task, size, f"seed{seed}" if len(seeds) > 1 else "")))
                    where = f"{source}: cell {name}"
                    fields = _joined(where, base, {"model": model, **of_model}, {"task": task, **of_task})
                    fields["model_config"] = {**fields.get("model_config", {}), **of_size}
                    recipe = from_dict({**fields, "seed": seed}, where)
                    cells.append(Cell(name, model, task, seed, size, recipe))
    cells += _recipes(source, values.get("recipes"), folder)
    return Sweep(title, _chosen(source, cells, values))


def _joined(where: str, base: Mapping[str, Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """``base``, with the fields of ``parts`` in their place; the configs are joined option by option."""
    given: dict[str, Any] = {}
    for part in parts:
        for field, value in part.items():
            options = value if field in NESTED else {"": value}
            before = given.setdefault(field, {})
            for option in options:
                if before.get(option, options[option]) != options[option]:
                    called = " ".join(filter(None, (field, option)))
                    raise BadArgument(f"{where}: its model and its task both give {called}; leave it to one of them")
            before.update(options)
    fields = dict(base)
    for field, options in given.items():
        fields[field] = {**fields.get(field, {}), **options} if field in NESTED else options[""]
    return fields


def _recipe_fields(source: str, place: str, values: Any, elsewhere: set[str]) -> dict[str, Any]:
    """``values``, if they are fields of a recipe that belong in this place, and the configs mappings."""
    if not isinstance(values, Mapping):
        raise BadArgument(f"{source}: {place} is {told(values)}; give fields of a recipe, as name: value")
    have = [entry.name for entry in dataclasses.fields(TrainConfig) if entry.name not in elsewhere]
    for name, value in values.items():
        if name not in have:
            raise BadArgument(f"{source}: {unknown(f'field of {place}', str(name), have)}")
        if name in NESTED and not isinstance(value, Mapping):
            raise BadArgument(f"{source}: {name} of {place} is {told(value)}; give options as name: value")
    return dict(values)


def _named(source: str, place: str, values: Any, elsewhere: set[str]) -> dict[str, dict[str, Any]]:
    if not isinstance(values, Mapping) or not values:
        raise BadArgument(f"{source}: {place} is {told(values)}; give at least one, as name: {{fields of a recipe}}")
    _check_names(source, place, values)
    return {
        name: _recipe_fields(source, f"{place}: {name}", {} if of is None else of, elsewhere)
        for name, of in values.items()
    }


def _sizes(source: str, values: Any) -> dict[str, Mapping[str, Any]]:
    """Name → what a size puts into the model's config; one without a name where there are none."""
    if values is None:
        return {"": {}}
    if not isinstance(values, Mapping) or not values:
        raise BadArgument(f"{source}: sizes is {told(values)}; give name: {{options of the model}}")
    _check_names(source, "sizes", values)
    for name, options in values.items():
        if not isinstance(options, Mapping):
            raise BadArgument(f"{source}: sizes: {name} is {told(options)}; give options of the model as name: value")
    return dict(values)


def _recipes(source: str, values: Any, folder: Path) -> list[Cell]:
    """A cell for each JSON file that is named; its model is called as the file without the task at its end."""
    if values is None:
        return []
    if not (isinstance(values, list) and values and all(isinstance(name, str) for name in values)):
        raise BadArgument(f"{source}: recipes is {told(values)}; give a list of names of JSON files beside the sweep's")
    _check_names(source, "recipes", dict.fromkeys(values))
    have = sorted(path.stem for path in folder.glob("*.json"))
    cells = []
    for name in values:
        if name not in have:
            raise BadArgument(f"{source}: recipes: {unknown('recipe', name, have)}")
        found = training.read(folder / f"{name}.json")
        model = name.removesuffix(f"-{found.task}")
        cells.append(Cell(name, model, found.task, found.seed, "", found, beside=True))
    return cells


def _seeds(source: str, values: Any, base: Mapping[str, Any]) -> list[int]:
    if values is None:
        return [base.get("seed", 0)]
    if "seed" in base:
        raise BadArgument(f"{source}: both seeds and a seed of the base are given; leave one away")
    numbers = values if isinstance(values, list) else []
    whole = [seed for seed in numbers if isinstance(seed, int) and not isinstance(seed, bool)]
    if not whole or len(whole) != len(numbers) or len(set(whole)) != len(whole):
        raise BadArgument(f"{source}: seeds is {told(values)}; give a list of different whole numbers")
    return whole


def _check_names(source: str, place: str, values: Mapping[Any, Any]) -> None:
    for name in values:
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise BadArgument(f"{source}: {place}: {told(name)} cannot name a folder; use letters, digits, -_.+")


def _chosen(source: str, cells: Sequence[Cell], values: Mapping[str, Any]) -> tuple[Cell, ...]:
    """The cells that ``only`` and ``skip`` leave."""
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadArgument(f"{source}: two cells are called {twice[0]}; rename a model, a task or a size")
    kept = list(cells)
    for field, keeps in (("only", True), ("skip", False)):
        patterns = values.get(field)
        if patterns is None:
            continue
        if not (isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)):
            raise BadArgument(f'{source}: {field} is {told(patterns)}; give a list of patterns such as ["mamba-*"]')
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise BadArgument(f"{source}: {field}: {unknown('cell', pattern, names)}")
        kept = [cell for cell in kept if keeps == any(fnmatchcase(cell.name, pattern) for pattern in patterns)]
    if not kept:
        raise BadArgument(f"{source}: only and skip leave none of its {len(cells)} cells")
    return tuple(kept)


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: a key given twice is refused, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f'"{key}" is given twice', node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
