"""The folder of a tuning run: every finished cell on disk before the next one begins.

Knows: file names, formats, and how to write so that a killed process leaves a folder that can be
gone on with. Does not know: what a cell means, models, or reports.

    run.json           what decides every answer: model, data, split, options, versions
    cells.jsonl        one line per finished cell with all its answers, only ever appended to
    unreduced_*.npy    first-token log-probabilities of the unreduced model, float32
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...common import write_bytes, write_text

FORMAT = 1
RUN, CELLS = "run.json", "cells.jsonl"
# Written at the end; a folder that holds one of these but no cells belongs to somebody else.
RESULTS = ("pitome_config.json", "report.md", "result.json", "loss_tokens.png")


class Journal:
    """Finished cells by key; in memory, and in a folder where one is given.

    A damaged last line (a process killed while writing) is dropped; any other is an error.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, identity: dict[str, Any], *, resume: bool
    ) -> None:
        """Open or begin.

        Raises:
            ValueError: see `check_folder`; or with `resume`, the folder's cells were measured
                under other circumstances or are damaged.
        """
        self.folder = None if folder is None else Path(folder)
        self.cells: dict[str, dict[str, Any]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        if self.folder is None:
            return
        check_folder(self.folder, resume=resume)
        # As it comes back from a file, so that the two can be compared.
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        if self._has_cells():
            self._check_identity(identity)
            self._read()
        else:
            write_text(self.folder / RUN, json.dumps(identity, indent=2) + "\n")

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a finished cell; on disk when this returns."""
        self.cells[key] = record
        if self.folder is None:
            return
        line = json.dumps({"key": key, **record}, ensure_ascii=False) + "\n"
        with (self.folder / CELLS).open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def array(self, name: str) -> np.ndarray | None:
        """A stored array; from disk it is mapped, not read."""
        path = self._array_path(name)
        if path is None or not path.is_file():
            return self._arrays.get(name)
        try:
            mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            return None
        return mapped

    def keep_array(self, name: str, values: np.ndarray) -> None:
        """Store an array; atomic."""
        path = self._array_path(name)
        if path is None:
            self._arrays[name] = values
            return
        data = io.BytesIO()
        np.save(data, values, allow_pickle=False)
        write_bytes(path, data.getvalue())

    def _array_path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"unreduced_{name}.npy"

    def _has_cells(self) -> bool:
        assert self.folder is not None
        return _has_cells(self.folder)

    def _check_identity(self, wanted: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / RUN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is missing or damaged, so nobody knows what the cells beside it were "
                "measured with; choose another folder"
            ) from error
        for key in {**wanted, **found}:
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{self.folder} was tuned with {key} {found.get(key)!r}, now it is "
                    f"{wanted.get(key)!r}: not the same run. Choose another folder"
                )

    def _read(self) -> None:
        assert self.folder is not None
        path = self.folder / CELLS
        content = path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n"), 1):
            if not line:
                continue
            try:
                record = json.loads(line)
                self.cells[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} line {number} is damaged; delete that line to measure it again"
                ) from error
        if torn:
            write_bytes(path, whole + b"\n" if whole else b"")


def check_folder(folder: str | os.PathLike[str], *, resume: bool) -> None:
    """Refuse a folder that must not be written to; cheap, for before anything is loaded.

    Raises:
        ValueError: it is a file, holds cells and `resume` is off, or holds somebody else's
            results.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output must be a folder, but {folder} is a file")
    if _has_cells(folder):
        if not resume:
            raise ValueError(
                f"{folder} already holds the results of a tuning run; --resume (resume=True) goes "
                "on with them, or choose another folder"
            )
        return
    for name in RESULTS:
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name} is already there and no part of a tuning run; choose another "
                "folder"
            )


def _has_cells(folder: Path) -> bool:
    path = folder / CELLS
    return path.is_file() and path.stat().st_size > 0
