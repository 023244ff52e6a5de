"""Checks of option values, with messages that name field, value and allowed range.

Knows: numbers and names. Does not know: what the options mean.
"""

from __future__ import annotations

import difflib
import numbers
from typing import Any


def suggest(name: str, known: list[str]) -> str:
    """' Did you mean ...?' for a misspelt name, or an empty string."""
    by_folded = {option.casefold(): option for option in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""


def check_range(
    field: str, value: Any, low: float, high: float, *, open_ends: bool = False
) -> None:
    """Refuse what is no number between `low` and `high`.

    Raises:
        TypeError: not a number.
        ValueError: out of range; the message names field, range and value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{field} must be a number, got {value!r}")
    plain = float(value)
    inside = low < plain < high if open_ends else low <= plain <= high
    if not inside:
        left, right = "()" if open_ends else "[]"
        raise ValueError(f"{field} must be in {left}{low}, {high}{right}, got {value!r}")


def whole_number(field: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int.

    Raises:
        TypeError: not a whole number.
        ValueError: out of range; the message names field, limit and value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{field} must be a whole number, got {value!r}")
    plain = int(value)
    if plain < low:
        raise ValueError(f"{field} must be at least {low}, got {value!r}")
    if high is not None and plain > high:
        raise ValueError(f"{field} must be at most {high}, got {value!r}")
    return plain
