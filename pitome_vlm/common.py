"""What every part of the package shares: the version, lazy names, checks of values, whole files.

Nothing here imports torch or another part of the package.
"""

from __future__ import annotations

import difflib
import importlib
import numbers
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that imports public names when they are first used.

    So `pitome-vlm --help` and an lmms-eval or vLLM that serves something else do not wait for
    torch.

    Args:
        package: the importing package, its `__name__`.
        homes: public name to the submodule that defines it.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return load


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


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 file beside its place and move it there, so that no half of it ever stands.

    Args:
        path: replaced where it exists; its folder is made where it does not.
        text: the content.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
