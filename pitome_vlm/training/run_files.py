"""The files of a training run: what it is, where it can resume, and whether it is finished.

A process may be killed at any time; what it leaves is recognised here.

    training_run.json          model, data and options; written before the first step
    checkpoint-<step>/         the Trainer's checkpoints
    adapter_model.safetensors  the result; only there once the run is finished
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..common import read_json, write_text
from ..measure.store import differences

RUN_NAME = "training_run.json"
RESULT_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"


class RunFolder:
    """The output folder of a run."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.root = Path(folder).expanduser()

    def check(self, *, resume: bool, overwrite: bool = False) -> None:
        """Check that nothing would be overwritten unasked.

        Args:
            resume: an unfinished run may be there.
            overwrite: any run may be there; see `clear`.

        Raises:
            FileExistsError: the folder is not empty and neither is on, or its run is finished.
            NotADirectoryError: it is a file.
            ValueError: it does not hold a training run.
        """
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"output {self.root} is a file; give a folder")
        if not self.root.exists() or not any(self.root.iterdir()):
            return
        replaced = "--overwrite (overwrite=True) replaces it, or choose another output folder"
        if (self.root / RESULT_NAME).exists() and not overwrite:
            raise FileExistsError(f"{self.root} already holds a finished adapter; {replaced}")
        if not (resume or overwrite):
            raise FileExistsError(
                f"{self.root} is not empty; --resume (resume=True) continues the run in it, "
                f"{replaced}"
            )
        if not (self.root / RUN_NAME).is_file():
            raise ValueError(
                f"{self.root} does not hold a training run (no {RUN_NAME}); give another folder"
            )

    def clear(self) -> None:
        """Delete the run's result, its checkpoints and its description, and nothing else."""
        for path in self.root.glob("checkpoint-*"):
            shutil.rmtree(path)
        for name in (RESULT_NAME, RUN_NAME):
            (self.root / name).unlink(missing_ok=True)

    def compare(self, run: dict[str, Any]) -> None:
        """Check that the run in the folder, if there is one, is this one.

        Raises:
            ValueError: it is another run; the message names every difference.
        """
        path = self.root / RUN_NAME
        if not path.is_file():
            return
        differing = differences(read_json(path, hint="give another folder"), run)
        if differing:
            raise ValueError(
                f"{self.root} holds another run: {'; '.join(differing)}. Give the same options to "
                "resume it, or another folder"
            )

    def begin(self, run: dict[str, Any]) -> None:
        """Write `training_run.json`."""
        write_text(self.root / RUN_NAME, json.dumps(run, indent=2) + "\n")

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; one that was being written is ignored.

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
        read_json(path)
    except (OSError, ValueError):
        return False
    return True
