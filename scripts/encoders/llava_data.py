"""What a LLaVA on the real tower learns from: scenes as arrays, features of the tower on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..training.demo_model.build import FEATURE_LAYER
from ..training.demo_model.data import FIELDS, Arrays, mention_rows
from ..training.demo_model.data import encode_question as encoded
from .llava_model import GRID, PATCH, PATCHES, WORLD
from .llava_questions import PER_SCENE, questions
from .llava_scenes import MOST_THINGS, NAMES, SIDE_NAMES, SIZE, Library, Scene, draw
from .tower_data import pixels

TRAIN_QUESTIONS = 10
LEAST_PIXELS = 30  # of a thing in a patch that is said to show it
BATCH = 16


def things(scene: Scene) -> np.ndarray:
    """One row of `FIELDS` per thing, -1 where there is none; the first is the emoji or number."""
    table = np.full((MOST_THINGS, len(FIELDS)), -1, np.int8)
    for number, thing in enumerate(scene.things):
        what = NAMES.index(thing.name) if thing.digit is None else len(NAMES) + thing.digit
        size = SIDE_NAMES.index(thing.size)
        table[number] = (what, -1, size, -1, thing.y // PATCH, thing.x // PATCH)
    return table


def patch_things(seen: np.ndarray) -> np.ndarray:
    """Per patch the number of the thing that shows most in it, or -1; `seen` as of `draw`."""
    patches = seen.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(PATCHES, -1)
    counts = np.stack([(patches == n + 1).sum(1) for n in range(MOST_THINGS)], 1)
    return np.where(counts.max(1) >= LEAST_PIXELS, counts.argmax(1), -1).astype(np.int8)


def build(split: str, count: int, found: Library, folder: Path) -> None:
    """Write the arrays of the first `count` scenes of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    per_scene = TRAIN_QUESTIONS if split == "train" else PER_SCENE
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    patches = np.empty((count, PATCHES), np.int8)
    tables = np.empty((count, MOST_THINGS, len(FIELDS)), np.int8)
    counts: Counter[tuple[str, str]] = Counter()
    tokens: list[int] = []
    rows, mentions, starts = [], [], [0]
    for number in tqdm(range(count), desc=split):
        scene, asked = questions(number, split, per_scene, found, counts)
        image, seen = draw(scene, found)
        images[number], patches[number] = np.asarray(image), patch_things(seen)
        tables[number] = things(scene)
        for question in asked:
            ids = encoded(question.text, WORLD.words)
            answer, kind = WORLD.words[question.answer], WORLD.types.index(question.type)
            rows.append((len(tokens), len(ids), answer, kind))
            mentions.append(mention_rows(question, tables[number]))
            tokens.extend(ids)
        starts.append(len(rows))
    arrays = Arrays(
        images=images,
        patch_object=patches,
        density=np.zeros(0),
        objects=tables,
        background=np.zeros(0),
        tokens=np.array(tokens, np.int16),
        questions=np.array(rows, np.int32),
        mentions=np.array(mentions, np.int16),
        scene_start=np.array(starts, np.int32),
    )
    for name, array in vars(arrays).items():
        np.save(folder / f"{name}.npy", array)


def cache(tower: Any, folder: Path) -> None:
    """Write the features that LLaVA reads of all images of a folder, in float16; resumes.

    The tower runs with bfloat16 autocast where the CPU has kernels for it.
    """
    images = np.load(folder / "images.npy", mmap_mode="r")
    path, done = folder / "features.npy", folder / "features.done"
    shape = (len(images), PATCHES, tower.config.hidden_size)
    mode = "r+" if path.is_file() else "w+"
    store = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
    begin = int(done.read_text()) if done.is_file() else 0
    for first in tqdm(range(begin, len(images), BATCH), desc=f"features of {folder.name}"):
        given = _normalised(np.array(images[first : first + BATCH]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            states = tower(given, output_hidden_states=True).hidden_states
        store[first : first + BATCH] = states[FEATURE_LAYER][:, 1:].half().numpy()
        done.write_text(str(min(first + BATCH, len(images))))
    store.flush()


def _normalised(images: np.ndarray) -> Tensor:
    from PIL import Image

    return pixels([Image.fromarray(one) for one in images], SIZE)


class StoredFeatures:
    """The features that `cache` wrote, for `language.scores` and training."""

    def __init__(self, folder: Path) -> None:
        self.arrays = Arrays.load(folder)
        self.store = np.load(folder / "features.npy", mmap_mode="r")

    def __call__(self, scenes: np.ndarray) -> Tensor:
        """[scenes, patches, width] in float32."""
        return torch.from_numpy(self.store[scenes]).float()
