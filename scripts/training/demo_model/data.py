"""Training arrays: what the processor makes of each image, patch labels, encoded questions.

Knows how scenes and questions become numpy arrays on disk. Leaves models to `build.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pitome_vlm.demo import dataset
from pitome_vlm.demo.drawing import draw_scene, object_map
from pitome_vlm.demo.processor import GRID, IMAGE_SIZE, PATCHES, encode_question, vocabulary
from pitome_vlm.demo.questions import QUESTION_TYPES, Question
from pitome_vlm.demo.scenes import (
    BACKGROUNDS,
    CANONICAL_SIZE,
    COLOURS,
    MAX_OBJECTS,
    NUMBER,
    SHAPES,
    SIZES,
    Scene,
    layout_hash,
)

CELL = CANONICAL_SIZE // GRID
ALL_SHAPES = (*SHAPES, NUMBER)
FIELDS = ("colour", "shape", "size", "digit", "row", "column")
MIN_PIXELS = 20
MAX_MENTIONS = 2
TRAIN_QUESTIONS = 14


@dataclass(frozen=True)
class Arrays:
    """One split as arrays; `questions` rows index `tokens`, scenes index `questions`."""

    images: np.ndarray
    patch_object: np.ndarray
    density: np.ndarray
    objects: np.ndarray
    background: np.ndarray
    tokens: np.ndarray
    questions: np.ndarray
    mentions: np.ndarray
    scene_start: np.ndarray

    @staticmethod
    def load(folder: Path) -> Arrays:
        """Open one part; the images stay on disk until asked for."""
        return Arrays(
            **{
                name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "images" else None)
                for name in Arrays.__dataclass_fields__
            }
        )

    def __len__(self) -> int:
        return len(self.images)


def model_image(scene: Scene) -> np.ndarray:
    """The image as the processor shrinks it."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(draw_scene(scene).resize(size, Image.Resampling.BICUBIC))


def object_table(scene: Scene) -> np.ndarray:
    """One row of `FIELDS` per object, -1 where there is none."""
    table = np.full((MAX_OBJECTS, len(FIELDS)), -1, np.int8)
    for index, o in enumerate(scene.objects):
        table[index] = (
            COLOURS.index(o.colour),
            ALL_SHAPES.index(o.shape),
            SIZES.index(o.size),
            -1 if o.digit is None else o.digit,
            o.y // CELL,
            o.x // CELL,
        )
    return table


def patch_objects(scene: Scene) -> np.ndarray:
    """Per patch the index of the object that shows most in it, or -1."""
    pixels = object_map(scene).astype(np.int64).reshape(GRID, CELL, GRID, CELL)
    patch = np.arange(PATCHES).reshape(GRID, 1, GRID, 1)
    flat = np.bincount(
        (patch * (MAX_OBJECTS + 1) + pixels).ravel(), minlength=PATCHES * (MAX_OBJECTS + 1)
    )
    seen = flat.reshape(PATCHES, MAX_OBJECTS + 1)[:, 1:]
    best = seen.argmax(1)
    visible = seen.max(1) >= MIN_PIXELS
    # A tiny thing on a patch corner may reach the limit nowhere: its best patch still shows it.
    visible |= (seen == np.maximum(seen.max(0), 1)).any(1)
    return np.where(visible, best, -1).astype(np.int8)


def object_density(scene: Scene) -> np.ndarray:
    """Per patch a share of each object: one in all, split between the patches nearest its centre.

    Smooth in the position, unlike "the centre is in this patch", so that its sum can be learnt
    exactly: that is what counting needs.
    """
    density = np.zeros((GRID, GRID), np.float32)
    for o in scene.objects:
        x, y = (np.clip((c + 0.5) / CELL - 0.5, 0, GRID - 1 - 1e-6) for c in (o.x, o.y))
        column, row = int(x), int(y)
        right, down = x - column, y - row
        share = np.outer([1 - down, down], [1 - right, right])
        density[row : row + 2, column : column + 2] += share
    return density.ravel()


def question_row(question: Question, start: int, length: int, answer: int) -> tuple[int, ...]:
    return (start, length, answer, QUESTION_TYPES.index(question.type))


def mention_rows(question: Question, table: np.ndarray) -> np.ndarray:
    """Per mention: word index, number of objects meant, row and column when it is just one."""
    rows = np.full((MAX_MENTIONS, 4), -1, np.int16)
    for slot, mention in enumerate(question.mentions):
        row, column = -1, -1
        if len(mention.objects) == 1:
            row, column = table[mention.objects[0]][4:6]
        rows[slot] = (mention.word, len(mention.objects), row, column)
    return rows


def build_part(split: str, first: int, last: int, folder: Path, per_scene: int) -> list[int]:
    """Write the arrays of scenes first..last-1; returns their layout hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    count, words, counts = last - first, vocabulary(), Counter()
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    patches = np.empty((count, PATCHES), np.int8)
    density = np.empty((count, PATCHES), np.float32)
    tables = np.empty((count, MAX_OBJECTS, len(FIELDS)), np.int8)
    background = np.empty(count, np.int8)
    tokens: list[int] = []
    questions: list[tuple[int, ...]] = []
    mentions: list[np.ndarray] = []
    starts, hashes = [0], []
    for i in range(count):
        described = dataset.scene(first + i, split)
        images[i] = model_image(described)
        patches[i], tables[i] = patch_objects(described), object_table(described)
        density[i] = object_density(described)
        background[i] = BACKGROUNDS.index(described.background.kind)
        hashes.append(layout_hash(described))
        for question in dataset.scene_questions(first + i, split, per_scene, counts):
            ids = encode_question(question.text, words)
            questions.append(question_row(question, len(tokens), len(ids), words[question.answer]))
            mentions.append(mention_rows(question, tables[i]))
            tokens.extend(ids)
        starts.append(len(questions))
    arrays = {
        "images": images,
        "patch_object": patches,
        "density": density,
        "objects": tables,
        "background": background,
        "tokens": np.array(tokens, np.int16),
        "questions": np.array(questions, np.int32),
        "mentions": np.array(mentions, np.int16),
        "scene_start": np.array(starts, np.int32),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return hashes


def build(folder: Path, train_scenes: int, held_out_scenes: int) -> dict[str, int]:
    """Write train parts (one per rank), val and test; returns counts of scenes and collisions."""
    half = train_scenes // 2
    test_questions = dataset.QUESTIONS_PER_SCENE
    jobs = [
        ("train", 0, half, folder / "train0", TRAIN_QUESTIONS),
        ("train", half, 2 * half, folder / "train1", TRAIN_QUESTIONS),
        ("val", 0, held_out_scenes, folder / "val", test_questions),
        ("test", 0, held_out_scenes, folder / "test", test_questions),
    ]
    with ProcessPoolExecutor(2) as pool:
        hashes = [future.result() for future in [pool.submit(build_part, *job) for job in jobs]]
    train = set(hashes[0]) | set(hashes[1])
    report = {
        "train_scenes": 2 * half,
        "train_layouts": len(train),
        "val_collisions": sum(h in train for h in hashes[2]),
        "test_collisions": sum(h in train for h in hashes[3]),
        "val_test_collisions": len(set(hashes[2]) & set(hashes[3])),
    }
    digest = hashlib.sha256(np.load(folder / "test" / "images.npy").tobytes()).hexdigest()
    (folder / "report.txt").write_text(f"{report}\ntest images sha256 {digest}\n")
    return report
