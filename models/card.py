"""What a checkpoint says of itself, printed in a few lines."""

from __future__ import annotations

from typing import Any

from hooks.brief import lines, written


class Card(dict[str, Any]):
    """A dict like any other, whose ``repr`` names what is in it; ``dict(model.card)`` shows every number."""

    def __repr__(self) -> str:
        return lines("card", {key: written(value) for key, value in self.items()})
