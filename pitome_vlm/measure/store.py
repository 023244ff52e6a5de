"""A folder of finished cells that a stopped run can resume.

A cell is anything that is measured on its own and takes long enough to be kept: one task under
one setting, one round of timing. Every finished cell is a JSON file that is on disk before the
next one begins, and names what it was measured with, so that a folder never mixes two runs.

    cells/<key>.json       identity, place in the order of measuring, and the cell's record
    arrays/<name>.npy      large arrays that several cells are compared with
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common import counted, read_json, write_bytes, write_text
from ..merge.config import CONFIG_NAME

# What `verify` and `tune` write at the end, to look for before torch is loaded.
VERIFY_FILES = ("report.md", "results.json", "spectral.png")
TUNE_PLOT = "loss_tokens.png"
TUNE_FILES = (CONFIG_NAME, "report.md", "result.json", TUNE_PLOT)
FORMAT = 1
REMEASURE = "delete it to measure it again"
_ORDER = "order"
_HEAD = ("format", "identity", _ORDER)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


class Store:
    """Finished cells by key; in a folder, or in memory where none is given."""

    def __init__(
        self, root: str | os.PathLike[str] | None, identity: Mapping[str, Any] | None = None
    ) -> None:
        """Name a folder; nothing is read or written yet.

        Args:
            root: the folder, which need not exist; None keeps everything in memory.
            identity: what decides every cell of the run (checkpoint, data, options, versions),
                as values that JSON can hold; None where every cell brings its own.

        Raises:
            ValueError: the root is a file.
        """
        self.root = None if root is None else Path(root)
        self.identity = None if identity is None else dict(identity)
        self._cells: dict[str, dict[str, Any]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        if self.root is not None and self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output must be a folder, but {self.root} is a file")

    def check(self, *, resume: bool, overwrite: bool = False, results: Iterable[str] = ()) -> None:
        """Refuse a folder that must not be written to; cheap, for before anything is loaded.

        Args:
            resume: finished cells may be there.
            overwrite: anything may be there; see `clear`.
            results: names of files that only a finished run leaves; where one is there without a
                cell, it is somebody else's.

        Raises:
            FileExistsError: it holds cells, or results of something else.
        """
        if self.root is None or overwrite:
            return
        count = len(self)
        if count and not resume:
            raise FileExistsError(
                f"{self.root} already holds {counted(count, 'finished cell')}; --resume "
                "(resume=True) continues with them, --overwrite (overwrite=True) deletes them, or "
                "choose another output folder"
            )
        if not count:
            check_files(self.root, results, overwrite=False)

    def clear(self) -> None:
        """Delete all cells and arrays, and nothing else."""
        self._cells.clear()
        self._arrays.clear()
        for path in [*self._files("cells", "json"), *self._files("arrays", "npy")]:
            path.unlink()

    def path(self, key: str) -> Path:
        """The file of a cell; ValueError for a key that is no file name."""
        if self.root is None:
            raise ValueError("a store in memory has no files")
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cell's key must be letters, digits and ._=+-, got {key!r}")
        return self.root / "cells" / f"{key}.json"

    def __len__(self) -> int:
        return len(self._cells) if self.root is None else len(self._files("cells", "json"))

    def __contains__(self, key: str) -> bool:
        return key in self._cells if self.root is None else self.path(key).is_file()

    def __iter__(self) -> Iterator[str]:
        """Keys of the finished cells, in the order in which they were finished."""
        keys = [path.stem for path in self._files("cells", "json")]
        for key in keys:
            self._read(key)
        known = self._cells if self.root is None else {key: self._cells[key] for key in keys}
        yield from sorted(known, key=lambda key: (int(known[key].get(_ORDER, 0)), key))

    def put(
        self, key: str, record: Mapping[str, Any], identity: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a finished cell; it is on disk when this returns.

        Record and identity hold what JSON can; the identity decides this cell beyond that of the
        run.
        """
        stored = {
            "format": FORMAT,
            "identity": self._wanted(identity) or {},
            _ORDER: len(self),
            **record,
        }
        if self.root is not None:
            write_text(self.path(key), as_json(stored))
        self._cells[key] = plain(stored)

    def get(self, key: str, identity: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The record of a finished cell, None where there is none.

        Args:
            key: its name.
            identity: see `put`; where neither this nor the store has one, any run's cell will do.

        Raises:
            ValueError: the file is damaged, of another format, or of another run; the message
                names the first thing that differs.
        """
        if key not in self:
            return None
        stored = self._read(key)
        wanted = self._wanted(identity)
        changed = [] if wanted is None else differences(stored["identity"], wanted)
        if changed:
            raise ValueError(
                f"{self.root} holds a run with other settings ({changed[0]}); --overwrite "
                "(overwrite=True) replaces it, or choose another output folder"
            )
        return {name: value for name, value in stored.items() if name not in _HEAD}

    def identity_of(self, key: str) -> dict[str, Any]:
        """What a finished cell was measured with.

        Raises:
            KeyError: there is no such cell.
        """
        if key not in self:
            raise KeyError(key)
        found: dict[str, Any] = self._read(key)["identity"]
        return found

    def _wanted(self, identity: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if self.identity is None and identity is None:
            return None
        return {**(self.identity or {}), **(identity or {})}

    def array(self, name: str) -> np.ndarray | None:
        """A stored array, None where it is missing or damaged; from disk it is mapped, not read."""
        if self.root is None:
            return self._arrays.get(name)
        try:
            mapped: np.ndarray = np.load(self._array(name), mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            return None
        return mapped

    def put_array(self, name: str, values: np.ndarray) -> None:
        """Store an array; atomic."""
        if self.root is None:
            self._arrays[name] = values
            return
        data = io.BytesIO()
        np.save(data, values, allow_pickle=False)
        write_bytes(self._array(name), data.getvalue())

    def _array(self, name: str) -> Path:
        assert self.root is not None
        return self.root / "arrays" / f"{file_name(name)}.npy"

    def _files(self, folder: str, suffix: str) -> list[Path]:
        return [] if self.root is None else sorted((self.root / folder).glob(f"*.{suffix}"))

    def _read(self, key: str) -> dict[str, Any]:
        if key not in self._cells:
            path = self.path(key)
            stored = read_json(path, hint=REMEASURE)
            if stored.get("format") != FORMAT or not isinstance(stored.get("identity"), dict):
                raise ValueError(
                    f"{path}: format must be {FORMAT} with an identity, got "
                    f"{stored.get('format')!r}"
                )
            self._cells[key] = stored
        return self._cells[key]


def check_files(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Refuse, before anything is measured, to replace files that an earlier run left.

    The folder itself is not made: an error before the first result leaves nothing.

    Raises:
        ValueError: the folder is a file, or could not be written to.
        FileExistsError: one of the files is there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, but {folder} is a file")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {', '.join(there)}; choose another output folder, or give "
            "--overwrite (overwrite=True)"
        )
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"output {folder} cannot be written to: {error.strerror}") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of a run, as phrases like "keep was 0.5, is 0.25".

    Nested mappings are compared key by key ("merging.keep"); both go through JSON first, which
    has no tuples.
    """
    then, here = _flat(plain(before)), _flat(plain(now))
    return [
        f"{name} was {then.get(name)!r}, is {here.get(name)!r}"
        for name in {**here, **then}
        if then.get(name) != here.get(name)
    ]


def as_json(value: Any) -> str:
    """One line of JSON; what JSON cannot hold is written as text without its memory address."""
    text = json.dumps(value, default=lambda v: _ADDRESS.sub("", str(v)), ensure_ascii=False)
    return text + "\n"


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it comes back from JSON: lists for tuples, text for keys."""
    found: dict[str, Any] = json.loads(as_json(dict(value)))
    return found


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(text: str) -> str:
    """A text with everything that file systems or shells may refuse replaced by underscores."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
