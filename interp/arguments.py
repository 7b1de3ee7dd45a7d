"""Checks at the border of ``interp``: refuse the argument that would give a wrong number."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch

from hooks.errors import BadArgument, told, unknown
from hooks.sealed import TooDeep, json_value

Made = TypeVar("Made")
T = TypeVar("T")
LONGEST = 2**31 - 1


def known_options(kind: str, function: Callable[..., Any], config: Mapping[str, Any]) -> None:
    """Nothing, if every key of ``config`` is a parameter of ``function``; else ``BadArgument``.

    The check comes before the call because Python's own ``TypeError`` names the function and not
    the options that there are, and because a ``TypeError`` raised inside ``function`` would look
    the same.
    """
    options = [name for name in inspect.signature(function).parameters if name != "self"]
    for asked in config:
        if asked not in options:
            raise BadArgument(unknown(f"option of {kind}", asked, options))


def chosen(
    kind: str, name: str, table: Mapping[str, Callable[..., Made]], config: Mapping[str, Any]
) -> Callable[..., Made]:
    """``table[name]``, once it is sure that it can be called with ``config``.

    Raises ``BadArgument`` for a name or an option that there is not, with the nearest that there is, and for an option
    that has no default and was not given.
    """
    if not isinstance(name, str) or name not in table:
        raise BadArgument(unknown(kind, name, table))
    known_options(name, table[name], config)
    parameters = inspect.signature(table[name]).parameters
    absent = [p for p, option in parameters.items() if option.default is option.empty and p not in {"self", *config}]
    if absent:
        raise BadArgument(f'{kind} "{name}" needs {" and ".join(absent)}; give {absent[0]}=…')
    return table[name]


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value``, if it is an int in ``least … most``; else ``BadArgument`` says which range.

    No tensor has an axis longer than 2³¹ - 1 that a computer could hold: that is the most where none is given.

    A bool is refused although Python counts it as an int: ``d=True`` is a slip, not one dimension.
    """
    top = LONGEST if most is None else most
    if not (isinstance(value, int) and not isinstance(value, bool) and least <= value <= top):
        large = isinstance(value, int) and value > top
        bound = f"at least {least}" if most is None and not large else f"from {least} to {top}"
        raise BadArgument(f"{name}={told(value)} does not work; give a whole number, {bound}")
    assert isinstance(value, int)
    return value


def between(name: str, value: object, low: float, high: float = math.inf, hint: str = "") -> float:
    """``value`` as a float, if it is a finite number in ``low … high``; else ``BadArgument`` says which range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is made a float: a whole number may be too large to be one.
    if not (number and low <= value <= min(high, sys.float_info.max)):  # type: ignore[operator]
        bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise BadArgument(f"{name}={told(value)} does not work; give a number {bound}{hint}")
    return float(value)  # type: ignore[arg-type]


def one_of(name: str, value: object, options: Collection[str]) -> str:
    """``value``, if it is one of ``options``; else ``BadArgument`` with the nearest of them."""
    if not isinstance(value, str) or value not in options:
        raise BadArgument(unknown(f"value of {name}", value, options))
    return value


def listed(name: str, value: Any) -> list[Any]:
    """``value`` as a list: one text or number by itself, or what a list, tuple, set or range holds; else
    ``BadArgument``.
    """
    if isinstance(value, str | int):
        return [value]
    if isinstance(value, list | tuple | set | frozenset | range):
        return list(value)
    raise BadArgument(f"{name}={told(value)} does not work; give one or a list of them")


def named_values(flag: str, given: Collection[str]) -> dict[str, Any]:
    """``("d=5", "tokens=joint")`` as ``{"d": 5, "tokens": "joint"}``: values are read as JSON, else as text.

    Raises ``BadArgument`` for an entry that is not name=value; ``flag`` is the option's name in the message.
    """
    options: dict[str, Any] = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise BadArgument(f'--{flag} takes name=value, not "{entry}"; e.g. --{flag} d=5')
        try:
            options[key] = json_value(value)
        except TooDeep as error:
            raise BadArgument(f"--{flag} {key}: {error}") from error
        except ValueError:
            options[key] = value
    return options


def name_and_options(flag: str, text: str) -> tuple[str, dict[str, Any]]:
    """``"lasso:alpha=0.1"`` as ``("lasso", {"alpha": 0.1})``; the options are joined by commas, or absent."""
    name, _, rest = text.partition(":")
    return name, named_values(f"{flag} name:", rest.split(",")) if rest else {}


def usable_device(name: str) -> torch.device:
    """The device called ``name``, if this machine has it; else ``BadArgument`` with those that it has, and why not."""
    have = ["cpu"]
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        raise BadArgument(f'device "{name}": torch {torch.__version__} {why}; there is: cpu; give --device cpu')
    if torch.cuda.is_available():
        have += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        have.append("mps")
    return torch.device(one_of("device", name, have))
