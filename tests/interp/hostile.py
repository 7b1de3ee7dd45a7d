"""Throws values that nobody should give at every public verb, and prints what comes back as JSON.

A program of its own: in the tests every signature is checked at run time, which would answer before the verb does.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hooks
import models
from hooks.errors import MambascopeError
from interp import attention, attribute, estimators, evaluate, patch, probe, similarity, stats, tasks
from interp.patch.knockout import between, left
from interp.tasks import shifts

HOSTILE: dict[str, Any] = {
    "a long tensor": torch.rand(300),
    "integers": torch.arange(1000),
    "a cube": torch.rand(12, 13, 14),
    "an array": np.random.default_rng(0).normal(size=(40, 40)),
    "a list": list(range(5000)),
    "a list of tensors": [torch.rand(300)] * 3,
    "a model": models.build("mamba", d_model=8, n_layers=2),
    "10 kB": "x" * 10_000,
    "many lines": "a\nb\n" * 50,
    "a dict": {"a": torch.rand(300)},
    "none": None,
    "an object": object(),
    "not a number": float("nan"),
}
TASK = tasks.build("linreg", d=2, n_pairs=5)
MODEL = models.build("mamba", d_model=8, n_layers=2, d_state=4, d_in=2).eval()
BATCH = TASK.sample(4, torch.Generator().manual_seed(0))
X = BATCH.tokens


def last(output: Tensor) -> Tensor:
    """The prediction at the query."""
    return output[:, -1, 0]


def edited(edit: Any) -> Tensor:
    """The output under an edit of Δ."""
    with hooks.edit(MODEL, {"*.hook_delta": edit}):
        return MODEL(X)


def edits(given: Any) -> Tensor:
    """The output under these edits."""
    with hooks.edit(MODEL, given):
        return MODEL(X)


def exposed(pattern: Any) -> None:
    """The scan sites that the pattern picks are formed."""
    with hooks.expose(MODEL, pattern):
        pass


VERBS: dict[str, Callable[[Any], Any]] = {
    "model": lambda v: MODEL(v),
    "model, state": lambda v: MODEL(X, state=v) if v is not None else 1 / 0,
    "model, stop_at_layer": lambda v: MODEL(X, stop_at_layer=v),
    "model, start_at_layer": lambda v: MODEL(X, start_at_layer=v),
    "step": lambda v: MODEL.step(v),
    "record": lambda v: hooks.record(MODEL, v),
    "record, model": lambda v: hooks.record(v, X),
    "record, sites": lambda v: hooks.record(MODEL, X, v),
    "record, max_memory": lambda v: hooks.record(MODEL, X, max_memory=v),
    "show": lambda v: hooks.show(v),
    "sites": lambda v: hooks.sites(v),
    "cache": lambda v: MODEL.run_with_cache(v),
    "cache, filter": lambda v: MODEL.run_with_cache(X, names_filter=v),
    "edit": edits,
    "edit, edit": edited,
    "edit, model": lambda v: hooks.edit(v, {"*.hook_delta": hooks.zero()}).__enter__(),
    "expose": exposed,
    "zero, pos": lambda v: edited(hooks.zero(pos=v)),
    "zero, channels": lambda v: edited(hooks.zero(channels=v)),
    "scale": lambda v: edited(hooks.scale(v)),
    "add": lambda v: edited(hooks.add(v)),
    "set_to": lambda v: edited(hooks.set_to(v)),
    "mean, over": lambda v: edited(hooks.mean(over=v)),
    "mean, kinds": lambda v: edited(hooks.mean(over="kind", kinds=v)),
    "mean, reference": lambda v: edited(hooks.mean(reference=v)),
    "resample, source": lambda v: edited(hooks.resample(source=v)),
    "resample, seed": lambda v: edited(hooks.resample(seed=v)),
    "do_state, layer": lambda v: edits(hooks.do_state(v, 0, 0.0)),
    "do_state, pos": lambda v: edits(hooks.do_state(0, v, 0.0)),
    "do_state, value": lambda v: edits(hooks.do_state(0, 0, v)),
    "build": lambda v: models.build(v),
    "build, d_model": lambda v: models.build("mamba", d_model=v),
    "build, head": lambda v: models.build("mamba", head=v),
    "build, step": lambda v: models.build("mamba", step=v),
    "tasks.build": lambda v: tasks.build(v),
    "tasks.build, d": lambda v: tasks.build("linreg", d=v),
    "tasks.build, covariance": lambda v: tasks.build("linreg", covariance=v),
    "tasks.build, noise": lambda v: tasks.build("linreg", noise=v),
    "tasks.build, link": lambda v: tasks.build("single_index", link=v),
    "sample": lambda v: TASK.sample(v, torch.Generator()),
    **{f"sample, {name}": lambda v, name=name: tasks.build(name).sample(3, v) for name in tasks.names()},
    "shifts": lambda v: shifts.apply(TASK, v),
    "estimators.build": lambda v: estimators.build(v),
    "estimators.build, alpha": lambda v: estimators.build("ridge", alpha=v),
    "estimators.build, steps": lambda v: estimators.build("gd", steps=v),
    "errors, n": lambda v: evaluate.errors(MODEL, TASK, n=v),
    "errors, batch_size": lambda v: evaluate.errors(MODEL, TASK, n=4, batch_size=v),
    "errors, third": lambda v: evaluate.errors(MODEL, TASK, v),
    "errors, batch": lambda v: evaluate.errors(MODEL, TASK, batch=v) if v is not None else 1 / 0,
    "errors, a batch for n": lambda v: evaluate.errors(MODEL, TASK, BATCH),  # type: ignore[arg-type]
    "summary, ks": lambda v: evaluate.summary(MODEL, TASK, v, n=4) if v is not None else 1 / 0,
    "patch": lambda v: patch.patched(MODEL, v, X, "*.hook_x", last),
    "patch, corrupted": lambda v: patch.patched(MODEL, X, v, "*.hook_x", last),
    "patch, sites": lambda v: patch.patched(MODEL, X, X, v, last) if v is not None else 1 / 0,
    "patch, metric and sites": lambda v: patch.activations(MODEL, X, X, last, v),  # type: ignore[arg-type]
    "patch, metric": lambda v: patch.patched(MODEL, X, X, "*.hook_x", v),
    "patch, metric's": lambda v: patch.patched(MODEL, X, X, "*.hook_x", lambda out: v),
    "patch, positions": lambda v: patch.patched(MODEL, X, X, "*.hook_x", last, positions=v),
    "swap, first": lambda v: patch.swap_states(MODEL, v, X, 3),
    "swap, at": lambda v: patch.swap_states(MODEL, X, X, v),
    "swap, parts": lambda v: patch.swap_states(MODEL, X, X, 3, parts=v),
    "swap, layers": lambda v: patch.swap_states(MODEL, X, X, 3, layers=v),
    "knock out": lambda v: edits(patch.knock_out(MODEL, v)),
    "knock out, layers": lambda v: edits(patch.knock_out(MODEL, [(0, 1)], v)),
    "knock out, inside": lambda v: edits(patch.knock_out(MODEL, [(0, 1)], None, v)),
    "between": lambda v: between(v, [1], 9),
    "left": lambda v: left(MODEL, v, [(0, 1)]),
    "left, other": lambda v: left(MODEL, X, [(0, 1)], other=v),
    "gradients": lambda v: attribute.gradients(MODEL, v, "*.hook_x", last),
    "gradients, sites": lambda v: attribute.gradients(MODEL, X, v, last),
    "gradients, metric": lambda v: attribute.gradients(MODEL, X, "*.hook_x", v),
    "integrated, baseline": lambda v: attribute.integrated_gradients(MODEL, X, "hook_embed", last, baseline=v),
    "integrated, steps": lambda v: attribute.integrated_gradients(MODEL, X, "hook_embed", last, steps=v),
    "matrix": lambda v: attention.matrix(MODEL, v, 0),
    "matrix, layer": lambda v: attention.matrix(MODEL, X, v),
    "matrix, channels": lambda v: attention.matrix(MODEL, X, 0, channels=v),
    "matrix, queries": lambda v: attention.matrix(MODEL, X, 0, queries=v),
    "matrix, inside": lambda v: attention.matrix(MODEL, X, 0, inside=v),
    "contributions, weights": lambda v: attention.contributions(MODEL, X, 0, weights=v),
    "contributions, scalar": lambda v: attention.contributions(MODEL, X, 0, scalar=v),
    "contributions, finite": lambda v: attention.contributions(MODEL, X, 0, scalar=last, finite=v),
    "probe": lambda v: probe.ridge(v, {"y": BATCH.y}, untrained=None, running_sum=None),
    "probe, targets": lambda v: probe.ridge(torch.rand(40, 3), {"y": v}, untrained=None, running_sum=None),
    "similarity": lambda v: similarity.compare([v], [v]),
    "similarity, measure": lambda v: similarity.compare([torch.rand(9, 2)], [torch.rand(9, 2)], v),
    "bootstrap": lambda v: stats.bootstrap(v),
    "bootstrap, level": lambda v: stats.bootstrap(torch.rand(9), level=v),
}


REFUSED = (
    {
        (verb, value)
        for verb in ("matrix, channels", "matrix, queries", "contributions, finite", "zero, pos", "zero, channels")
        for value in ("a long tensor", "an array", "a cube", "10 kB", "a dict", "an object", "not a number")
    }
    | {(f"sample, {name}", value) for name in tasks.names() for value in HOSTILE}
    | {("shifts", "a dict")}
)
"""What has no meaning at all: not even a result will do."""
REPR = re.compile(r"(?<![\w.])(tensor|array|Linear|Mamba)\(|\[ ?\[|\d\.\d+, |x{120}")
"""What only the repr of a tensor, an array or a model has, or a name that was not cut."""


def faults() -> Iterator[dict[str, str]]:
    """One for each answer that is neither a result, nor one short line of our family."""
    for verb, call in VERBS.items():
        for name, value in HOSTILE.items():
            try:
                made = call(value)
                if inspect.isgenerator(made):
                    list(made)
                if (verb, name) in REFUSED:
                    yield {"verb": verb, "value": name, "says": "nothing: it was taken"}
            except MambascopeError as error:
                text = str(error)
                if "\n" in text or len(text) > 400 or REPR.search(text):
                    yield {"verb": verb, "value": name, "says": text[:200]}
            except ZeroDivisionError:
                pass
            except Exception as error:  # what the verb should have refused
                yield {"verb": verb, "value": name, "says": f"{type(error).__name__}: {str(error)[:150]}"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    Path(sys.argv[1]).write_text(json.dumps(list(faults())), encoding="utf-8")
