"""What an analysis found: config, table, arrays, checks and provenance, in a folder that is whole.

``Result.load(folder)`` gives the numbers back without the model and without unpickling anything.
result.json is sealed and has the size and the checksum of the files beside it that are read back, so that no
damaged number comes back.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hooks import sealed
from hooks.brief import brief
from hooks.errors import BadArgument, told
from interp.machine.files import strict_json, write_whole
from interp.machine.folders import clear_dead, whole_folder
from interp.printed import ROWS, folded, lines_of

FORMAT = "mambascope-result-2"
EARLIER = "mambascope-result-1"
"""The format from before results had checksums; its folders are read with a warning."""
FILES = ("result.json", "table.csv", "arrays.npz")
Figures = Mapping[str, Callable[[BufferedIOBase], Any] | bytes]
"""A file's name and its bytes, or a function that writes them into the file that it is given."""


@dataclass(frozen=True)
class Check:
    """A statement that must hold for the numbers to mean anything: ``value`` within ``bound``."""

    name: str
    value: float
    bound: float
    ok: bool

    @staticmethod
    def at_most(name: str, value: float, bound: float) -> Check:
        """``value <= bound``; NaN fails."""
        return Check(name, float(value), float(bound), bool(value <= bound))

    @staticmethod
    def at_least(name: str, value: float, bound: float) -> Check:
        """``value >= bound``; NaN fails."""
        return Check(name, float(value), float(bound), bool(value >= bound))


@dataclass(frozen=True, eq=False)
class Result:
    """Config, table, arrays, checks and provenance of one analysis.

    ``config`` and ``provenance`` are JSON values. ``provenance`` should hold what
    :func:`interp.machine.provenance.provenance` gives and ``weights``, a digest of the model's (or a
    mapping of several models'): with the config and the commit it names the folder. A missing text
    in ``table`` comes back from the disk as the empty text; numbers come back to the last bit.
    """

    config: dict[str, Any]
    table: pd.DataFrame
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    checks: Sequence[Check] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where it was saved or loaded from; None before."""

    __repr__ = brief

    def __post_init__(self) -> None:
        # JSON's own view of them, so that a saved and a loaded result are equal.
        for name in ("config", "provenance"):
            try:
                sealed.check_depth(getattr(self, name))
            except sealed.TooDeep as error:
                raise BadArgument(f"{name} cannot be kept: {error}") from error
            object.__setattr__(self, name, json.loads(strict_json(getattr(self, name))))
        object.__setattr__(self, "checks", tuple(self.checks))
        for column, kind in self.table.dtypes.items():
            if not (_NUMBERS.fullmatch(str(kind)) or _TEXT.fullmatch(str(kind))):
                raise BadArgument(f'column "{column}" has type {kind}; give plain numbers, booleans or text')
        arrays = {name: np.asarray(value) for name, value in self.arrays.items()}
        for name, value in arrays.items():
            if value.dtype.hasobject:
                raise BadArgument(
                    f'array "{name}" holds Python objects, which only a pickle could keep; '
                    "give numbers, booleans or text"
                )
        object.__setattr__(self, "arrays", arrays)

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    @property
    def digest(self) -> str:
        """Ten hex digits of config, seed, weights and commit: equal runs have equal names.

        A seed in the config counts with it. Where the code was dirty the commit says so, and two
        different dirty states share a name: the later run replaces the earlier.
        """
        named = {key: self.provenance.get(key) for key in ("seed", "weights", "commit", "dirty")}
        text = json.dumps({"config": self.config, **named}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def save(self, out: Path | str, *, analysis: str, figures: Figures | None = None) -> Result:
        """Write ``out/<analysis>/<task>-<model>-<digest>/`` whole, and return it with its folder.

        An identical run's folder is replaced in one step. Raises :class:`BadArgument` when ``out``
        cannot be written, :class:`RunFailed` when the disk is full; what was there then stays.
        ``figures`` are drawn once the numbers are on the disk (:meth:`illustrate`).
        """
        config = self.config
        models = [config["model"]] if config.get("model") else config.get("models") or ["none"]
        name = f"{_slug(config.get('task', 'none'))}-{'+'.join(map(_slug, models))[:60]}-{self.digest}"
        final = Path(out) / analysis / name
        with whole_folder(final) as folder:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **self.arrays)  # type: ignore[arg-type]
            beside = {"table.csv": self.table.to_csv(index=False).encode(), "arrays.npz": buffer.getvalue()}
            for file, data in beside.items():
                write_whole(folder / file, data)
            files = {file: {"bytes": len(data), "sha256": _sha256(data)} for file, data in beside.items()}
            head = {**json.loads(self.to_json()), "files": files}
            write_whole(folder / "result.json", sealed.pack_json(head, indent=2))
        saved = Result(config, self.table, self.arrays, self.checks, self.provenance, final)
        saved.illustrate(figures or {})
        return saved

    def illustrate(self, figures: Figures) -> None:
        """Draw ``figures`` into the folder of a saved result, each whole or not at all; the numbers stay as they are.

        Raises what a figure raises, :class:`BadArgument` for a result without a folder, and :class:`RunFailed` when
        the disk is full.
        """
        if self.folder is None:
            raise BadArgument("this result has no folder to draw into; save it first: result.save(out, analysis=…)")
        for file, figure in figures.items():
            if not isinstance(figure, bytes):
                buffer = io.BytesIO()
                figure(buffer)
                figure = buffer.getvalue()
            write_whole(self.folder / file, figure)

    @staticmethod
    def load(path: Path | str) -> Result:
        """The result in the folder ``path``; a damaged or foreign folder is a BadArgument.

        A folder of the format before this one, without checksums, is read with a warning.
        """
        folder = Path(path)
        if not os.path.exists(folder):  # unlike Path.exists no error for a name that is too long
            clear_dead(folder.parent)  # a run that was killed may have moved it aside
        try:
            head = _head(folder)
            files = None if head["format"] == EARLIER else head.get("files", {})
            contents = {name: _content(folder, name, files) for name in FILES[1:]}
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise BadArgument(
                f"{folder} holds no result: {missing} is not there; give a folder that an analysis wrote"
            ) from None
        except sealed.Unreadable as error:
            raise BadArgument(f"the result in {folder} is not to be trusted: {error}; run it again") from error
        try:
            # As text: pandas' guesses would turn a mode called "None" or "NA" into a missing value.
            text = io.StringIO(contents["table.csv"].decode())
            table = pd.read_csv(text, dtype=str, keep_default_na=False, na_filter=False)
            table = _typed(table, head["columns"], int(head["rows"]))
            with np.load(io.BytesIO(contents["arrays.npz"]), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            if sorted(arrays) != sorted(head["arrays"]):
                raise ValueError("arrays.npz holds other arrays than result.json says")
            checks = [Check(c["name"], _number(c["value"]), _number(c["bound"]), bool(c["ok"])) for c in head["checks"]]
            return Result(head["config"], table, arrays, checks, head["provenance"], folder)
        except Exception as error:
            # pandas, numpy and zipfile each have their own errors for a cut or foreign file.
            raise BadArgument(f"the result in {folder} is damaged: {sealed.one_line(error)}; run it again") from error

    def to_json(self) -> str:
        """result.json: everything but the arrays' content; strict JSON, NaN is null."""
        head = {
            "format": FORMAT,
            "config": self.config,
            "checks": [vars(check) for check in self.checks],
            "ok": self.ok,
            "provenance": self.provenance,
            "columns": {str(name): str(kind) for name, kind in self.table.dtypes.items()},
            "rows": len(self.table),
            "table": [dict(zip(self.table.columns, row, strict=True)) for row in _rows(self.table)],
            "arrays": {
                name: {"shape": list(value.shape), "dtype": str(value.dtype)} for name, value in self.arrays.items()
            },
        }
        return strict_json(head, indent=2)

    def summary(self, rows: int = ROWS) -> str:
        """The first ``rows`` rows of the table, the provenance's notes, the checks that do not hold, and the folder."""
        lines = lines_of(self.table, rows)
        for note in self.provenance.get("notes", ()):
            lines += folded(f"note: {note}", indent="      ")
        failed = [check for check in self.checks if not check.ok]
        lines.append(f"checks: {len(self.checks) - len(failed)} of {len(self.checks)} hold")
        for c in failed:
            lines += folded(f"  does not hold: {c.name} ({c.value:.4g}, bound {c.bound:.4g})", indent="      ")
        if self.folder is not None:
            lines.append(f"written: {self.folder}")
        return "\n".join(lines)


def numbers(words: pd.Series, before: str = "") -> pd.Series:
    """The numbers that a column of words holds, as floats: of "10" or, with ``before="k="``, of "k=10"; NaN where a row
    has none. ``table[table.k == 10]`` would be empty without a word if k were text. A column of numbers stays.
    """
    if pd.api.types.is_numeric_dtype(words):
        return words.astype(float)
    found = words.astype(str).str.extract(rf"^{re.escape(before)}(\d+)$", expand=False)
    return found.astype(float)


def _head(folder: Path) -> dict[str, Any]:
    """What result.json says, if it is whole."""
    path = folder / "result.json"
    head, whole = sealed.read_json(path)
    kind = head.get("format") if isinstance(head, dict) else None
    if kind == FORMAT and whole:
        return head
    if kind != EARLIER:
        what = "has no checksum" if kind == FORMAT else f"is of format {told(kind)}, not {told(FORMAT)}"
        raise sealed.Unreadable(path, what)
    warnings.warn(f"{folder} is of the earlier format {EARLIER}, in which nothing is under a checksum", stacklevel=4)
    return head


def _content(folder: Path, name: str, files: Any) -> bytes:
    """The bytes of the file ``name``, if they are those that result.json has the size and the checksum of."""
    if files is None:  # the format before this one
        return sealed.content(folder / name)
    try:
        size, checksum = files[name]["bytes"], files[name]["sha256"]
    except (KeyError, TypeError) as error:
        raise sealed.Unreadable(folder / "result.json", f"does not say the size and the checksum of {name}") from error
    data = sealed.content(folder / name, size)
    if _sha256(data) != checksum:
        raise sealed.Unreadable(folder / name, "was altered after it was saved: it does not give its checksum")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_NUMBERS = re.compile(r"bool|u?int\d+|float\d+")
_TEXT = re.compile(r"object|str|string.*")


def _typed(table: pd.DataFrame, columns: Mapping[str, str], rows: int) -> pd.DataFrame:
    """``table``, read as text, with the column types that it was written with."""
    if list(table.columns) != list(columns) or len(table) != rows:
        raise ValueError("table.csv is not the table that result.json describes")
    typed: dict[str, Any] = {}
    for name, kind in columns.items():
        text = table[name].tolist()
        if kind == "bool":
            typed[name] = np.array([{"True": True, "False": False}[cell] for cell in text], bool)
        elif kind.startswith("float"):
            typed[name] = np.array([float(cell) if cell else math.nan for cell in text], kind)
        elif _NUMBERS.fullmatch(kind):
            typed[name] = np.array([int(cell) for cell in text], kind)
        else:
            typed[name] = pd.Series(text, dtype=table[name].dtype)
    return pd.DataFrame(typed, columns=list(columns))


def _rows(table: pd.DataFrame) -> list[list[Any]]:
    """The rows as Python values; a missing one is None."""
    return [[None if _missing(value) else value for value in row] for row in table.itertuples(index=False, name=None)]


def _missing(value: Any) -> bool:
    return value is pd.NA or value is None or (isinstance(value, float) and math.isnan(value))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _slug(name: Any) -> str:
    """``name`` as one part of a folder's name: the last part of a path, nothing unusual."""
    last = Path(str(name)).name
    return re.sub(r"[^\w.+-]+", "_", last)[:60] or "none"
