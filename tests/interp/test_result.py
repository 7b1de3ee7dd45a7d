"""Results: what is saved comes back, whole or not at all, in JSON that every parser reads."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pytest

from hooks.errors import BadArgument, RunFailed
from interp.machine import files
from interp.machine.files import strict_json, write_whole
from interp.machine.provenance import commit, provenance, versions
from interp.result import Check, Result, numbers


def make(seed: int = 0, **config: Any) -> Result:
    table = pd.DataFrame(
        {
            "mode": ["mean", "None", "NA", 'a, "b"\n'],
            "k": [0, 5, 10, 20],
            "error": [0.1, float("nan"), float("inf"), 1e-300],
            "single": np.array([0.1, 1 / 3, -0.0, 2.5], dtype=np.float32),
            "ok": [True, False, True, True],
        }
    )
    arrays = {"curve": np.linspace(0, 1, 7), "names": np.array(["a", "bb"]), "n": np.array(3)}
    return Result(
        config={"task": "linreg", "model": "out/runs/mamba linreg", "modes": ("a", "b"), **config},
        table=table,
        arrays=arrays,
        checks=[Check.at_most("identity", 0.0, 1e-6), Check.at_least("share", float("nan"), 0.5)],
        provenance={"seed": seed, "weights": "abc", "commit": "unknown", "dirty": None},
    )


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.contract
def test_numbers_in_words_can_be_compared_as_numbers() -> None:
    table = pd.DataFrame({"k": ["2", "10", "mean", ""], "at": ["k=2", "k=10", "k=5…6", "age=1"]})
    assert table[table.k == 10].empty, "why k is made a number"
    for found in (numbers(table["k"]), numbers(table["at"], "k=")):
        assert found.dtype == np.float64 and table[found == 10].index.tolist() == [1]
        np.testing.assert_array_equal(found, [2, 10, np.nan, np.nan])
    already = pd.Series([3.0, np.nan])
    pd.testing.assert_series_equal(numbers(already), already)
    pd.testing.assert_series_equal(numbers(pd.Series([3, 4])), pd.Series([3.0, 4.0]))


@pytest.mark.contract
def test_a_saved_result_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    result = make()
    saved = result.save(tmp_path, analysis="ablate_delta", figures={"figure.png": b"picture"})
    assert saved.folder is not None
    assert saved.folder.parent == tmp_path / "ablate_delta"
    assert saved.folder.name == f"linreg-mamba_linreg-{result.digest}"
    assert (saved.folder / "figure.png").read_bytes() == b"picture"
    loaded = Result.load(saved.folder)
    pd.testing.assert_frame_equal(loaded.table, result.table, check_exact=True)
    assert loaded.config == result.config
    assert loaded.provenance == result.provenance
    assert repr(loaded.checks) == repr(result.checks)  # repr: NaN differs from itself
    assert set(loaded.arrays) == set(result.arrays)
    for name, value in result.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], value, strict=True)
    assert loaded.digest == result.digest
    assert not loaded.ok


@pytest.mark.contract
def test_json_is_strict_and_says_null_for_nan(tmp_path: Path) -> None:
    head = strict(make().to_json())
    assert head["table"][1]["error"] is None
    assert head["table"][2]["error"] is None
    assert head["table"][0] == {
        "mode": "mean", "k": 0, "error": 0.1, "single": pytest.approx(0.1), "ok": True
    }  # fmt: skip
    assert head["checks"][1]["value"] is None
    assert strict(strict_json({"x": np.float32("nan"), "y": np.arange(2), "z": Path("a/b")})) == {
        "x": None, "y": [0, 1], "z": "a/b"
    }  # fmt: skip
    with pytest.raises(BadArgument, match="set has no place in JSON"):
        strict_json({"x": {1, 2}})


@pytest.mark.contract
def test_nan_fails_a_check() -> None:
    assert Check.at_most("a", 1.0, 1.0).ok
    assert not Check.at_most("a", 1.1, 1.0).ok
    assert not Check.at_most("a", float("nan"), 1.0).ok
    assert not Check.at_least("a", float("nan"), 1.0).ok
    assert Result({}, pd.DataFrame(), checks=[Check.at_most("a", 0.0, 1.0)]).ok


@pytest.mark.contract
def test_the_name_depends_on_config_seed_weights_and_commit() -> None:
    base = make().digest
    assert make().digest == base
    assert make(seed=1).digest != base
    assert make(n=3).digest != base
    for key, value in (("weights", "other"), ("commit", "1234"), ("dirty", True)):
        other = make()
        other.provenance[key] = value
        assert other.digest != base, key
    unrelated = make()
    unrelated.provenance["seconds"] = 12.5
    assert unrelated.digest == base


@pytest.mark.contract
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"models": ["out/a", "out/b", "/tmp/c"]}, "linreg-a+b+c-"),
        ({"models": ["mamba-linreg", "out/b"]}, "linreg-mamba-linreg+b-"),
        ({"model": "out/a", "models": ["out/b"]}, "linreg-a-"),
        ({"models": []}, "linreg-none-"),
        ({}, "linreg-none-"),
        ({"models": [f"run{i:03}" for i in range(100)]}, "linreg-run000+"),
    ],
)
def test_a_folder_is_named_after_every_model(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    saved = Result({"task": "linreg", **config}, pd.DataFrame({"k": [1]})).save(tmp_path, analysis="a").folder
    assert saved is not None
    assert saved.name.startswith(named) and len(saved.name) < 100


@pytest.mark.contract
def test_an_identical_run_replaces_the_folder_whole(tmp_path: Path) -> None:
    first = make().save(tmp_path, analysis="a", figures={"old.svg": b"old"}).folder
    second = make().save(tmp_path, analysis="a", figures={"new.svg": b"new"}).folder
    assert first == second
    assert second is not None
    assert sorted(os.listdir(second)) == ["arrays.npz", "new.svg", "result.json", "table.csv"]
    assert os.listdir(tmp_path / "a") == [second.name]


@pytest.mark.contract
@pytest.mark.parametrize("error", [RuntimeError("figure"), KeyboardInterrupt()])
def test_a_failing_figure_leaves_the_numbers(tmp_path: Path, error: BaseException) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        make().save(tmp_path, analysis="a", figures={"figure.png": fail})
    (folder,) = (tmp_path / "a").iterdir()
    assert sorted(os.listdir(folder)) == ["arrays.npz", "result.json", "table.csv"]
    Result.load(folder).illustrate({"figure.png": lambda file: file.write(b"whole")})
    assert (folder / "figure.png").read_bytes() == b"whole"
    with pytest.raises(BadArgument, match="no folder"):
        make().illustrate({"figure.png": b"whole"})


@pytest.mark.contract
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def _cut(folder: Path) -> None:
    data = (folder / "arrays.npz").read_bytes()
    (folder / "arrays.npz").write_bytes(data[: len(data) // 2])


def _foreign(folder: Path) -> None:
    (folder / "result.json").write_text('{"format": "somebody-else"}')


def _shorter(folder: Path) -> None:
    lines = (folder / "table.csv").read_text().splitlines(keepends=True)
    (folder / "table.csv").write_text("".join(lines[:2]))


def _pickled(folder: Path) -> None:
    np.savez(folder / "arrays.npz", curve=np.array([{"a": 1}], dtype=object), names=1, n=1)


def _no_json(folder: Path) -> None:
    (folder / "result.json").write_text("[1, 2")


def _gone(folder: Path) -> None:
    (folder / "table.csv").unlink()


@pytest.mark.contract
@pytest.mark.parametrize("harm", [_cut, _foreign, _shorter, _pickled, _no_json, _gone])
def test_damaged_and_foreign_folders_are_refused_in_one_line(tmp_path: Path, harm: Any) -> None:
    folder = make().save(tmp_path, analysis="a").folder
    assert folder is not None
    Result.load(folder)
    harm(folder)
    with pytest.raises(BadArgument) as refused:
        Result.load(folder)
    assert "\n" not in str(refused.value)
    assert folder.name in str(refused.value)


@pytest.mark.contract
@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["result.json", "table.csv", "arrays.npz"])
def test_no_flipped_bit_and_no_cut_is_a_result(name: str, count: int, tmp_path: Path) -> None:
    folder = make().save(tmp_path, analysis="a").folder
    assert folder is not None
    data, rng = (folder / name).read_bytes(), random.Random(count)
    damaged = [data[: rng.randrange(len(data))] for _ in range(count // 10)] + [data + b"\n"]
    for _ in range(count):
        changed, bit = bytearray(data), rng.randrange(8 * len(data))
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(changed))
    for content in damaged:
        (folder / name).write_bytes(content)
        with pytest.raises(BadArgument) as refused:
            Result.load(folder)
        assert "\n" not in str(refused.value) and name in str(refused.value)
    (folder / name).write_bytes(data)
    assert Result.load(folder).digest == make().digest


@pytest.mark.contract
def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    """Each whole, and not of one run."""
    folder, other = make().save(tmp_path, analysis="a").folder, make(seed=1, n=3).save(tmp_path, analysis="a").folder
    assert folder is not None and other is not None
    other_table = Result.load(other).table.assign(k=[1, 2, 3, 4])
    table = (folder / "table.csv").read_text()
    (folder / "table.csv").write_text(other_table.to_csv(index=False))
    with pytest.raises(BadArgument, match=r"table\.csv"):
        Result.load(folder)
    (folder / "table.csv").write_text(table)
    Result.load(folder)


@pytest.mark.contract
def test_a_result_of_the_earlier_format_is_read_with_a_warning(tmp_path: Path) -> None:
    folder = make().save(tmp_path, analysis="a").folder
    assert folder is not None
    head = json.loads((folder / "result.json").read_text())
    old = {key: value for key, value in head.items() if key not in ("seal", "files")}
    (folder / "result.json").write_text(json.dumps({**old, "format": "mambascope-result-1"}))
    with pytest.warns(UserWarning, match="earlier format mambascope-result-1"):
        assert Result.load(folder).digest == make().digest
    # A present file that has lost its seal does not become an earlier one.
    (folder / "result.json").write_text(json.dumps({**old, "format": head["format"]}))
    with pytest.raises(BadArgument, match="has no checksum"):
        Result.load(folder)


@pytest.mark.contract
def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = make().save(tmp_path, analysis="a").folder
    assert folder is not None
    for path in (tmp_path / ("n" * 300), Path("a\0b"), tmp_path / "none", "/dev/zero"):
        with pytest.raises(BadArgument) as refused:
            Result.load(path)
        assert "\n" not in str(refused.value)
    for text in ("[" * 250 + "]" * 250, "[" * 5000 + "]" * 5000, "[" * 100_000):
        (folder / "result.json").write_text(text)
        with pytest.raises(BadArgument, match="nested too deep"):
            Result.load(folder)
    (folder / "result.json").unlink()
    os.mkfifo(folder / "result.json")
    with pytest.raises(BadArgument, match="it is a pipe"):
        Result.load(folder)


@pytest.mark.contract
def test_what_cannot_be_kept_is_refused_at_once() -> None:
    with pytest.raises(BadArgument, match="Python objects"):
        Result({}, pd.DataFrame(), arrays={"a": np.array([{}], dtype=object)})
    with pytest.raises(BadArgument, match='column "when"'):
        Result({}, pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}))
    nested: dict[str, Any] = {}
    nested["itself"] = [nested]
    with pytest.raises(BadArgument, match="config cannot be kept: it is nested more than 200"):
        Result(nested, pd.DataFrame())


@pytest.mark.contract
def test_an_unwritable_out_is_a_wrong_argument(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BadArgument, match="another folder with --out"):
        make().save(file, analysis="a")


@pytest.mark.contract
def test_summary_names_the_failed_check_and_the_folder(tmp_path: Path) -> None:
    saved = make().save(tmp_path, analysis="a")
    text = saved.summary(rows=2)
    assert "2 more rows" in text
    assert "does not hold: share" in text
    assert str(saved.folder) in text


@pytest.mark.contract
def test_provenance_says_where_a_number_came_from() -> None:
    found = provenance(seed=3, device="cpu", seconds=1.23456)
    assert found["seed"] == 3
    assert found["threads"] == 1
    assert found["seconds"] == 1.235
    assert set(versions()) == {"python", "torch", "numpy", "mambascope"}
    assert versions(("no-such-package",))["no-such-package"] == "not installed"
    assert set(commit()) == {"commit", "dirty"}
    assert "/" not in json.dumps(found)


@pytest.mark.contract
def test_a_copied_folder_still_loads(tmp_path: Path) -> None:
    folder = make().save(tmp_path, analysis="a").folder
    assert folder is not None
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert Result.load(tmp_path / "elsewhere").digest == make().digest
