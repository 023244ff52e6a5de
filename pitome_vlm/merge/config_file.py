"""How merge options are written to a JSON file, and read from files of other versions.

Handles the file and its format version. What an option means is up to `MergeConfig`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common import __version__, read_json, write_text

CONFIG_NAME = "pitome_config.json"
FORMAT_VERSION = 1


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values, with the format and package version."""
    values = {n: list(value) if isinstance(value, tuple) else value for n, value in options.items()}
    return {"format_version": FORMAT_VERSION, "pitome_vlm_version": __version__, **values}


def options_in(values: Mapping[str, Any], is_known: Callable[[str], bool]) -> dict[str, Any]:
    """The options among the values of a file; the inverse of `plain`.

    Args:
        values: what `plain` made, perhaps in another version.
        is_known: whether this version has an option of that name. In a file of a newer format
            options that it does not have are dropped with a warning that says to upgrade (as PEFT
            does); in others they are misspellings, and stay.

    Raises:
        ValueError: the format version is no whole number.
    """
    values = dict(values)
    version = values.pop("format_version", FORMAT_VERSION)
    written_by = values.pop("pitome_vlm_version", __version__)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"format_version must be a whole number >= 1, got {version!r}")
    unknown = []
    if version > FORMAT_VERSION:
        unknown = [name for name in values if not is_known(name)]
    if unknown:
        warnings.warn(
            f"this merge config was written by pitome-vlm {written_by} (format {version}); "
            f"this version ({__version__}, format {FORMAT_VERSION}) does not know and "
            f"ignores {', '.join(map(repr, unknown))}. Upgrade pitome-vlm to use them.",
            stacklevel=3,
        )
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name not in unknown
    }


def write(folder: str | os.PathLike[str], values: Mapping[str, Any]) -> Path:
    """Write `pitome_config.json` into a folder, which is made if missing; atomic."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give a folder to write {CONFIG_NAME} to")
    return write_text(target / CONFIG_NAME, json.dumps(values, indent=2) + "\n")


def read(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The path and the values of `pitome_config.json` in a folder, or of the JSON file itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a JSON object.
    """
    path = Path(folder)
    path = path / CONFIG_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no merge config at {path}; MergeConfig(...).save_pretrained(folder) writes one"
        )
    return path, read_json(path)
