"""What is asked of the LLaVA on the real tower, and how: rows, images, one tower run an image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from pitome_vlm import ImageCache
from pitome_vlm.demo import Sample
from pitome_vlm.measure import asking
from pitome_vlm.measure.demo_benchmark import ANSWER_TOKENS, Setting
from pitome_vlm.wrapping.wrap import is_wrapped

from ..demo.benchmark import NO_MERGING, methods
from ..demo.report import BASELINE, PAPER
from .llava_questions import PER_SCENE
from .llava_scenes import draw, library, scene

BUDGETS = (128, 64, 32, 16)
PLAIN: dict[str, Any] = {"size_bias": False, "positions": "compact"}
NOT_CALIBRATED = ", not calibrated"
# Rows that are as their authors published them, and one that has its calibrated twin's options.
_AS_PUBLISHED = (PAPER, "PiToMe (released code)", "PiToMe, calibrated")
# Scenes of a batch. Their questions are asked one after the other, so that the tower runs once.
SCENES_TOGETHER = 40
_CACHE = ImageCache()


def rows_at(tokens: int) -> list[Setting]:
    """The demo benchmark's rows at a budget (random once), and most of them without calibration."""
    calibrated = [one for one in methods(tokens) if one.config.seed == 0]
    plain = [
        dataclasses.replace(
            one,
            name=f"{one.name}{NOT_CALIBRATED}",
            config=dataclasses.replace(one.config, **PLAIN),
        )
        for one in calibrated
        if one.resize is None and one.name not in _AS_PUBLISHED
    ]
    return [*calibrated, *plain]


def every_row() -> list[Setting]:
    """The whole table, in its order."""
    found = [one for tokens in BUDGETS for one in rows_at(tokens)]
    return [Setting(BASELINE, NO_MERGING), *found]


def most_telling_first(settings: Sequence[Setting]) -> list[Setting]:
    """Those with calibration, then the others at 1/4 and 1/16: a run that is stopped has these."""
    last = (None, *BUDGETS[1::2], *BUDGETS[::2])

    def place(one: Setting) -> int:
        return last.index(one.budget) if one.name.endswith(NOT_CALIBRATED) else 0

    return sorted(settings, key=place)


def in_parts(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Questions of `SCENES_TOGETHER` scenes, first all first ones, then all second ones, ..."""
    block = SCENES_TOGETHER * PER_SCENE
    parts = [samples[first : first + block] for first in range(0, len(samples), block)]
    return [[one for turn in range(PER_SCENE) for one in part[turn::PER_SCENE]] for part in parts]


def image_of(packages: Path, number: int, split: str) -> Image.Image:
    """The image of one scene."""
    found = library(packages)
    return draw(scene(number, split, found), found)[0]


def ask(model: Any, processor: Any, batch: dict[str, Tensor]) -> list[str]:
    """Greedy answers; the tower is not run again for the images of the last call."""
    cache = {"image_cache": _CACHE} if is_wrapped(model) else {}
    sequences = asking.generated(model, batch, max_new_tokens=ANSWER_TOKENS, **cache)
    return asking.decoded(processor, batch, sequences)


def options(packages: Path, split: str) -> dict[str, Any]:
    """Of `demo_benchmark.run`, for a worker process."""
    return {
        "split": split,
        "batch_size": SCENES_TOGETHER,
        "answers_of": ask,
        "image_of": functools.partial(image_of, packages),
    }
