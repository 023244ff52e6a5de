"""The demo benchmark: held-out questions of the bundled model under many merge settings.

Asks every question of a split under every `MergeConfig`, and says how uncertain the accuracies
and their differences are. Tables and plots are made by `scripts/demo` and the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ..demo.dataset import Sample, scene_image
from ..demo.second import SecondQuestion
from ..merge.config import MergeConfig
from ..wrapping.encode import visual_token_counts
from ..wrapping.wrap import wrapped
from . import asking, resize
from .stats import Interval, mean_interval, simultaneous_intervals
from .timing import no_garbage_collection, time_prefill

# One word and the end token; a second word would be a wrong answer anyway.
ANSWER_TOKENS = 3
# From the number of a scene and its split to the image.
Images = Callable[[int, str], Image.Image]
# From a model, its processor and a batch to one answer per question.
Answers = Callable[[Any, Any, dict[str, Tensor]], list[str]]


@dataclass(frozen=True)
class Setting:
    """One row of a comparison.

    Attributes:
        name: of the method, as people write it.
        config: its merge options.
        resize: images are scaled down to about so many tokens instead, and nothing is merged.
    """

    name: str
    config: MergeConfig
    resize: int | None = None

    @property
    def budget(self) -> int | None:
        """Visual tokens that were asked for, if a number was."""
        return self.resize or self.config.tokens


@dataclass
class Outcome:
    """Every answer under one setting.

    Attributes:
        setting: what was measured.
        tokens: visual tokens per image that reached the language model, a mean where images
            have counts of their own.
        answers: one per question, in the order of the samples.
        correct: [questions] bool.
    """

    setting: Setting
    tokens: float
    answers: list[str]
    correct: np.ndarray = field(repr=False)

    @property
    def accuracy(self) -> float:
        """Percent of the questions answered exactly right."""
        return 100.0 * float(self.correct.mean())


def prompt_of(processor: Any, sample: Sample) -> str:
    """The prompt of a question; the first one and its right answer go before a second one."""
    if not isinstance(sample, SecondQuestion):
        return asking.question_prompt(processor, sample.question)
    turns = [
        asking.user_message(sample.first_question, images=1),
        asking.assistant_message(sample.first_answer),
        asking.user_message(sample.question),
    ]
    return asking.prompt_text(processor, turns)


def batches(
    processor: Any,
    samples: Sequence[Sample],
    split: str,
    batch_size: int,
    image_of: Images = scene_image,
) -> Iterator[dict[str, Tensor]]:
    """Processor output for the samples, `batch_size` (>= 1) questions at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        texts = [prompt_of(processor, sample) for sample in part]
        yield asking.encoded(processor, texts, [image_of(s.scene_id, split) for s in part])


def ask(model: Any, processor: Any, batch: dict[str, Tensor]) -> list[str]:
    """Greedy answers of the model as it is (wrapped or not) to one batch."""
    return asking.answers(model, processor, batch, max_new_tokens=ANSWER_TOKENS)


def run(
    model: Any,
    processor: Any,
    settings: Sequence[Setting],
    samples: Sequence[Sample],
    *,
    split: str,
    batch_size: int = 48,
    advance: Callable[[int], object] | None = None,
    answers_of: Answers = ask,
    image_of: Images = scene_image,
) -> list[Outcome]:
    """Ask questions of a split under every setting.

    A batch is prepared once and asked under all settings, so that all see the same pixels.

    Args:
        model: the demo model, not wrapped; it is left as it was.
        processor: its processor.
        settings: what to compare.
        samples: what to ask, from `load_split(split)`.
        split: where the images come from; "val" for choosing, "test" for reporting.
        batch_size: questions at a time.
        advance: called with the number of questions after every batch of a setting.
        answers_of: how the wrapped model, its processor and a batch become answers.
        image_of: the image of a scene, for questions of other scenes than the demo's.

    Returns:
        One outcome per setting.
    """
    answers: list[list[str]] = [[] for _ in settings]
    tokens: list[list[int]] = [[] for _ in settings]
    for batch in batches(processor, samples, split, batch_size, image_of):
        for index, setting in enumerate(settings):
            counts, given = _answered(model, processor, batch, setting, answers_of)
            tokens[index] += counts
            answers[index] += given
            if advance:
                advance(len(batch["input_ids"]))
    truth = np.array([sample.answer for sample in samples])
    return [
        Outcome(setting, _average(counts), given, np.array(given) == truth)
        for setting, counts, given in zip(settings, tokens, answers, strict=True)
    ]


class FirstToken(NamedTuple):
    """One run from pixels to the first token.

    Attributes:
        wall_ms: milliseconds by the clock: what a user waits for.
        processor_ms: milliseconds of processor time of this process, all its threads. On a machine
            that others use it says more of the work than the clock does; an accelerator's work is
            not in it.
    """

    wall_ms: float
    processor_ms: float


def first_token_times(
    model: Any,
    processor: Any,
    settings: Sequence[Setting],
    samples: Sequence[Sample],
    *,
    split: str,
    rounds: int,
    advance: Callable[[int], object] | None = None,
) -> list[list[FirstToken]]:
    """How long one batch of questions takes from pixels to the first token.

    The settings take turns, so that whatever else the machine does falls on all of them; a round
    that is not counted warms up. Python's garbage collector is off meanwhile.

    Args:
        model: the demo model, not wrapped; it is left as it was.
        processor: its processor.
        settings: what to compare.
        samples: the questions of the batch, from `load_split(split)`.
        split: where the images come from.
        rounds: timed runs of every setting.
        advance: called with 1 after every timed round.

    Returns:
        Every timed round, one list per setting.
    """
    batch = next(batches(processor, samples, split, len(samples)))
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    times: list[list[FirstToken]] = [[] for _ in settings]
    with no_garbage_collection():
        for turn in range(1 + rounds):
            for own, setting in zip(times, settings, strict=True):
                with wrapped(model, config=setting.config):
                    start = time.process_time()
                    timing = time_prefill(model, inputs, repeats=1, warmup=0)
                    spent = 1e3 * (time.process_time() - start)
                if turn:
                    own.append(FirstToken(timing.median_ms, spent))
            if turn and advance:
                advance(1)
    return times


def _answered(
    model: Any, processor: Any, batch: dict[str, Tensor], setting: Setting, answers_of: Answers
) -> tuple[list[int], list[str]]:
    """Tokens per image and answers of one batch under one setting."""
    if setting.resize is not None:
        smaller, count = resize.shrunk(model, batch, setting.resize)
        with resize.any_image_size(model):
            return [count] * len(batch["pixel_values"]), answers_of(model, processor, smaller)
    with wrapped(model, config=setting.config):
        counts = visual_token_counts(model, batch["pixel_values"])
        return counts, answers_of(model, processor, batch)


def _average(counts: Sequence[float]) -> float:
    """An int where all images have the same count."""
    mean = sum(counts) / len(counts)
    return int(mean) if mean.is_integer() else mean


def concatenate(parts: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Outcomes of consecutive parts of a split as outcomes of the whole."""
    return [
        Outcome(
            pieces[0].setting,
            _average([piece.tokens for piece in pieces for _ in piece.answers]),
            [answer for piece in pieces for answer in piece.answers],
            np.concatenate([piece.correct for piece in pieces]),
        )
        for pieces in zip(*parts, strict=True)
    ]


def accuracy_interval(samples: Sequence[Sample], correct: np.ndarray) -> Interval:
    """95 % interval of the percentage of right answers, [questions] bool; scenes are resampled."""
    return mean_interval(100.0 * correct, _scenes(samples), extremes=(0, 100))


def difference_intervals(
    samples: Sequence[Sample], differences: Sequence[np.ndarray]
) -> list[Interval]:
    """95 % intervals of several paired differences that hold together, in percentage points.

    Args:
        samples: the questions.
        differences: of shares of right answers, [questions] each, NaN for questions that a
            difference is not about.
    """
    points = 100.0 * np.asarray(differences, float)
    return simultaneous_intervals(points, _scenes(samples), extremes=(-100, 100))


def family_words(count: int) -> str:
    """The sentence that says how the intervals of a table of `count` differences are corrected."""
    return (
        f"Intervals of differences are simultaneous: the {count} of them hold together with 95 % "
        "(max-t bootstrap over images), so they are wider than those of a single comparison."
    )


def accuracy_by(samples: Sequence[Sample], correct: np.ndarray, attribute: str) -> dict[str, float]:
    """Percent right for every value of a sample's attribute ("question_type" or "kind")."""
    labels = np.array([getattr(sample, attribute) for sample in samples])
    return {
        str(label): 100.0 * float(correct[labels == label].mean()) for label in np.unique(labels)
    }


def _scenes(samples: Sequence[Sample]) -> list[int]:
    return [sample.scene_id for sample in samples]
