"""Checkpoints: what is saved comes back bit for bit, and every other file is refused with one
line that says why.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch.testing import assert_close

import models
from hooks import sealed
from hooks.errors import RunFailed
from models import checkpoint
from models.checkpoint import CheckpointError

pytestmark = pytest.mark.contract

SMALL: dict[str, Any] = {"d_model": 8, "n_layers": 2, "d_state": 3, "d_in": 2, "d_out": 1}
CARD = {
    "task": "linreg",
    "task_config": {"d": 2},
    "recipe": {"steps": 10},
    "errors": [0.5, 0.25],
    "seconds": 1.5,
}


def saved(folder: Path, architecture: str = "mamba", **config: Any) -> tuple[models.Stack, Path]:
    model = models.build(architecture, **{**SMALL, **config})
    checkpoint.save(model, folder / "model.safetensors", CARD)
    return model, folder / "model.safetensors"


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Path:
    """The file again, with its tensors and header changed and a seal that fits."""
    stored = sealed.read(path)
    tensors, metadata = stored.tensors(), dict(stored.metadata)
    change(tensors, metadata)
    path.write_bytes(sealed.pack(tensors, metadata))
    return path


def refusal(path: Path) -> str:
    """The one line with which ``path`` is refused, by load and by read where that is the reader's
    to see.
    """
    with pytest.raises(CheckpointError) as caught:
        models.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "architecture, config",
    [
        ("mamba", {}),
        ("mamba", {"selective": False}),
        ("mamba", {"head": "classification", "d_out": 3, "bias": True, "conv_bias": False}),
        ("mamba", {"head": "lm", "d_out": 11}),
        ("mamba", {"head": "lm", "d_out": 11, "tie_embeddings": False}),
        ("s4d", {}),
    ],
)
def test_what_is_saved_comes_back(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    model, path = saved(tmp_path, architecture, **config)
    back = models.load(path)
    assert back.cfg == model.cfg and back.card == CARD and back.architecture == architecture
    assert not back.training
    assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randint(11, (2, 5)) if config.get("head") == "lm" else torch.randn(2, 5, 2)
    assert_close(back(x), model(x), rtol=0, atol=0)
    if config.get("head") == "lm":
        assert (back.head.linear.weight is back.embed.table.weight) == back.cfg.tie_embeddings
    assert checkpoint.digest(back) == checkpoint.digest(model)
    assert models.load(tmp_path).cfg == model.cfg


def test_dtypes_are_those_of_the_file(tmp_path: Path) -> None:
    model = models.build("mamba", **SMALL).double()
    checkpoint.save(model, tmp_path / "m.safetensors", {})
    back = models.load(tmp_path / "m.safetensors")
    assert {p.dtype for p in back.parameters()} == {torch.float64}
    assert (
        checkpoint.digest(back)
        == checkpoint.digest(model)
        != checkpoint.digest(models.build("mamba", **SMALL).double())
    )


def test_loading_leaves_the_random_state_and_the_file_alone(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    before, content = torch.get_rng_state(), path.read_bytes()
    models.load(path)
    assert torch.equal(before, torch.get_rng_state())
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["model.safetensors"]


def test_digest_is_of_the_tensors_alone(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    digest = checkpoint.digest(model)
    model.card = {"other": 1}
    model.eval()
    assert checkpoint.digest(model) == digest == checkpoint.digest(models.load(path)) and len(digest) == 64
    with torch.no_grad():
        model.blocks[1].mixer.D[3] += 1e-7
    assert checkpoint.digest(model) != digest


def test_header_holds_no_path_and_no_host(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert sorted(metadata) == ["architecture", "card", "config", "format", "seal"]
    text = json.dumps(metadata)
    assert str(tmp_path) not in text and os.uname().nodename not in text


@pytest.mark.parametrize(
    "card, reason",
    [
        ({"recipe": {"out": "/data/runs/one"}}, "card.recipe.out holds an absolute path"),
        ({"recipe": ["train --out ~/runs/one"]}, "card.recipe[0] holds an absolute path"),
        ({"command": "train --out=C:\\runs"}, "card.command holds an absolute path"),
        ({"versions": {"host": "anything"}}, "card.versions.host would name the machine"),
        ({"error": float("nan")}, "the card is not JSON"),
        ({"model": torch.zeros(1)}, "the card is not JSON"),
    ],
)
def test_cards_that_tell_too_much_are_refused(card: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(models.build("mamba", **SMALL), tmp_path / "m.safetensors", card)
    assert str(caught.value).startswith(reason) and not os.listdir(tmp_path)


def test_harmless_cards_pass() -> None:
    checkpoint.check_card(
        {
            "unit": "error/d",
            "share": "3/4/5",
            "url": "https://a.org/b/c",
            "out": "out/run",
            "ratio": "x /y",
            "n": None,
        }
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files(share: float, tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert ("is truncated" if share else "is empty") in refusal(path)


def test_every_kind_of_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    assert "is a pickle" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "is a pickle" in refusal(path)
    path.write_text("these are notes, not numbers\n" * 20)
    assert "is not a safetensors file" in refusal(path)
    path.write_text("{}")
    assert "is not a safetensors file" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(path)
    path.write_bytes(random.Random(0).randbytes(500))
    assert "is not a safetensors file" in refusal(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    assert "was not written by this project" in refusal(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    assert "is of format 'pt'; this version reads \"mambascope-2\"" in refusal(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"format": checkpoint.FORMAT})
    assert "its header lacks architecture, config, card, seal" in refusal(path)
    path.unlink()
    assert "there is no file" in refusal(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A file that would run code when unpickled does not run it, whatever it is called."""
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    path = tmp_path / "model.safetensors"
    for write in (lambda: path.write_bytes(pickle.dumps(Bomb())), lambda: torch.save(Bomb(), path)):
        write()
        refusal(path)
        assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert mark.exists()


def test_altered_tensors_are_noticed(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert "was altered after it was saved" in refusal(path)


def mutations() -> dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, str]], Any], str]]:
    """What is done to (tensors, metadata) of a good file, and what its refusal has to say."""

    def config(metadata: dict[str, str], **fields: Any) -> None:
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **fields})

    name = "blocks.1.mixer.D"
    return {
        "missing tensor": (lambda t, m: t.pop(name), f"{name} is missing"),
        "extra tensor": (
            lambda t, m: t.update(extra=torch.zeros(1)),
            "extra is not one of its tensors",
        ),
        "wrong shape": (
            lambda t, m: t.update({name: torch.zeros(3)}),
            f"{name} has shape (3,), its config says (16,)",
        ),
        "another depth": (lambda t, m: config(m, n_layers=1), "is not one of its tensors"),
        "NaN": (lambda t, m: t[name].fill_(torch.nan), f"{name} holds NaN"),
        "inf": (lambda t, m: t[name][2:3].fill_(-torch.inf), f"{name} holds inf"),
        "architecture": (
            lambda t, m: m.update(architecture="mambo"),
            'no architecture is called "mambo"; did you mean',
        ),
        "config field": (
            lambda t, m: config(m, d_stat=3),
            'no field of the mamba config is called "d_stat"',
        ),
        "config type": (lambda t, m: config(m, d_state="3"), "d_state='3'"),
        "config value": (lambda t, m: config(m, d_state=0), "d_state=0"),
        "config JSON": (lambda t, m: m.update(config="{"), "the config in its header is not JSON"),
        "card kind": (
            lambda t, m: m.update(card="[]"),
            "the card in its header is not a JSON object",
        ),
    }


@pytest.mark.parametrize("what", mutations())
def test_files_that_contradict_themselves(what: str, tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    change, reason = mutations()[what]
    assert models.load(rewritten(path, lambda tensors, metadata: None)).cfg.d_model == 8
    message = refusal(rewritten(path, change))
    assert reason in message and str(path) in message


def test_a_model_with_nan_is_not_saved(tmp_path: Path) -> None:
    model = models.build("mamba", **SMALL)
    with torch.no_grad():
        model.blocks[0].mixer.A_log[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mixer\.A_log holds NaN"):
        checkpoint.save(model, tmp_path / "m.safetensors", {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "number, kind",
    [(errno.ENOSPC, RunFailed), (errno.EACCES, CheckpointError), (errno.EROFS, CheckpointError)],
)
def test_a_failed_write_leaves_the_old_file(
    number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved(tmp_path)
    content = path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(kind, match=os.strerror(number)):
            checkpoint.save(models.build("mamba", **SMALL), path, CARD)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["model.safetensors"]
    checkpoint.save(models.build("mamba", **SMALL), path, CARD)
    assert path.read_bytes() != content


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(models.build("mamba", **SMALL), tmp_path / "m.safetensors", {})
    assert not os.listdir(tmp_path)


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(models.build("mamba", **SMALL), tmp_path / "nowhere" / "m.safetensors", {})


def test_nothing_but_a_regular_file_is_replaced(tmp_path: Path) -> None:
    """A device of the system was: the file took the place of its node."""
    model, pipe, folder = models.build("mamba", **SMALL), tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path, kind in ((pipe, "a pipe"), (folder, "a folder"), (Path(os.devnull), "a device")):
        with pytest.raises(CheckpointError, match=f"cannot be written: it is {kind}, not a regular file"):
            checkpoint.save(model, path, {})
        assert not path.is_file()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "m.safetensors")
    checkpoint.save(model, link, {})
    assert models.load(link)
