"""The measurements of `pitome-vlm demo`: what is compared, on which questions, how it is timed.

Everything is computed on the spot; no number is stored.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..demo import Sample, load_split
from ..measure.demo_benchmark import Outcome, Setting, accuracy_interval, batches, run
from ..measure.description import describe_llava
from ..measure.timing import time_prefill
from ..measure.visualize import SourceMap, source_map
from ..merge.config import DEFAULT_KEEP, MergeConfig
from ..wrapping.wrap import wrapped
from .session import DEMO, load_model

SPLIT = "test"
BATCH = 45
TIMED_RUNS = 20
TIMED_BATCH = 2
UNMERGED = Setting("no merging", MergeConfig(keep=1.0, algorithm="none"))
TITLES = {"pitome_plus": "PiToMe+", "tome": "ToMe", "random": "random", "pool": "pool"}
KEEPS = (0.5, 0.25, 0.11)
SHOWN_KEEP = DEFAULT_KEEP
# Kinds of scenes with several objects, so that there is something to look at.
SHOWN_KINDS = ("scattered", "identical", "digits", "crowded")
MIN_SCENE_QUESTIONS = 5
FULL_TABLE = "eval/results/demo"


@dataclass(frozen=True)
class Score:
    """One row of the comparison.

    Attributes:
        outcome: the answers.
        interval: 95 % interval of the accuracy in percent.
        prefill_ms: median time from pixels to the first token.
        kv_bytes: size of the KV cache of one image's tokens.
    """

    outcome: Outcome
    interval: tuple[float, float]
    prefill_ms: float
    kv_bytes: float


def settings(*keeps: float) -> list[Setting]:
    """The unmerged model, then every method at every given fraction of the visual tokens."""
    merged = [
        Setting(title, MergeConfig(keep=keep, algorithm=name))
        for keep in keeps
        for name, title in TITLES.items()
    ]
    return [UNMERGED, *merged]


def load_demo(*, verbose: bool = False) -> Demo:
    """The bundled model in float32, which CPUs are fastest with."""
    return Demo(*load_model(DEMO, dtype="float32", verbose=verbose))


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
    """`count` questions with every type equally often (or one more), in a fixed order."""
    by_type: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_type[sample.question_type].append(sample)
    most = min(map(len, by_type.values())) * len(by_type)
    if not len(by_type) <= count <= most:
        raise ValueError(
            f"--questions must be in {len(by_type)}..{most}, so that each of the {len(by_type)} "
            f"types is asked, got {count}"
        )
    rng = random.Random(seed)
    shuffled = [rng.sample(about, len(about)) for about in by_type.values()]
    return [about[i] for i in range(len(samples)) for about in shuffled if i < len(about)][:count]


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

        `asked` is called with the number of questions after every batch, `timed` with 1 after every
        round of timing.
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
            Score(
                outcome,
                accuracy_interval(samples, outcome.correct),
                times[outcome.setting],
                kv_bytes,
            )
            for outcome, kv_bytes in zip(outcomes, map(self._kv_bytes, chosen), strict=True)
        ]

    def groups(self, setting: Setting, image: Image.Image) -> SourceMap:
        """Which patches of an image a setting merges."""
        with wrapped(self.model, config=setting.config):
            return source_map(self.model, self.processor, image)

    def _kv_bytes(self, setting: Setting) -> float:
        return describe_llava(self.model, config=setting.config).after.kv_bytes_per_image

    def _times(
        self, chosen: Sequence[Setting], samples: Sequence[Sample], timed: Callable[[int], object]
    ) -> dict[Setting, float]:
        """Median milliseconds from pixels to the first token.

        The settings take turns, so that other load on the machine affects all of them alike.
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


def score_columns(model: Any) -> list[str]:
    """Heads of the rows that `score_row` makes."""
    dtype = str(model.dtype).removeprefix("torch.")
    return ["method", "tokens", "right", "95 %", "prefill", "faster", f"KV ({dtype})"]


def score_row(score: Score, first: Score) -> list[str]:
    """A row of the comparison as text; `first` is the unmerged model."""
    low, high = score.interval
    return [
        score.outcome.setting.name,
        f"{score.outcome.tokens:g}",
        f"{score.outcome.accuracy:.1f} %",
        f"{low:.0f} to {high:.0f}",
        f"{score.prefill_ms:.1f} ms",
        f"{first.prefill_ms / score.prefill_ms:.2f}x",
        f"{score.kv_bytes / 1024:.0f} KiB",
    ]


def new_budgets(scores: Sequence[Score]) -> frozenset[int]:
    """Numbers of the rows at which another number of tokens begins."""
    tokens = [score.outcome.tokens for score in scores]
    return frozenset(i for i in range(1, len(tokens)) if tokens[i] != tokens[i - 1])


def note(scores: Sequence[Score]) -> str:
    """What a reader has to know about the numbers."""
    widest = max((score.interval for score in scores), key=lambda i: i[1] - i[0])
    return (
        f"A small sample: the true accuracy may be {(widest[1] - widest[0]) / 2:.0f} points higher "
        "or lower, so neighbouring rows may swap. Results on all held-out questions are in "
        f"{FULL_TABLE} of the repository.\nPrefill: from pixels to the first token of "
        f"{TIMED_BATCH} prompts at once, median of {TIMED_RUNS} runs, methods taking turns; "
        "faster: than no merging. KV: size of the KV cache per image."
    )
