"""What all parts of the package share: version, lazy names, checks, words, atomic files.

Nothing here imports torch or another part of the package.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import numbers
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


def counted(count: int, noun: str) -> str:
    """A number and what is counted: "1 image", "2 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def check_range(
    field: str, value: Any, low: float, high: float, *, open_ends: bool = False
) -> None:
    """Check that a value is a number between `low` and `high`, inclusive unless `open_ends`.

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


def check_choice(field: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that a value is one of the allowed words.

    Raises:
        ValueError: it is not; the message names field, choices and value, and suggests the closest.
    """
    if value not in allowed:
        hint = suggest(str(value), list(allowed))
        raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}.{hint}")


def check_flag(field: str, value: Any) -> None:
    """Check that a value is True or False.

    Raises:
        TypeError: it is something else, for instance a number.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True or False, got {value!r}")


def shown(value: Any, longest: int = 100) -> str:
    """A value for a message of one line: its `repr`, cut to `longest` characters."""
    # Only the beginning of long ones is written out: `repr` of gigabytes takes minutes.
    whole = value[: 2 * longest] if isinstance(value, (str, bytes, list, tuple)) else value
    text = re.sub(r"\s+", " ", repr(whole))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def check_text(field: str, text: str) -> str:
    """The text, which can be written and tokenised.

    Raises:
        ValueError: it holds a lone surrogate, half of a character, as a cut emoji or bytes that
            are not UTF-8 leave one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found, before = text[error.start], text[max(0, error.start - 20) : error.start]
        raise ValueError(
            f"{field} holds half of a character (the lone surrogate {found!a}) after "
            f"{shown(before)}; remove it, or write the character whole"
        ) from None
    return text


def require(module: str, extra: str, what: str) -> None:
    """Check that an optional dependency is installed, without importing it.

    Args:
        module: name of the module to find.
        extra: the extra of this package that installs it.
        what: the feature that needs it, for the message: "a plot", "load_in_4bit=True".

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    if importlib.util.find_spec(module) is None:
        name = module.replace("_", "-")
        raise ImportError(f"{what} needs {name}; install it with: {install_hint(extra)}")


def install_hint(extra: str) -> str:
    """How to install an extra: from a clone, because the package is not on PyPI."""
    return f'pip install ".[{extra}]" in a clone of pitome-vlm'


def markdown_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Collection[int] = (),
) -> str:
    """A Markdown table; bars and line breaks in cells are made harmless.

    Args:
        columns: column titles.
        rows: what is shown as text, one per column.
        numbers: indices of the columns that are aligned to the right.
    """
    ruler = ["---:" if index in numbers else "---" for index in range(len(columns))]
    return "\n".join(_markdown_row(row) for row in (columns, ruler, *rows))


def _markdown_row(cells: Sequence[object]) -> str:
    # A bar or a line break in an error message would end the cell.
    texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"


def read_json(path: str | os.PathLike[str], *, hint: str = "") -> dict[str, Any]:
    """A JSON object from a file; `hint` says what to do about a damaged one.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}){hint and f'; {hint}'}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file; see `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file atomically: readers see the old content or all of the new, never a part.

    Args:
        path: replaced if it exists; its folder is made if it does not. The file gets mode 0644.
        data: the content.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            # A rename can reach the disk before the data: after a power failure the file is empty.
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
