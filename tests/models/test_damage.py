"""A damaged checkpoint is never a model: flipped bits of the bundled files, and files that were made to do harm."""

from __future__ import annotations

import inspect
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

import models
from hooks import sealed
from hooks.errors import BadArgument
from models import checkpoint
from models.checkpoint import CheckpointError

pytestmark = pytest.mark.contract

SMALL: dict[str, Any] = {"d_model": 8, "n_layers": 2, "d_state": 3, "d_in": 2, "d_out": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mamba": SMALL,
    "s4d": SMALL,
    "s4": SMALL,
    "linear_attention": {"d_model": 8, "n_layers": 2, "d_in": 2, "d_conv": 3, "d_mlp": 8},
    "transformer": {"d_model": 8, "n_layers": 2, "d_in": 2, "n_ctx": 16},
    "theory": {"d_in": 3, "bias": True},
}


def unchecked(function: Any) -> Any:
    """``function`` as a user has it: only the tests look at the types of its arguments first."""
    return inspect.unwrap(function)


def refusal(path: Any) -> str:
    with pytest.raises(BadArgument) as caught:
        unchecked(models.load)(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    return message


def written(folder: Path, architecture: str = "mamba", **config: Any) -> tuple[models.Root, Path]:
    model = models.build(architecture, **{**ARCHITECTURES[architecture], **config})
    path = folder / "model.safetensors"
    checkpoint.save(model, path, {"task": "linreg"})
    return model, path


def changed(path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """The file with other options in its config, or other tensors, and a seal that fits."""
    stored = sealed.read(path)
    metadata = dict(stored.metadata)
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **(config or {})})
    path.write_bytes(sealed.pack({**stored.tensors(), **tensors}, metadata))
    return path


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_bundled_file_is_a_model(count: int, tmp_path: Path) -> None:
    """Half of them in the header, which is a tenth of a file and says what the numbers mean."""
    rng, path = random.Random(count), tmp_path / "model.safetensors"
    names = models.names()
    for i in range(count):
        data = bytearray((models.ZOO / f"{names[i % len(names)]}.safetensors").read_bytes())
        end = 8 + struct.unpack("<Q", data[:8])[0] if i % 2 else len(data)
        bit = rng.randrange(8 * end)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        refusal(path)
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


def test_a_flipped_bit_in_the_configuration_is_noticed(tmp_path: Path) -> None:
    """The one that made norm_eps 1e-1 of 1e-5 and was loaded."""
    path = tmp_path / "model.safetensors"
    data = (models.ZOO / "mamba-linreg.safetensors").read_bytes()
    assert data.count(b"1e-05") == 1
    path.write_bytes(data.replace(b"1e-05", b"1e-01"))
    assert "was altered after it was saved" in refusal(path)


def test_every_bundled_file_is_under_a_checksum() -> None:
    for name in models.names():
        stored = sealed.read(models.ZOO / f"{name}.safetensors")
        assert stored.sealed and stored.metadata["format"] == checkpoint.FORMAT, name


def earlier(path: Path) -> Path:
    """The checkpoint as the format before this one had it: a digest of the tensors, none of the header."""
    stored = sealed.read(path)
    metadata = {**stored.metadata, "format": sealed.EARLIER, "digest": sealed.digest(stored.tensors())}
    safetensors.torch.save_file(stored.tensors(), path, metadata)
    return path


def test_a_checkpoint_of_the_earlier_format_is_loaded_with_a_warning_and_renewed(tmp_path: Path) -> None:
    model, path = written(tmp_path)
    old = earlier(path).read_bytes()
    with pytest.warns(UserWarning, match=r"earlier format mambascope-1.*no checksum.*renew") as said:
        loaded = models.load(path)
    assert len(said) == 1 and checkpoint.digest(loaded) == checkpoint.digest(model)
    assert checkpoint.renew(path) and not checkpoint.renew(path)
    new = models.load(path)
    assert checkpoint.digest(new) == checkpoint.digest(model) and (new.cfg, new.card) == (model.cfg, loaded.card)
    path.write_bytes(old[:-3] + bytes([old[-3] ^ 1]) + old[-2:])
    assert "its tensors do not give the digest in its header" in refusal(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_outline_filled_is_the_model(architecture: str, tmp_path: Path) -> None:
    """What was never drawn is as if it had been: output, gradients, flags, and no tensor without memory is left."""
    model, path = written(tmp_path, architecture)
    loaded = models.load(path)
    width = model.cfg.d_in
    x = torch.randn(2, 5, width)
    assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)
    for one in (model, loaded):
        one(x).square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == theirs[name].requires_grad and not parameter.is_meta
        assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=0)
    beside = [part for part in vars(loaded).values() if isinstance(part, torch.nn.Module)]
    for part in (loaded, *beside):
        assert not any(value.is_meta for value in (*part.parameters(), *part.buffers()))
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.slow
def test_loading_does_not_import_a_compiler() -> None:
    """torch's arithmetic on its meta device does, which takes seconds at every start."""
    names = [name for name in models.names() if "transformer" not in name or name.startswith("linear")]
    lines = f"import sys, models\nfor name in {names}: models.load(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stdout.split()
    assert "torch._dynamo" not in loaded and "torch.fx.experimental.symbolic_shapes" not in loaded
    assert "models.outline" in loaded


def test_the_outline_of_a_model_leaves_a_fresh_s4_as_it_is() -> None:
    """What an S4 starts from is computed once and kept: not from the outline that came first."""
    from models.outline import outline
    from models.scan import dplr

    dplr._legs.cache_clear()
    outline("s4", SMALL)
    assert not any(parameter.is_meta for parameter in models.build("s4", **SMALL).parameters())


@pytest.mark.parametrize(
    "config",
    [
        {"n_layers": 10**6},
        {"n_layers": 10**30},
        {"d_model": 10**6},
        {"d_state": 2**31 - 1},
        {"d_model": 2**31 - 1, "d_state": 2**31 - 1},
        {"expand": 10**6, "d_conv": 10**6, "dt_rank": 10**6},
        {"d_model": 10**400},
        {"norm_eps": 10**400},
        {"norm_eps": float("nan")},
        {"norm_eps": float("inf")},
        {"norm_eps": -1.0},
        {"dt_rank": 0},
        {"d_state": [[[]]]},
        {"head": {"a": 1}},
        {"selective": None},
    ],
)
def test_a_config_that_the_file_does_not_have_the_numbers_for(config: dict[str, Any], tmp_path: Path) -> None:
    """Nothing larger than the file is made on the way: a model of a million layers took all memory."""
    _, path = written(tmp_path)
    refusal(changed(path, config))


def test_a_config_of_the_whole_kind_is_bounded_by_its_file(tmp_path: Path) -> None:
    for architecture, config in [
        ("s4", {"d_state": 10**6}),
        ("transformer", {"d_mlp": 10**9}),
        ("linear_attention", {"d_mlp": 10**9}),
        ("theory", {"d_state": 10**9}),
    ]:
        _, path = written(tmp_path, architecture)
        assert "does not fit its own" in refusal(changed(path, config))
    # A length that no weight has: the model is built, and what it never uses takes no memory.
    _, path = written(tmp_path, "transformer")
    assert models.load(changed(path, {"n_ctx": 10**8})).cfg.n_ctx == 10**8


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_another_kind_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    _, path = written(tmp_path)
    name = "blocks.1.mixer.D"
    with pytest.raises(BadArgument, match=f"{name} holds {str(kind).removeprefix('torch.')}"):
        models.load(changed(path, **{name: torch.ones(16).to(kind)}))


@pytest.mark.parametrize("levels", [250, 5000, 100_000])
def test_texts_that_are_nested_too_deep_are_refused(levels: int, tmp_path: Path) -> None:
    """On every Python: what its own reader and writer bear differs from version to version."""
    _, path = written(tmp_path)
    stored = sealed.read(path)
    deep = '{"a":' * levels + "1" + "}" * levels
    for name in ("config", "card"):
        path.write_bytes(sealed.pack(stored.tensors(), {**stored.metadata, name: deep}))
        assert f"the {name} in its header is nested too deep" in refusal(path)
    nested: Any = 1
    for _ in range(levels):
        nested = {"a": nested}
    with pytest.raises(CheckpointError, match="the card is not JSON"):
        checkpoint.save(models.build("mamba", **SMALL), tmp_path / "other", nested)


def test_what_is_no_source_of_a_model(tmp_path: Path) -> None:
    for source in (None, 3, b"mamba-linreg", [], torch.zeros(3), object()):
        assert "a model has a bundled name, a path or is a module" in refusal(source)
    for source in ("n" * 300, "n" * 300 + ".safetensors", f"{tmp_path}/{'n' * 300}", "a\0b", "a/b\0c.safetensors", ""):
        refusal(source)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "it is a pipe" in refusal(tmp_path / "pipe.safetensors")
    assert "it is a device" in refusal("/dev/zero")
    for path in ("n" * 300, "a\0b", None, 3):
        with pytest.raises(CheckpointError) as caught:
            unchecked(checkpoint.save)(models.build("mamba", **SMALL), path, {})
        assert "\n" not in str(caught.value)
