"""The demo's questions, regenerated from seeds: train, val, test, structured_val, structured_test.

Nothing is stored: a scene is a function of its split and number.

Splits cannot share a layout: each layout hash belongs to exactly one split (six in eight to
train, one to val, one to test), and a sampled scene whose hash belongs elsewhere is redrawn.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image

from pitome_vlm.demo.drawing import draw_scene
from pitome_vlm.demo.questions import QUESTION_TYPES, Question, questions_of_type
from pitome_vlm.demo.scenes import CANONICAL_SIZE, KINDS, Scene, layout_hash, sample_scene
from pitome_vlm.demo.structured import STRUCTURED_KINDS, sample_structured

SPLIT_SCENES = {
    "train": 60_000,
    "val": 400,
    "test": 400,
    "structured_val": 400,
    "structured_test": 400,
}
HELD_OUT = tuple(split for split in SPLIT_SCENES if split != "train")
QUESTIONS_PER_SCENE = 6
MAX_PER_TYPE = 3
SEED = 20_240

_BUCKETS = {
    "train": (0, 1, 2, 3, 4, 5),
    "val": (6,),
    "test": (7,),
    "structured_val": (6,),
    "structured_test": (7,),
}
# The kinds that need most practice come more often in training; val and test are even.
_TRAIN_KINDS = (
    "scattered",
    "identical",
    "digits",
    "tiny",
    "crowded",
    "digits",
    "identical",
    "scattered",
    "redundant",
    "digits",
)
_KINDS = {
    "train": _TRAIN_KINDS,
    "val": KINDS,
    "test": KINDS,
    "structured_val": STRUCTURED_KINDS,
    "structured_test": STRUCTURED_KINDS,
}


@dataclass(frozen=True)
class Sample:
    """One question about one scene of a split."""

    scene_id: int
    kind: str
    question_type: str
    question: str
    answer: str


def _check(split: str, scene_id: int | None = None) -> None:
    if split not in SPLIT_SCENES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_SCENES)}, got {split!r}")
    if scene_id is not None and not 0 <= scene_id < SPLIT_SCENES[split]:
        last = SPLIT_SCENES[split] - 1
        raise ValueError(f"scene_id must be in 0..{last} for split {split!r}, got {scene_id}")


@functools.lru_cache(maxsize=2048)
def scene(scene_id: int, split: str) -> Scene:
    """The description of one scene of a split."""
    _check(split, scene_id)
    sample = sample_structured if split.startswith("structured") else sample_scene
    kinds = _KINDS[split]
    kind = kinds[scene_id % len(kinds)]
    attempt = 0
    while True:
        rng = random.Random(f"{SEED}/{split}/{scene_id}/{attempt}")
        candidate = sample(rng, kind)
        if layout_hash(candidate) % 8 in _BUCKETS[split]:
            return candidate
        attempt += 1


def scene_image(scene_id: int, split: str, size: int = CANONICAL_SIZE) -> Image.Image:
    """The image of one scene, RGB, `size` pixels square.

    Sizes above the canonical 192 are for display only: the model was trained on 192.

    Raises:
        ValueError: no such split or scene, or a size out of range.
    """
    return draw_scene(scene(scene_id, split), size)


def scene_questions(
    scene_id: int, split: str, count: int, counts: Counter[tuple[str, str]]
) -> list[Question]:
    """Up to `count` questions about one scene, the rarest types and answers so far first.

    `counts` holds how often each (type, answer) was asked before, with (type, "") for the type
    as a whole; it is brought up to date.
    """
    rng = random.Random(f"{SEED}/questions/{split}/{scene_id}")
    described = scene(scene_id, split)
    pools = {name: questions_of_type(described, name, rng) for name in QUESTION_TYPES}
    return picked(pools, count, rng, counts)


def picked(
    pools: dict[str, list[Question]],
    count: int,
    rng: random.Random,
    counts: Counter[tuple[str, str]],
) -> list[Question]:
    """Up to `count` of the questions that an image supports, the rarest so far first.

    Args:
        pools: questions by type; those that are picked are removed.
        count: at most so many, and no more than `MAX_PER_TYPE` of a type.
        rng: decides between equals.
        counts: as in `scene_questions`.
    """
    chosen: list[Question] = []
    while len(chosen) < count:
        asked = Counter(question.type for question in chosen)
        order = [n for n in pools if pools[n] and asked[n] < MAX_PER_TYPE]
        if not order:
            break
        rng.shuffle(order)
        name = min(order, key=lambda n: counts[n, ""] + (0 if n == "number" else asked[n]))
        question = min(pools[name], key=lambda q: counts[q.type, q.answer])
        pools[name].remove(question)
        counts[name, ""] += 1
        counts[name, question.answer] += 1
        chosen.append(question)
    return chosen


def load_split(name: str, limit: int | None = None) -> list[Sample]:
    """The samples of split `name`, one of `SPLIT_SCENES`, the first `limit` of them.

    The same call gives the same list in every process; a limit gives a prefix of it.
    """
    _check(name)
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be None or at least 0, got {limit}")
    samples: list[Sample] = []
    counts: Counter[tuple[str, str]] = Counter()
    for scene_id in range(SPLIT_SCENES[name]):
        if limit is not None and len(samples) >= limit:
            break
        kind = scene(scene_id, name).kind
        for q in scene_questions(scene_id, name, QUESTIONS_PER_SCENE, counts):
            samples.append(Sample(scene_id, kind, q.type, q.text, q.answer))
    return samples if limit is None else samples[:limit]
