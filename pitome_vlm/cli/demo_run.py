"""The measurements behind `pitome-vlm demo`.

Knows: what the demo compares, which held-out questions it asks and how it takes times. Does not
know: how questions are asked and intervals computed (`demo.benchmark`), terminals, files or HTML.
Everything is computed here and now; no number is stored.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..demo import Sample, checkpoint_path, load_split
from ..measure.demo_benchmark import Outcome, Setting, batches, interval, run
from ..measure.description import describe
from ..measure.timing import time_prefill
from ..measure.visualize import SourceMap, source_map
from ..merge.config import MergeConfig
from ..wrapping.wrap import wrapped
from .options import LoadOptions
from .session import load_model

SPLIT = "test"
BATCH = 45
TIMED_RUNS = 20
TIMED_BATCH = 2
UNMERGED = Setting("no merging", MergeConfig(keep=1.0, algorithm="none"))
TITLES = {"pitome_plus": "PiToMe+", "tome": "ToMe", "random": "random", "pool": "pool"}
KEEPS = (0.5, 0.25, 0.11)
SHOWN_KEEP = 0.25
# Kinds with several objects: there is something to look at.
SHOWN_KINDS = ("scattered", "identical", "digits", "crowded")
MIN_SCENE_QUESTIONS = 5


@dataclass(frozen=True)
class Score:
    """One row of the comparison.

    Attributes:
        outcome: the answers.
        interval: 95 % interval of the accuracy in percent.
        prefill_ms: median time from pixels to the first token.
        kv_bytes: cache that one image's tokens take.
    """

    outcome: Outcome
    interval: tuple[float, float]
    prefill_ms: float
    kv_bytes: float


def settings(*keeps: float) -> list[Setting]:
    """The unmerged model, then every method at every given fraction of the tokens."""
    merged = [
        Setting(title, MergeConfig(keep=keep, algorithm=name))
        for keep in keeps
        for name, title in TITLES.items()
    ]
    return [UNMERGED, *merged]


def load_demo(*, verbose: bool = False) -> Demo:
    """The bundled model, in float32 as a CPU likes it."""
    loading = LoadOptions(str(checkpoint_path()), dtype="float32")
    return Demo(*load_model(loading, {}, verbose=verbose))


def held_out() -> list[Sample]:
    """All held-out questions."""
    return load_split(SPLIT)


def choose_scene(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """All questions about one scene with several objects, drawn by the seed."""
    scenes: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.kind in SHOWN_KINDS:
            scenes[sample.scene_id].append(sample)
    rich = [about for about in scenes.values() if len(about) >= MIN_SCENE_QUESTIONS]
    return random.Random(seed).choice(rich)


def balanced(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` questions with every type equally often (or one more), in a fixed order.

    Raises:
        ValueError: `count` is out of range.
    """
    by_type: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_type[sample.question_type].append(sample)
    most = min(map(len, by_type.values())) * len(by_type)
    if not len(by_type) <= count <= most:
        raise ValueError(
            f"questions must be in {len(by_type)}..{most} ({len(by_type)} types), got {count}"
        )
    rng = random.Random(seed)
    shuffled = [rng.sample(about, len(about)) for about in by_type.values()]
    return [about[i] for i in range(len(samples)) for about in shuffled if i < len(about)][:count]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread.

    Threads that wait for each other slow a model this small down many times over on a busy
    machine, and make times incomparable.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Demo:
    """The bundled model, asked held-out questions under different settings."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    def answers(self, scene: Sequence[Sample]) -> list[Outcome]:
        """All questions about one scene, unmerged and under every method."""
        chosen = settings(SHOWN_KEEP)
        return run(self.model, self.processor, chosen, scene, split=SPLIT, batch_size=len(scene))

    def scores(
        self,
        samples: Sequence[Sample],
        asked: Callable[[int], object],
        timed: Callable[[int], object],
    ) -> list[Score]:
        """Accuracy, time and memory of every setting.

        Args:
            samples: what to ask.
            asked: called with the number of questions after every batch.
            timed: called with 1 after every round of timing.
        """
        chosen = settings(*KEEPS)
        outcomes = run(
            self.model,
            self.processor,
            chosen,
            samples,
            split=SPLIT,
            batch_size=BATCH,
            advance=asked,
        )
        times = self._times(chosen, samples, timed)
        return [
            Score(outcome, _percent(samples, outcome), times[outcome.setting], kv_bytes)
            for outcome, kv_bytes in zip(outcomes, map(self._kv_bytes, chosen), strict=True)
        ]

    def groups(self, setting: Setting, image: Image.Image) -> SourceMap:
        """Which patches of a picture a setting merges."""
        with wrapped(self.model, config=setting.config):
            return source_map(self.model, self.processor, image)

    def _kv_bytes(self, setting: Setting) -> float:
        return describe(self.model, config=setting.config).after.kv_bytes_per_image

    def _times(
        self, chosen: Sequence[Setting], samples: Sequence[Sample], timed: Callable[[int], object]
    ) -> dict[Setting, float]:
        """Median milliseconds from pixels to the first token.

        The settings take turns, so that whatever else the machine does falls on all of them.
        """
        batch = next(batches(self.processor, samples[:TIMED_BATCH], SPLIT, TIMED_BATCH))
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        times: dict[Setting, list[float]] = defaultdict(list)
        for turn in range(1 + TIMED_RUNS):
            for setting in chosen:
                with wrapped(self.model, config=setting.config):
                    timing = time_prefill(self.model, inputs, repeats=1, warmup=0)
                if turn:  # the first round warms up
                    times[setting].append(timing.median_ms)
            if turn:
                timed(1)
        return {setting: statistics.median(values) for setting, values in times.items()}


def _percent(samples: Sequence[Sample], outcome: Outcome) -> tuple[float, float]:
    low, high = interval(samples, outcome.correct)
    return 100 * low, 100 * high
