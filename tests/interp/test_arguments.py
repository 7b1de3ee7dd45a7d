"""Arguments are refused in one line that says what was given and what there is."""

from __future__ import annotations

import pytest

from hooks.errors import BadArgument
from interp.arguments import known_options, one_of, whole_number

pytestmark = pytest.mark.contract


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [(0, 1, None), (2.0, 1, None), ("3", 1, None), (True, 0, 5), (6, 0, 5)],
)
def test_what_is_no_number_of_things_is_refused(value: object, least: int, most: int | None) -> None:
    with pytest.raises(BadArgument, match=f"d={value!r} does not work") as refused:
        whole_number("d", value, least, most)
    assert f"{least}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_whole_number_in_range_is_given_back() -> None:
    assert [whole_number("d", value, 1, 3) for value in (1, 2, 3)] == [1, 2, 3]
    assert whole_number("d", 10**6, 1) == 10**6


def test_one_of_names_the_nearest() -> None:
    assert one_of("tokens", "joint", ("interleaved", "joint")) == "joint"
    with pytest.raises(BadArgument, match='"jiont"; did you mean "joint"'):
        one_of("tokens", "jiont", ("interleaved", "joint"))
    with pytest.raises(BadArgument, match=r'"3"; .*there is: interleaved, joint'):
        one_of("tokens", 3, ("interleaved", "joint"))


def test_known_options_are_the_parameters_of_the_function() -> None:
    def make(width: int, depth: int = 2) -> int:
        return width * depth

    known_options("thing", make, {"width": 1, "depth": 2})
    with pytest.raises(BadArgument, match='option of thing is called "widht"; did you mean "width"'):
        known_options("thing", make, {"widht": 1})
    with pytest.raises(BadArgument, match="there is: width, depth"):
        known_options("thing", make, {"colour": 1})
