"""The measurements of `pitome-vlm demo`: what is compared, on which questions, how it is timed.

Every number and every answer is computed on the spot; only the scene is stored.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..demo import Sample, load_split, scene_image
from ..demo import scene as described
from ..demo.drawing import object_map
from ..demo.shown import shown
from ..measure.demo_benchmark import Outcome, Setting, accuracy_interval, first_token_times, run
from ..measure.description import describe_llava
from ..measure.visualize import SourceMap, source_map
from ..merge.config import DEFAULT_KEEP, MergeConfig
from ..wrapping.wrap import wrapped
from .session import DEMO, load_model

SPLIT = "test"
BATCH = 45
TIMED_RUNS = 10
TIMED_BATCHES = (1, 8)
DEFAULT, PAPER = "pitome_plus", "paper"
UNMERGED = Setting("no merging", MergeConfig(keep=1.0, algorithm="none"))
SCENE_METHODS = (DEFAULT, "tome", PAPER)
METHODS = (*SCENE_METHODS, "random")
KEEPS = (0.5, 0.25, 0.125)
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
        first_token_ms: median time from pixels to the first token, by size of the batch.
        kv_bytes: size of the KV cache of one image's tokens.
    """

    outcome: Outcome
    interval: tuple[float, float]
    first_token_ms: Mapping[int, float]
    kv_bytes: float


@dataclass(frozen=True)
class Scene:
    """A scene to look at.

    Attributes:
        split: where it is from.
        samples: all questions about it.
        question: number of the one that the images are about.
    """

    split: str
    samples: Sequence[Sample]
    question: int = 0

    @property
    def number(self) -> int:
        """Its number in the split."""
        return self.samples[0].scene_id


def setting(method: str, keep: float) -> Setting:
    """A method at a fraction of the visual tokens; `paper` is PiToMe as published."""
    if method == PAPER:
        return Setting(method, MergeConfig.preset(PAPER, keep=keep))
    return Setting(method, MergeConfig(keep=keep, algorithm=method))


def settings(methods: Sequence[str], *keeps: float) -> list[Setting]:
    """The unmerged model, then every method at every given fraction of the visual tokens."""
    return [UNMERGED, *(setting(method, keep) for keep in keeps for method in methods)]


def load_demo(*, verbose: bool = False) -> Demo:
    """The bundled model in float32, which CPUs are fastest with."""
    return Demo(*load_model(DEMO, dtype="float32", verbose=verbose))


def held_out() -> list[Sample]:
    """All held-out questions."""
    return load_split(SPLIT)


def chosen_scene(seed: int | None) -> Scene:
    """The scene of the README, or one with several objects that the seed draws."""
    if seed is not None:
        return Scene(SPLIT, draw_scene(held_out(), seed))
    stored = shown()
    about = [one for one in load_split(stored.split) if one.scene_id == stored.scene_id]
    return Scene(stored.split, about, [one.question for one in about].index(stored.question))


def draw_scene(samples: Sequence[Sample], seed: int) -> list[Sample]:
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

    def answers(self, scene: Scene) -> list[Outcome]:
        """All questions about one scene, unmerged and under the methods that the README names."""
        chosen, asked = settings(SCENE_METHODS, SHOWN_KEEP), scene.samples
        return run(
            self.model, self.processor, chosen, asked, split=scene.split, batch_size=len(asked)
        )

    def groups(self, chosen: Setting, scene: Scene) -> SourceMap:
        """Which patches of the scene a setting merges, at the size that questions are asked at."""
        with wrapped(self.model, config=chosen.config):
            return source_map(self.model, self.processor, scene_image(scene.number, scene.split))

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
        chosen = settings(METHODS, *KEEPS)
        given: Any = {"split": SPLIT}
        outcomes = run(
            self.model, self.processor, chosen, samples, batch_size=BATCH, advance=asked, **given
        )
        times: dict[int, list[float]] = {}
        for size in TIMED_BATCHES:
            rounds = first_token_times(
                self.model,
                self.processor,
                chosen,
                samples[:size],
                rounds=TIMED_RUNS,
                advance=timed,
                **given,
            )
            times[size] = [statistics.median(one.wall_ms for one in own) for own in rounds]
        return [
            Score(
                outcome,
                accuracy_interval(samples, outcome.correct),
                {size: times[size][row] for size in TIMED_BATCHES},
                describe_llava(self.model, config=own.config).after.kv_bytes_per_image,
            )
            for row, (own, outcome) in enumerate(zip(chosen, outcomes, strict=True))
        ]


def what_is_kept(scene: Scene, groups: SourceMap) -> str:
    """How the tokens of a scene are shared between its objects and the background."""
    rows, columns = groups.grid
    pixels = object_map(described(scene.number, scene.split))
    height, width = pixels.shape
    # [rows, columns]: patches that an object reaches into.
    touched = pixels.reshape(rows, height // rows, columns, width // columns).any((1, 3))
    tokens, patches = len(set(groups.groups[touched])), int(touched.sum())
    return (
        f"{tokens} of its {groups.tokens} tokens show the objects, which {patches} of the "
        f"{touched.size} patches do; the other {touched.size - patches}, plain background, became "
        f"{groups.tokens - tokens} tokens."
    )


def score_columns(model: Any) -> list[str]:
    """Heads of the rows that `score_row` makes."""
    dtype = str(model.dtype).removeprefix("torch.")
    times = [head for size in TIMED_BATCHES for head in (f"batch {size}", "faster")]
    return ["method", "tokens", "right", "95 %", *times, f"KV ({dtype})"]


def score_row(score: Score, first: Score) -> list[str]:
    """A row of the comparison as text; `first` is the unmerged model."""
    low, high = score.interval
    times = []
    for size, ms in score.first_token_ms.items():
        times += [f"{ms:.0f} ms", f"{first.first_token_ms[size] / ms:.2f}x"]
    return [
        score.outcome.setting.name,
        f"{score.outcome.tokens:g}",
        f"{score.outcome.accuracy:.1f} %",
        f"{low:.0f} to {high:.0f}",
        *times,
        f"{score.kv_bytes / 1024:.0f} KiB",
    ]


def new_budgets(scores: Sequence[Score]) -> frozenset[int]:
    """Numbers of the rows at which another number of tokens begins."""
    tokens = [score.outcome.tokens for score in scores]
    return frozenset(i for i in range(1, len(tokens)) if tokens[i] != tokens[i - 1])


def note(scores: Sequence[Score]) -> str:
    """What a reader has to know about the numbers."""
    widest = max((score.interval for score in scores), key=lambda i: i[1] - i[0])
    sizes = " and ".join(map(str, TIMED_BATCHES))
    return (
        f"A small sample: the true accuracy may be {(widest[1] - widest[0]) / 2:.0f} points higher "
        "or lower, so neighbouring rows may swap. Results on all held-out questions are in "
        f"{FULL_TABLE} of the repository.\n"
        f"{DEFAULT}: the default; {PAPER}: PiToMe as published. Batch {sizes}: from the pixels of "
        f"so many images to the first token, median of {TIMED_RUNS} runs, methods taking turns; "
        "faster: than no merging. KV: size of the KV cache per image."
    )
