"""The files of a training run: what it is, where it can go on, and whether it is done.

Knows: names and formats, and how a killed process leaves things. Does not know: models, data or
how anything is trained.

    training_run.json          what the run is; written before its first step
    checkpoint-<step>/         the Trainer's checkpoints
    adapter_model.safetensors  the result; there only when the run is done
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..common import write_text

RUN_NAME = "training_run.json"
RESULT_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"


class RunFolder:
    """The output folder of a run."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.root = Path(folder).expanduser()

    def check(self, *, resume: bool) -> None:
        """See that nothing would be overwritten.

        Raises:
            FileExistsError: something is there and the run is not to go on, or it is done.
            NotADirectoryError: a file of that name is there.
            ValueError: what is there is no run.
        """
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"output {self.root} is a file; give a folder")
        if not self.root.exists() or not any(self.root.iterdir()):
            return
        if (self.root / RESULT_NAME).exists():
            raise FileExistsError(f"{self.root} holds a finished adapter; give another folder")
        if not resume:
            raise FileExistsError(
                f"{self.root} is not empty; go on with the run in it with resume (--resume), or "
                "give another folder"
            )
        if not (self.root / RUN_NAME).is_file():
            raise ValueError(f"{self.root} is no folder of a training run (no {RUN_NAME})")

    def compare(self, run: dict[str, Any]) -> None:
        """See that the run in the folder, if there is one, is this one.

        Raises:
            ValueError: it is another one; names what differs.
        """
        path = self.root / RUN_NAME
        if not path.is_file():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        # Through JSON, because that has no tuples.
        now, before = _flat(json.loads(json.dumps(run))), _flat(stored)
        differing = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.root} holds another run: {'; '.join(differing)}. Give the same options to "
                "go on, or another folder"
            )

    def begin(self, run: dict[str, Any]) -> None:
        """Write down what the run is."""
        write_text(self.root / RUN_NAME, json.dumps(run, indent=2) + "\n")

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; one that was being written is passed over.

        The Trainer writes its state last, so a checkpoint with a readable state is complete.
        """
        found: list[tuple[int, Path]] = []
        for path in self.root.glob("checkpoint-*"):
            step = path.name.removeprefix("checkpoint-")
            if step.isdigit() and _readable(path / STATE_NAME):
                found.append((int(step), path))
        return max(found)[1] if found else None


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
