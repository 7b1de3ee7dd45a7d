"""What draws a figure does so under this project's settings of matplotlib, and leaves the session's as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_house_style(font_scale: float = 1.0) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator for ``plot(result)``. matplotlib is loaded when a figure is asked for, not before."""

    def decorate(plot: Callable[P, T]) -> Callable[P, T]:
        @wraps(plot)
        def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
            from interp.plot import house

            with house(font_scale):
                return plot(*args, **kwargs)

        return drawn

    return decorate
