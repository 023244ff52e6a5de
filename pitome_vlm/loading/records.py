"""Records from a JSON or JSONL file, each with a name for error messages.

What a record holds is for its reader to check. Imports neither torch nor transformers, so that
missing data is noticed before they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common import shown


class DataError(ValueError):
    """A record that cannot be used; the message begins with the file and the line."""


def check_source(name: str | os.PathLike[str]) -> None:
    """Refuse the name of data that is neither there nor the name of a dataset on the hub.

    Raises:
        FileNotFoundError: no such file, or not a regular one.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        return
    if path.exists():
        raise FileNotFoundError(f"{name} is not a regular file")
    if path.is_absolute() or os.fspath(name).startswith((".", "~")) or path.suffix:
        raise FileNotFoundError(f"no such file: {name}")


def parse_records(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """The records of a file: a JSON list, or one JSON value per line (JSONL).

    Blank lines and a byte order mark are skipped. Lines are parsed one by one, so that a reader
    who stops early does not see errors further down.

    Args:
        content: of the file, UTF-8.
        name: of the file, for messages.

    Yields:
        Where the record is ("train.jsonl line 12", "train.json record 3 (id 7)"), and its value.

    Raises:
        DataError: not UTF-8 text or not valid JSON; the message names the line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        known = {b"PAR1": "a Parquet file", b"\x1f\x8b\x08": "compressed", b"PK": "an archive"}
        kind = next((said for start, said in known.items() if content.startswith(start)), None)
        if kind is not None:
            raise DataError(f"{name} is {kind}; it must be JSON or JSONL, as text") from None
        raise DataError(f"{name} is not UTF-8 text ({error}); save it as UTF-8") from error
    if text.lstrip()[:1] == "[":
        for index, value in enumerate(_json(text, name)):
            own = value.get("id") if isinstance(value, dict) else None
            yield f"{name} record {index}" + ("" if own is None else f" (id {_id(own)})"), value
        return
    # Not splitlines: JSON strings may hold line separators such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _json(line, name, number)
        except DataError:
            if line.strip() == "{" and _is_json(text):
                raise DataError(
                    f"{name} holds one JSON object over many lines; it must hold a list of "
                    "records, or one record per line"
                ) from None
            raise
        yield f"{name} line {number}", value


def _json(text: str, name: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} line {line + error.lineno - 1} is not valid JSON: {error.msg} "
            f"(column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets nested as deep.
        raise DataError(f"{name} line {line} cannot be read as JSON: {error}") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _id(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else shown(value)
    return text if len(text) <= 100 else shown(text)
