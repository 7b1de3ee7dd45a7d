"""Every question of ``interp`` and ``hooks`` as a function of one tiny model and two batches, for contract tests.

Each gives a tensor of numbers, so that a test can say what they should be whatever the dtype, the device that torch
would choose, or the wrapper around the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hooks
import models
from interp import attention, attribute, evaluate, patch, probe, similarity, tasks
from interp.patch.knockout import left
from interp.tasks.base import Batch, model_shape

TASK = tasks.build("linreg", d=2, n_pairs=5)
TINY: dict[str, dict[str, Any]] = {
    "mamba": {"d_model": 8, "n_layers": 2, "d_state": 4},
    "twin": {"d_model": 8, "n_layers": 2, "d_state": 4, "selective": False},
    "s4d": {"d_model": 8, "n_layers": 2, "d_state": 4},
    "s4": {"d_model": 8, "n_layers": 2, "d_state": 4},
    "linear_attention": {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 8},
    "transformer": {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 8},
    "theory": {},
}
Verb = Callable[[Any, Batch, Batch], Tensor]


def tiny(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose output depends on its context by as much as it is large."""
    torch.manual_seed(3)
    name = "mamba" if architecture == "twin" else architecture
    model = models.build(name, **TINY[architecture], **model_shape(TASK))
    with torch.no_grad():
        for block in model.blocks:
            for weight in getattr(block, "mixer", block).parameters():
                if weight.ndim == 2 and architecture in ("mamba", "twin") and weight.shape[0] == 8:
                    weight.mul_(4.0)
    return model.to(dtype).eval()


def batches(n: int = 8) -> tuple[Batch, Batch]:
    """Prompts, and the same inputs under another w."""
    batch = TASK.sample(n, torch.Generator().manual_seed(0))
    return batch, TASK.corrupt(batch, torch.Generator().manual_seed(1))


def last(output: Tensor) -> Tensor:
    """The prediction at the query."""
    return output[:, -1, 0]


def _edited(model: Any, batch: Batch, edits: Any) -> Tensor:
    with hooks.edit(model, edits), torch.no_grad():
        return model(batch.tokens)


def _column(table: Any, *names: str) -> Tensor:
    return torch.tensor(table[list(names)].to_numpy(dtype="float64"), device="cpu")


def _residual(model: Any, batch: Batch) -> Tensor:
    return hooks.record(model, batch.tokens, "blocks.0.hook_resid_post")["blocks.0.hook_resid_post"]


def _probe(model: Any, batch: Batch, other: Batch) -> Tensor:
    values = _residual(model, batch).repeat(5, 1, 1)
    targets = torch.cat([batch.y[:, 0], *(batch.y[:, k] for k in range(1, 5))])
    found = probe.ridge(values[:, -1], {"y": targets}, untrained=values[:, 0], running_sum=None, shuffles=1)
    return torch.as_tensor(found["y"].folds, device="cpu")


RESIDUAL: dict[str, Verb] = {
    "errors": lambda m, b, o: evaluate.errors(m, TASK, batch=b),
    "loss": lambda m, b, o: TASK.loss(TASK.predict(m, b), b).detach(),
    "record": lambda m, b, o: _residual(m, b),
    "run_with_cache": lambda m, b, o: m.run_with_cache(b.tokens, names_filter="*.hook_resid_pre")[0].detach(),
    "edit, mean": lambda m, b, o: _edited(m, b, {"blocks.0.hook_resid_post": hooks.mean("batch", pos=[1])}),
    "edit, reference": lambda m, b, o: _edited(m, b, {"*.0.hook_resid_post": hooks.mean(reference=o.tokens)}),
    "edit, add": lambda m, b, o: _edited(m, b, {"blocks.0.hook_resid_post": hooks.add(0.5, channels=[0, 1])}),
    "patch": lambda m, b, o: _column(
        patch.activations(m, b.tokens, o.tokens, "*.hook_resid_post", last, n_boot=20), "effect"
    ),
    "attribution patching": lambda m, b, o: torch.stack(
        list(attribute.attribution_patching(m, b.tokens, o.tokens, "*.0.hook_resid_post", last).values())
    ),
    "gradient x activation": lambda m, b, o: torch.stack(
        list(attribute.gradient_x_activation(m, b.tokens, "*.0.hook_resid_post", last).values())
    ),
    "integrated gradients": lambda m, b, o: (
        attribute.integrated_gradients(m, b.tokens, "blocks.0.hook_resid_post", last, steps=4).values
    ),
    "probe": _probe,
    "similarity": lambda m, b, o: torch.as_tensor(
        similarity.compare([_residual(m, b)[:, -1]], [_residual(m, o)[:, -1]], n_perm=3).value, device="cpu"
    ),
}
"""What every model can be asked."""
RECURRENT: dict[str, Verb] = {
    "step": lambda m, b, o: m.step(b.tokens[:, 0])[0].detach(),
    "do_state": lambda m, b, o: _edited(m, b, hooks.do_state(0, [2], 0.5)),
    "patch, states": lambda m, b, o: (
        patch.patched(m, b.tokens, o.tokens, "*.hook_state", last, positions=[2, 8]).values
    ),
    "swap": lambda m, b, o: patch.swap_states(m, b.tokens, o.tokens, 3),
    "swap table": lambda m, b, o: _column(patch.swap_table(m, b.tokens, o.tokens, 7, last, n_boot=20), "recovery"),
    "knock out": lambda m, b, o: torch.as_tensor(left(m, b.tokens, [(5, 6), (6, 7)], n_boot=20).mean, device="cpu"),
    "matrix": lambda m, b, o: attention.matrix(m, b.tokens, 0, queries=[3, -1]).values,
    "contributions": lambda m, b, o: attention.contributions(
        m, b.tokens, 0, scalar=last, finite=[0, 4]
    ).by_channel.detach(),
    "contributions, weights": lambda m, b, o: (
        attention.contributions(m, b.tokens, 0, weights=torch.ones(1, dtype=torch.float64, device="cpu")).by_channel
    ),
}
"""What only a model with a recurrent state can be asked."""
VERBS: dict[str, Verb] = RESIDUAL | RECURRENT


def verbs_of(architecture: str) -> dict[str, Verb]:
    """Those that a model of ``architecture`` answers."""
    one_layer = {"similarity"} if architecture == "theory" else set()
    found = RESIDUAL if architecture == "transformer" else VERBS
    return {name: verb for name, verb in found.items() if name not in one_layer}
