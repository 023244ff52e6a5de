"""The model card of a whole checkpoint that a wrapped model saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..common import __version__, markdown_table, write_text
from ..merge.config_file import CONFIG_NAME
from .card import CARD_NAME, TAGS, shown_base, with_section
from .merging import Merging, note_of


def write_card(folder: str | os.PathLike[str], base: Any, merging: Merging) -> Path:
    """Put the section on merging into the README.md of a saved model.

    A card that is there keeps its text and its metadata; a new one gets both.

    Args:
        folder: where the model was saved.
        base: the model.
        merging: what is on it.
    """
    path = Path(folder) / CARD_NAME
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        name = shown_base(base.name_or_path)
        data = ModelCardData(library_name="transformers", tags=list(TAGS))
        text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name} with merged visual tokens\n"))
    return write_text(path, with_section(text, section(base, merging)))


def section(base: Any, merging: Merging) -> str:
    """Base, budget, algorithm, what is known of its accuracy, and how to load it."""
    facts = [
        ("base model", f"`{shown_base(base.name_or_path)}`" if base.name_or_path else ""),
        ("base revision", getattr(base.config, "_commit_hash", None) or ""),
        ("algorithm", merging.config.algorithm),
        ("merging", note_of(base, merging).removeprefix("pitome: ")),
        ("weights", "not changed by merging"),
        ("accuracy with merging", _accuracy(merging)),
    ]
    lines = [
        "## Merged visual tokens",
        "",
        f"Saved with token merging on (pitome-vlm {__version__}), which `{CONFIG_NAME}` describes:",
        "",
        markdown_table(("", ""), [(name, value) for name, value in facts if value]),
        "",
        "```python",
        "import pitome_vlm",
        'model, processor = pitome_vlm.load("this/folder")',
        "```",
        "",
        "restores it. **Loaded with transformers alone, this is the unmerged model:** it answers "
        "as the base model does, at full cost, until `pitome_vlm.wrap(model, "
        'config=pitome_vlm.MergeConfig.from_pretrained("this/folder"))`.',
    ]
    return "\n".join(lines)


def _accuracy(merging: Merging) -> str:
    """What is known: figures are made by commands that do not save a model."""
    asked = merging.adapter.calls != "encoder"
    return "not measured" + "; `pitome-vlm tune --model FOLDER` does it" * asked
