"""The bundled demo: a tiny trained LLaVA, the scenes it sees and the questions it answers.

Loading and running the model is ordinary transformers code, for example
`LlavaForConditionalGeneration.from_pretrained(checkpoint_path())`. Importing this module does
not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pitome_vlm.demo.dataset import Sample, load_split, scene, scene_image
from pitome_vlm.demo.drawing import draw_scene

__all__ = [
    "Sample",
    "checkpoint_path",
    "draw_scene",
    "load_split",
    "resolve",
    "scene",
    "scene_image",
]

DEMO = "demo"


def checkpoint_path() -> Path:
    """Folder of the bundled checkpoint, for `from_pretrained`."""
    path = Path(__file__).resolve().parent / "checkpoint"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the demo checkpoint is missing: no config.json in {path}")
    return path


def resolve(path: Any) -> Any:
    """The folder of the bundled checkpoint for "demo", anything else as it is.

    A folder `demo` in the working directory that holds a model or an adapter takes precedence, as
    any folder does over a name on the hub.
    """
    if path != DEMO or any(Path(path, f"{n}.json").is_file() for n in ("config", "adapter_config")):
        return path
    return str(checkpoint_path())
