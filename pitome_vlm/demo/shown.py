"""The scene that the README and `pitome-vlm demo` show: a rule chose it, nobody picked it by hand.

`python -m scripts.demo.scene` states the rule and writes shown.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

SHOWN_FILE = Path(__file__).resolve().parent / "shown.json"


@dataclass(frozen=True)
class Shown:
    """A scene of a split, and the question about it that methods answer differently."""

    split: str
    scene_id: int
    question: str


def shown() -> Shown:
    """The chosen scene."""
    return Shown(**json.loads(SHOWN_FILE.read_text(encoding="utf-8")))
