"""The lmms-eval plugin: `lmms-eval --model pitome_llava`, and the task of the bundled model.

lmms-eval imports this module at every start, whatever it is going to evaluate, so nothing heavy is
imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["manifests", "tasks_path"]

MODEL_NAME = "pitome_llava"


def manifests() -> list[Any]:
    """The models of the entry point in the group `lmms_eval.models`.

    The chat class is the ordinary one. lmms-eval asks multiple-choice tasks of simple classes
    only, which `--force_simple` selects.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=MODEL_NAME,
            chat_class_path=f"{__name__}.model.PitomeLlava",
            simple_class_path=f"{__name__}.model.PitomeLlavaSimple",
        )
    ]


def tasks_path() -> Path:
    """The folder for `lmms-eval --include_path`."""
    return Path(__file__).resolve().parent / "tasks"
