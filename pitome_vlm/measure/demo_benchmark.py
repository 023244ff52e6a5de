"""The demo benchmark: held-out questions under many merge settings, with honest intervals.

Knows: how to ask a model every question of a split under one `MergeConfig`, and how uncertain the
resulting accuracies and differences are. Does not know: files, tables or plots
(`scripts/demo/benchmark.py` writes those), nor how merging works.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from ..common import __version__
from ..demo.dataset import SPLIT_SCENES, Sample, scene_image
from ..merge.config import MergeConfig
from ..wrapping.encode import visual_token_counts
from ..wrapping.wrap import wrapped
from .machine import processor_name

# One word and the end token; a second word would be a wrong answer anyway.
ANSWER_TOKENS = 3
RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Setting:
    """One row of a comparison.

    Attributes:
        name: the method as people write it.
        config: merge options.
    """

    name: str
    config: MergeConfig


@dataclass
class Outcome:
    """Every answer under one setting.

    Attributes:
        setting: what was measured.
        tokens: visual tokens per image that reached the language model, a mean where pictures
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


def prompt_for(processor: Any, question: str) -> str:
    """One question about one picture, in the model's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    return text


def batches(
    processor: Any, samples: Sequence[Sample], split: str, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Processor output for the samples, `batch_size` questions at a time.

    Raises:
        ValueError: `batch_size` is below one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        yield dict(
            processor(
                images=[scene_image(sample.scene_id, split) for sample in part],
                text=[prompt_for(processor, sample.question) for sample in part],
                padding=True,
                return_tensors="pt",
            )
        )


def ask(model: Any, processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """Greedy answers of the model as it is (wrapped or not) to one batch."""
    on_device = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }
    out = model.generate(**on_device, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    tokenizer = getattr(processor, "tokenizer", processor)
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def run(
    model: Any,
    processor: Any,
    settings: Sequence[Setting],
    samples: Sequence[Sample],
    *,
    split: str,
    batch_size: int = 48,
    advance: Callable[[int], object] | None = None,
) -> list[Outcome]:
    """Ask questions of a split under every setting.

    A batch is prepared once and asked under all settings, so that all see the same pixels.

    Args:
        model: the demo model, not wrapped; it is left as it was.
        processor: its processor.
        settings: what to compare.
        samples: what to ask, from `load_split(split)`.
        split: where the pictures come from; "val" for choosing, "test" for reporting.
        batch_size: questions at a time.
        advance: called with the number of questions after every batch of a setting.

    Returns:
        One outcome per setting.
    """
    answers: list[list[str]] = [[] for _ in settings]
    tokens: list[list[int]] = [[] for _ in settings]
    for batch in batches(processor, samples, split, batch_size):
        for index, setting in enumerate(settings):
            with wrapped(model, config=setting.config):
                tokens[index] += visual_token_counts(model, batch["pixel_values"])
                answers[index] += ask(model, processor, batch)
            if advance:
                advance(len(batch["input_ids"]))
    truth = np.array([sample.answer for sample in samples])
    return [
        Outcome(setting, _average(counts), given, np.array(given) == truth)
        for setting, counts, given in zip(settings, tokens, answers, strict=True)
    ]


def _average(counts: Sequence[float]) -> float:
    """An int where all pictures have the same count."""
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


def interval(
    samples: Sequence[Sample], values: np.ndarray, *, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Bootstrap interval of a mean over questions, resampling whole pictures.

    Questions about one picture fail together, so resampling questions would be too sure of
    itself. Give per-question differences for a paired interval.

    Args:
        samples: which picture each value belongs to.
        values: [questions] numbers.
        seed: of the resampling.
        level: coverage.

    Returns:
        Lower and upper end, in the unit of the values.
    """
    scenes, index = np.unique([sample.scene_id for sample in samples], return_inverse=True)
    sums = np.bincount(index, weights=values.astype(float), minlength=len(scenes))
    counts = np.bincount(index, minlength=len(scenes))
    draws = np.random.default_rng(seed).integers(0, len(scenes), (RESAMPLES, len(scenes)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def accuracy_by(samples: Sequence[Sample], correct: np.ndarray, attribute: str) -> dict[str, float]:
    """Percent right for every value of a sample's attribute ("question_type" or "kind")."""
    labels = np.array([getattr(sample, attribute) for sample in samples])
    return {
        str(label): 100.0 * float(correct[labels == label].mean()) for label in np.unique(labels)
    }


def provenance(model: Any, *, split: str, questions: int, batch_size: int) -> dict[str, Any]:
    """What a reader needs to judge or repeat a number: hardware, versions, data, settings."""
    return {
        "hardware": processor_name() if model.device.type == "cpu" else str(model.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "batch_size": batch_size,
        "split": split,
        "questions": questions,
        "scenes": SPLIT_SCENES[split],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pitome_vlm": __version__,
    }
