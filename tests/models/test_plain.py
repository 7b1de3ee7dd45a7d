"""What is saved loads as the same function, whatever the model is wrapped in; what would not is refused unwritten."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.testing import assert_close

import models
from hooks.errors import BadArgument
from models import checkpoint, plain
from models.checkpoint import CheckpointError

pytestmark = pytest.mark.contract

SMALL: dict[str, Any] = {"d_model": 8, "n_layers": 2, "d_in": 2}
SHAPES: dict[str, dict[str, Any]] = {"theory": {"d_in": 2}}


def build(architecture: str = "mamba", **config: Any) -> Any:
    return models.build(architecture, **{**SHAPES.get(architecture, SMALL), **config})


def prompts() -> Tensor:
    return torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(3))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def compiled(model: Any) -> Any:
    return torch.compile(model)


def compiled_block(model: Any) -> Any:
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


def parallel(model: Any) -> Any:
    return nn.DataParallel(torch.compile(model))


def pruned(model: Any) -> Any:
    prune.l1_unstructured(model.blocks[0].mixer.out_proj, "weight", amount=0.3)
    prune.random_unstructured(model.blocks[0].mixer.out_proj, "weight", amount=0.3)
    return model


def normed(model: Any) -> Any:
    parametrizations.weight_norm(model.blocks[1].mixer.out_proj)
    return model


def normed_as_before(model: Any) -> Any:
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(model.blocks[1].mixer.out_proj)
    return model


def spectral(model: Any) -> Any:
    parametrizations.spectral_norm(model.blocks[1].mixer.out_proj)
    spectral_norm(model.blocks[0].mixer.out_proj)
    return model


def doubled(model: Any) -> Any:
    parametrize.register_parametrization(model.blocks[1].mixer, "D", Doubled())
    return model


def stepped(model: Any) -> None:
    """One step of an optimizer: what torch had put together before it is then out of date."""
    plain.unwrapped(model)(prompts()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()


@pytest.mark.parametrize(
    "wrap", [compiled, compiled_block, parallel, pruned, normed, normed_as_before, spectral, doubled]
)
def test_what_means_the_same_is_saved(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    model = wrap(build())
    if wrap is not compiled_block:  # running it would start the compiler
        stepped(model)
    checkpoint.save(model, tmp_path / "m.safetensors", {})
    back = models.load(tmp_path / "m.safetensors")
    inner = plain.unwrapped(model).eval()
    if wrap is compiled_block:
        inner.blocks[1] = plain.unwrapped(inner.blocks[1])
    assert_close(back(prompts()), inner(prompts()), rtol=0, atol=0)
    assert set(back.state_dict()) == set(build().state_dict())
    assert checkpoint.digest(back) == checkpoint.digest(model)


def extra_buffer(model: Any) -> None:
    model.blocks[0].register_buffer("seen", torch.zeros(1))


def extra_module(model: Any) -> None:
    model.blocks[0].mixer.more = nn.Tanh()


def extra_weight(model: Any) -> None:
    model.bias = nn.Parameter(torch.zeros(1))


def another_module(model: Any) -> None:
    model.blocks[1].mixer.out_proj = nn.Sequential(model.blocks[1].mixer.out_proj, nn.Tanh())


def another_of_the_name(model: Any) -> None:
    given = model.blocks[1].mixer.out_proj
    given.__class__ = type("Linear", (nn.Linear,), {"__module__": "their.code"})


def another_size(model: Any) -> None:
    model.head.linear = nn.Linear(8, 5)


def one_block_twice(model: Any) -> None:
    model.blocks[1] = model.blocks[0]


def one_weight_twice(model: Any) -> None:
    model.blocks[1].mixer.D = model.blocks[0].mixer.D


def one_memory_twice(model: Any) -> None:
    model.blocks[1].mixer.D.data = model.blocks[0].mixer.D.data


def a_block_less(model: Any) -> None:
    del model.blocks[1]


def random_weights(model: Any) -> None:
    parametrize.register_parametrization(model.blocks[1].mixer, "D", Noisy())


def whole_numbers(model: Any) -> None:
    model.blocks[1].mixer.D = nn.Parameter(torch.ones(16, dtype=torch.int32), requires_grad=False)


@pytest.mark.parametrize(
    "change, reason",
    [
        (extra_buffer, "blocks.0.seen is not one of the tensors"),
        (extra_module, "blocks.0.mixer.more, a Tanh, is not part of its architecture"),
        (extra_weight, "bias is not one of the tensors"),
        (another_module, "blocks.1.mixer.out_proj is a Sequential, where its architecture has a Linear"),
        (another_of_the_name, "out_proj is a their.code.Linear, where its architecture has a Linear"),
        (another_size, "head.linear.weight has shape (5, 8), its config says (1, 8)"),
        (one_block_twice, "and blocks.0."),
        (one_weight_twice, "blocks.1.mixer.D and blocks.0.mixer.D are one tensor"),
        (one_memory_twice, "blocks.1.mixer.D and blocks.0.mixer.D are one tensor"),
        (a_block_less, "blocks.1 is gone"),
        (random_weights, "blocks.1.mixer.D has another value at each look"),
        (whole_numbers, "blocks.1.mixer.D holds int32"),
    ],
)
def test_what_would_not_come_back_is_refused_unwritten(change: Any, reason: str, tmp_path: Path) -> None:
    model = build()
    change(model)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(model, tmp_path / "m.safetensors", {})
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_of_ours_is_refused(tmp_path: Path) -> None:
    for thing in (nn.Linear(2, 2), None, {"a": 1}, build().state_dict()):
        with pytest.raises(CheckpointError, match="is not a model of this project"):
            checkpoint.save(thing, tmp_path / "m.safetensors", {})


def test_parts_of_one_vector_are_saved(tmp_path: Path) -> None:
    """As they are after ``vector_to_parameters``: safetensors itself refuses such."""
    model = build()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    checkpoint.save(model, tmp_path / "m.safetensors", {})
    assert checkpoint.digest(models.load(tmp_path / "m.safetensors")) == checkpoint.digest(model)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_the_tensors_of_a_model_are_those_of_its_state(architecture: str) -> None:
    model = build(architecture)
    found = plain.tensors_of(model)
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == {
        name: id(value) for name, value in found.items()
    }
    assert plain.misfit(model, build(architecture)) == ""


def test_a_wrapped_model_is_loaded_as_what_is_inside() -> None:
    model = build()
    assert models.load(nn.DataParallel(model)) is model


# --- one table stays one table ----------------------------------------------------------------


def language_model(architecture: str = "mamba", **config: Any) -> Any:
    return build(architecture, head="lm", d_out=11, **{"d_in": 1, **config}).eval()


WORDS = torch.arange(8)[None] % 11
TIED = [name for name in models.ARCHITECTURES if name != "theory"]


def read_out(model: Any) -> Tensor:
    """The logits that the table itself gives: what tied means."""
    return model.ln_final(model(WORDS, stop_at_layer=2)) @ model.embed.table.weight.T


@pytest.mark.parametrize("architecture", TIED)
@pytest.mark.parametrize("whole", [True, False])
def test_an_assigned_state_keeps_one_table(architecture: str, whole: bool) -> None:
    model, other = language_model(architecture), language_model(architecture)
    count = len(list(model.parameters()))
    given = dict(other.state_dict())
    if whole:  # as written by a program that names the table twice
        given["head.linear.weight"] = given["embed.table.weight"].clone()
    model.load_state_dict(given, assign=True)
    assert_close(model(WORDS), other(WORDS), rtol=0, atol=0)
    assert len(list(model.parameters())) == count and model.head.linear.weight is model.embed.table.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(WORDS).logsumexp(-1).sum().backward()
    optimizer.step()
    assert_close(model(WORDS), read_out(model), rtol=1e-5, atol=1e-5)


def test_a_state_with_two_tables_is_refused_and_says_so() -> None:
    model = language_model()
    free = language_model(tie_embeddings=False).state_dict()
    for assign in (True, False):
        with pytest.raises(
            RuntimeError, match=r"head\.linear\.weight differs from embed\.table\.weight.*tie_embeddings"
        ):
            model.load_state_dict(free, assign=assign)
    model.load_state_dict({"head.linear.weight": torch.ones(11, 8)}, strict=False, assign=True)
    assert_close(model.embed.table.weight.detach(), torch.ones(11, 8), rtol=0, atol=0)
    nn.DataParallel(model).load_state_dict({f"module.{k}": v for k, v in language_model().state_dict().items()})


@pytest.mark.parametrize("architecture", TIED)
def test_whatever_replaces_the_table_does_so_for_both_uses(architecture: str, tmp_path: Path) -> None:
    def emptied(model: Any) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.to("meta").to_empty(device="cpu").load_state_dict(state)

    def doubled_table(model: Any) -> None:
        parametrize.register_parametrization(model.embed.table, "weight", Doubled())

    def pruned_table(model: Any) -> None:
        prune.l1_unstructured(model.embed.table, "weight", amount=0.5)

    def another_table(model: Any) -> None:
        model.embed.table = nn.Embedding(11, 8)

    def another_read_in(model: Any) -> None:
        model.embed = copy.deepcopy(model.embed)
        with torch.no_grad():
            model.embed.table.weight += 1

    def double(model: Any) -> None:
        model.double()

    def copied(model: Any) -> None:
        model.__dict__.update(copy.deepcopy(model).__dict__)

    for change in (emptied, doubled_table, pruned_table, another_table, another_read_in, double, copied):
        model = language_model(architecture)
        change(model)
        assert_close(model(WORDS), read_out(model), rtol=1e-5, atol=1e-5)
        checkpoint.save(model, tmp_path / "m.safetensors", {})
        assert_close(models.load(tmp_path / "m.safetensors")(WORDS), model(WORDS), rtol=0, atol=0)


def test_the_read_out_of_a_tied_model_cannot_be_freed_by_accident() -> None:
    model = language_model()
    with pytest.raises(BadArgument, match=r"set embed\.table\.weight, or"):
        model.head.linear.weight = nn.Parameter(torch.zeros(11, 8))
    with torch.no_grad():
        model.head.linear.weight *= 2
    assert_close(model(WORDS), read_out(model), rtol=1e-5, atol=1e-5)
