"""Scenes of the bundled demo as files, with a question each."""

from __future__ import annotations

from pathlib import Path

from ..common import write_bytes
from ..demo import load_split, scene_image
from ..demo.dataset import QUESTIONS_PER_SCENE
from ..demo.scenes import KINDS
from ..demo.structured import STRUCTURED_KINDS
from ..measure.tables import png

SPLITS = {"val": KINDS, "structured_val": STRUCTURED_KINDS}


def write_examples(folder: Path) -> list[tuple[str, str]]:
    """(file, question) pairs: the first validation scene of every kind, drawn into `folder`.

    The question is the scene's first that yes or no does not answer.
    """
    found: dict[str, tuple[str, str]] = {}
    for split, kinds in SPLITS.items():
        for sample in load_split(split, limit=QUESTIONS_PER_SCENE * len(kinds)):
            if sample.kind in found or sample.answer in ("yes", "no"):
                continue
            image = png(scene_image(sample.scene_id, split))
            file = write_bytes(folder / f"{sample.kind}.png", image)
            found[sample.kind] = str(file), sample.question
    return list(found.values())
