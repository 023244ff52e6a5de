"""Train projector and language model on cached features of the real tower.

The losses, packing, optimiser and loop are those of the demo model's stage "language".
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from ..training.demo_model import language, parallel
from ..training.demo_model.packing import pack
from .llava_data import StoredFeatures
from .llava_model import GRID, PATCHES, WORLD, build

GROUNDED = 3  # layer whose states say what a phrase means
RATES = (3e-3, 1.5e-3)  # of the layers' matrices, of everything else
PATCH_RATES = (0.0, 3e-3)
PER_SCENE = 10
SCORED = (100, 200)  # images, on the way and at the end


def without_tower() -> LlavaForConditionalGeneration:
    """The model with fresh weights; its features come from disk."""
    model = build()
    model.model.vision_tower = nn.Identity()
    return model


class PlaceHeads(nn.Module):
    """Row and column of projected patches, thrown away after training.

    The demo's tower was trained to tell them. This one is frozen, so the projector has to learn to
    keep what it knows of places.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, 2 * GRID)

    def loss(self, image: Tensor) -> Tensor:
        """Cross-entropy of row plus that of column, of projected patches [B, N, C]."""
        rows, columns = self.read(self.norm(image)).flatten(0, 1).split(GRID, -1)
        patch = torch.arange(PATCHES).repeat(len(image))
        return functional.cross_entropy(rows, patch // GRID) + functional.cross_entropy(
            columns, patch % GRID
        )


def open_stage(features: StoredFeatures, seed: int) -> dict[str, Any]:
    """Model and read-outs with fresh weights; the projector's inputs look standardised."""
    torch.manual_seed(seed + 1)
    model = without_tower()
    width = model.config.text_config.hidden_size
    heads = language.LanguageHeads(width, GROUNDED, WORLD)
    heads.scale.data.fill_(1.0)
    count = len(features.arrays)
    language.initialise_projector(model, features(np.arange(0, count, max(1, count // 64))))
    return {"model": model, "heads": heads, "places": PlaceHeads(width)}


def train_patches(folder: Path, minutes: float, batch: int, modules: dict[str, Any]) -> None:
    """Teach projector and word embeddings to name what patches show, in place.

    A step costs a fortieth of one with the language model, which learns nothing before.
    """
    features, val = StoredFeatures(folder / "train"), StoredFeatures(folder / "val")
    model, heads = modules["model"].model, modules["heads"]
    parts = {
        "projector": model.multi_modal_projector,
        "embeddings": model.language_model.embed_tokens,
        "heads": heads,
        "places": modules["places"],
    }
    loop = parallel.Loop(folder / "patches.pt", parts, PATCH_RATES)

    def losses(found: StoredFeatures, scenes: np.ndarray) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            image = model.multi_modal_projector(found(scenes))
            align = language.aligned(modules["model"], heads, image, found.arrays, scenes)
            return {"align": align, "place": modules["places"].loss(image)}

    def loss(scenes: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        found = losses(features, scenes)
        return found["align"] + 0.5 * found["place"], found

    def score(_final: bool) -> dict[str, float]:
        with torch.no_grad():
            found = losses(val, np.arange(min(64, len(val.arrays))))
        return {name: round(float(value), 3) for name, value in found.items()}

    loop.run(minutes, batch, len(features.arrays), loss, score)


def train(
    folder: Path, minutes: float, batch: int, patch_minutes: float = 3.0, seed: int = 0
) -> None:
    """Train for `minutes` of processor time; goes on where FOLDER/real_llava.pt ends.

    Args:
        folder: with "train" and "val" of `llava_data`.
        minutes: of the whole model, in this process.
        batch: images of a step.
        patch_minutes: of the projector alone, before that.
        seed: of the initial weights.
    """
    parallel.start()
    features, val = StoredFeatures(folder / "train"), StoredFeatures(folder / "val")
    arrays, modules = features.arrays, open_stage(features, seed)
    path = folder / "real_llava.pt"
    if not path.exists():
        train_patches(folder, patch_minutes, batch, modules)
    loop = parallel.Loop(path, modules, RATES)
    rng = random.Random(f"{seed}/{loop.step}")
    model, heads = modules["model"], modules["heads"]

    def loss(scenes: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        packed = pack(arrays, scenes, PER_SCENE, rng, WORLD)
        with torch.autocast("cpu", torch.bfloat16):
            given = features(scenes)
            total, parts = language.answer_loss(model, heads, arrays, given, scenes, packed)
            place = modules["places"].loss(model.model.multi_modal_projector(given))
        return total + 0.1 * place, {**parts, "place": place}

    def score(final: bool) -> dict[str, float]:
        return language.scores(model, heads, val, SCORED[final])

    loop.run(minutes, batch, len(arrays), loss, score)
