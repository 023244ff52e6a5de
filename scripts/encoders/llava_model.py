"""A LLaVA whose tower is the real one: its words, its configuration, its parts on disk.

The tower is frozen and not stored: `assemble` puts a checkpoint together from the tower in the
package and the projector and language model of a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Config, LlavaForConditionalGeneration

from pitome_vlm.demo.processor import (
    ASSISTANT,
    FILLER_WORDS,
    QUESTION_MARK,
    SPECIAL_TOKENS,
    USER,
    processor_of,
)
from pitome_vlm.demo.questions import NUMBER_WORDS, QUADRANTS

from ..training.demo_model.build import llava_of, text_config
from ..training.demo_model.world import World
from . import llava_questions, tower_weights
from .llava_scenes import KINDS, NAMES, SIDE_NAMES, SIZE
from .tower_data import MEAN, STD

PATCH = 14
GRID = SIZE // PATCH
PATCHES = GRID * GRID
TEXT_LAYERS, TEXT_WIDTH = 5, 160  # those of the demo model
TOWER = "model.vision_tower."


def vocabulary() -> dict[str, int]:
    """Word to token id, special tokens first."""
    words = [
        *(*SPECIAL_TOKENS, USER, ASSISTANT, QUESTION_MARK, *NAMES, *NUMBER_WORDS, *SIDE_NAMES),
        *(*QUADRANTS, *llava_questions.WORDS, *FILLER_WORDS),
    ]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def _shown(rows: Tensor) -> Tensor:
    """Rows (what, -, size, ...) in 0 and 1; what is a name or, after all names, a number."""
    named = functional.one_hot(rows[:, 0], len(NAMES) + len(NUMBER_WORDS))
    return torch.cat([named, functional.one_hot(rows[:, 2], len(SIDE_NAMES))], -1).float()


WORLD = World(
    vocabulary(),
    GRID,
    llava_questions.TYPES,
    torch.tensor([{"count": 2.0, "digit": 2.0}.get(name, 1.0) for name in llava_questions.TYPES]),
    KINDS,
    (*NAMES, *NUMBER_WORDS, *SIDE_NAMES),
    _shown,
)


def processor() -> Any:
    """From text and images of any size to what the model takes."""
    return processor_of(WORLD.words, SIZE, PATCH, (list(MEAN), list(STD)))


def build(tower: Dinov2Config | None = None) -> LlavaForConditionalGeneration:
    """The model with fresh weights, in float32; `tower` for another than DINOv2-small's."""
    config = tower or Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
    config.image_size, config.patch_size = SIZE, PATCH
    text = text_config(TEXT_LAYERS, TEXT_WIDTH, len(WORLD.words))
    return llava_of(config, text, PATCHES)


def tower_state(tower: Any) -> dict[str, Tensor]:
    """The weights of a `Dinov2Model` as one for images of `SIZE` has them.

    Its embeddings of places are resampled once, as its forward would do for every image.
    """
    state = dict(tower.state_dict())
    with torch.no_grad():
        tokens = torch.empty(1, 1 + PATCHES, tower.config.hidden_size)
        places = tower.embeddings.interpolate_pos_encoding(tokens, SIZE, SIZE)
    return state | {"embeddings.position_embeddings": places}


def save_trained(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write projector and language model in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(TOWER)
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def join(model: LlavaForConditionalGeneration, tower: Any, trained: dict[str, Tensor]) -> None:
    """Fill a model of `build` with a `Dinov2Model` and what `save_trained` wrote.

    Raises:
        ValueError: a weight is missing or has no place.
    """
    state = {f"{TOWER}{name}": value for name, value in tower_state(tower).items()} | trained
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")


def assemble(trained: Path, tower: Path, folder: Path) -> None:
    """Write a whole checkpoint with processor, in float32.

    Args:
        trained: with the model.safetensors of `save_trained`.
        tower: where the converted tower is, or is to be.
        folder: to write to.
    """
    model = build()
    join(model, tower_weights.load(tower), load_file(trained / "model.safetensors"))
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
