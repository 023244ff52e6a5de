"""Records from a JSON or JSONL file, each with a name for error messages.

What a record holds is for its reader to check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class DataError(ValueError):
    """A record that cannot be used; the message begins with the file and the line."""


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
        raise DataError(f"{name} is not UTF-8 text: {error}") from error
    if text.lstrip()[:1] == "[":
        for index, value in enumerate(_json(text, name)):
            own = value.get("id") if isinstance(value, dict) else None
            yield f"{name} record {index}" + (f" (id {own})" if own is not None else ""), value
        return
    # Not splitlines: JSON strings may hold line separators such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{name} line {number}", _json(line, name, number)


def _json(text: str, name: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} line {line + error.lineno - 1} is not valid JSON: {error.msg} "
            f"(column {error.colno})"
        ) from error
