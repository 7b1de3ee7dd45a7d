"""build, load and names: what is asked for by name, and what is said when it does not exist."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from hooks.errors import BadArgument, TooLarge
from models import checkpoint

SMALL: dict[str, Any] = {"d_model": 8, "n_layers": 2, "d_in": 2}
# The theory models have one layer, as wide as the token, and one output.
SHAPES: dict[str, dict[str, Any]] = {"theory": {"d_in": 2, "d_out": 1}}


@pytest.mark.contract
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_architecture_builds_and_runs(architecture: str) -> None:
    shape = SHAPES.get(architecture, {**SMALL, "d_out": 3})
    model = models.build(architecture, **shape)
    assert model.architecture == architecture and model.card == {}
    assert isinstance(model, models.ARCHITECTURES[architecture])
    assert isinstance(model.cfg, models.CONFIGS[architecture])
    assert model(torch.randn(4, 5, 2)).shape == (4, 5, shape["d_out"])
    # A model with ``step`` carries a state, and at_each_query relies on that; the transformer has none.
    assert hasattr(model, "step") == (architecture != "transformer")
    if hasattr(model, "step"):
        assert len(model(torch.randn(4, 5, 2), return_state=True)[1]) == shape.get("n_layers", 1)
    assert models.load(model) is model


@pytest.mark.contract
def test_the_tables_name_the_same_architectures() -> None:
    assert list(models.ARCHITECTURES) == list(models.CONFIGS)
    assert sorted(models.names()) == models.names()
    assert len(set(models.__all__)) == len(models.__all__) and all(hasattr(models, name) for name in models.__all__)


def test_the_global_seed_draws_a_model() -> None:
    def digest(seed: int) -> str:
        torch.manual_seed(seed)
        return checkpoint.digest(models.build("mamba", **SMALL))

    assert digest(1) == digest(1) != digest(2)


@pytest.mark.parametrize(
    "architecture, config, reason",
    [
        (
            "mambo",
            {},
            'no architecture is called "mambo"; did you mean "mamba"? (there is: mamba, s4d',
        ),
        (
            "mamba",
            {"d_sate": 4},
            'no field of the mamba config is called "d_sate"; did you mean "d_state"',
        ),
        ("s4d", {"expand": 2}, 'no field of the s4d config is called "expand"'),
        ("mamba", {"d_model": "64"}, "d_model='64': a mamba config takes int there, not str"),
        ("mamba", {"d_model": 64.0}, "d_model=64.0: a mamba config takes int there, not float"),
        ("mamba", {"n_layers": True}, "n_layers=True: a mamba config takes int there, not bool"),
        ("mamba", {"selective": 1}, "selective=1: a mamba config takes bool there, not int"),
        (
            "mamba",
            {"norm_eps": None},
            "norm_eps=None: a mamba config takes float there, not NoneType",
        ),
        (
            "mamba",
            {"dt_rank": 1.5},
            "dt_rank=1.5: a mamba config takes int | None there, not float",
        ),
        ("mamba", {"head": "regresion"}, 'head="regresion"'),
        ("mamba", {"d_state": 0}, "d_state=0"),
    ],
)
def test_what_cannot_be_built(architecture: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadArgument) as caught:
        models.build(architecture, **config)
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [{"d_model": 4096, "n_layers": 4096}, {"d_model": 256, "n_layers": 10**6}, {"expand": 10**9}]
)
def test_what_no_memory_holds_is_refused_before_it_is_made(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no number alone is large: 4096 layers of width 4096 have 4e11 weights."""
    monkeypatch.setattr("models.outline.free_memory", lambda device: 16 * 10**9)
    with pytest.raises(TooLarge, match=r"takes about [\d,]+ GB, and 16 GB are free"):
        models.build("mamba", **{"d_model": 8, "n_layers": 2, **config})


def test_what_can_be_built() -> None:
    assert models.build("mamba", **SMALL, dt_rank=None).cfg.rank == 1
    assert models.build("mamba", **SMALL, dt_rank=3).cfg.rank == 3
    assert models.build("mamba", **SMALL, norm_eps=1).cfg.norm_eps == 1


def test_a_bundled_name_wins_and_a_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, run = tmp_path / "zoo", tmp_path / "tiny"
    zoo.mkdir()
    run.mkdir()
    checkpoint.save(models.build("mamba", **SMALL), zoo / "tiny.safetensors", {"from": "zoo"})
    checkpoint.save(models.build("mamba", **SMALL), run / "model.safetensors", {"from": "run"})
    monkeypatch.setattr(models, "ZOO", zoo)
    monkeypatch.chdir(tmp_path)
    assert models.names() == ["tiny"]
    assert models.load("tiny").card == {"from": "zoo"}
    for source in ("./tiny", run, "tiny/model.safetensors"):
        assert models.load(source).card == {"from": "run"}


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "mamba-linreg.safetensors").touch()
    monkeypatch.setattr(models, "ZOO", zoo)
    (tmp_path / "killed" / "resume").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    reasons = {
        "mamba-lingre": 'no bundled model is called "mamba-lingre"; did you mean "mamba-linreg"?',
        "out/none": 'there is no file or folder "out/none"',
        "state-spaces/mamba-130m-hf": "a Hugging Face model is loaded with transformers first",
        "gone.safetensors": 'there is no file "gone.safetensors"',
        str(tmp_path / "killed"): "has not finished: the same command with the same --out goes on with it",
        str(tmp_path / "other"): "holds no model.safetensors, so it is no run folder",
        nn.Linear(2, 2): "a Linear cannot be loaded",
    }
    for source, reason in reasons.items():
        with pytest.raises(BadArgument) as caught:
            models.load(source)
        assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.architecture
def test_transformers_is_imported_inside_functions_only() -> None:
    """So that who loads no model of it does not depend on its import, which binds whatever
    mamba_ssm it finds.
    """
    folder = Path(models.__file__).parent
    found: dict[str, list[bool]] = {}
    for file in folder.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inner = {node for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("transformers", "mamba_ssm")):
                found.setdefault(file.name, []).append(node in inner)
    assert found.get("pretrained.py") and all(found["pretrained.py"])
    assert "__init__.py" not in found and "checkpoint.py" not in found
