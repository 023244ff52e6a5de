"""The simplest alternative: smaller images of as many tokens, and no merging.

With the processor's own limit on the size of an image where it has one, else with pixels scaled
down and the tower's position embeddings interpolated.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...adapters import find_adapter
from ...loading.image_processors import SizeLimit, size_limit
from ...merge.config import MergeConfig
from ...wrapping.encode import prompt_images
from ...wrapping.wrap import base_model, unwrapped, wrapped
from ..asking import on_model
from ..resize import any_image_size, shrunk
from ..timing import time_prefill
from .rows import Row

Batch = dict[str, Tensor]
# A limit is chosen on at most so many questions, evenly taken.
_LOOKED_AT = 64
# Beyond this the comparison would not be at equal tokens.
_MOST_MORE = 1.5
_TIMED_RUNS = 5


class Questions(Protocol):
    """A model and the rows it can be asked, named by their numbers (`asking.ModelAsker`)."""

    model: Any
    processor: Any
    rows: Sequence[Row]

    def parts(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """Row numbers by batch."""
        ...

    def prepare(
        self, part: tuple[int, ...], image_options: Mapping[str, Any] | None = None
    ) -> Batch:
        """Rows as the processor's tensors."""
        ...

    def batch(self, part: tuple[int, ...]) -> Batch:
        """The same without options, which may be kept."""
        ...

    def answer(self, batch: Batch) -> tuple[list[str], Tensor]:
        """Answers first."""
        ...


@dataclass(frozen=True)
class Smaller:
    """What a model answers to some rows about smaller images, without merging.

    Attributes:
        how: how images were made smaller, as a phrase.
        tokens: visual tokens per image, a mean.
        merged_tokens: the same with merging, on the same rows.
        answers: one text per row.
        ms: median time to the first token of the first row, alone, in milliseconds.
        merged_ms: the same with merging.
    """

    how: str
    tokens: float
    merged_tokens: float
    answers: list[str]
    ms: float
    merged_ms: float


def ask_smaller(
    asker: Questions, config: MergeConfig, rows: Sequence[int], advance: Callable[[int], object]
) -> Smaller:
    """Answer rows about smaller images that have about as many tokens as under a config, or more.

    Args:
        asker: the model and its questions; the model is left as it was.
        config: merge options with a fixed budget.
        rows: row numbers.
        advance: called with the number of rows after every batch.

    Raises:
        ValueError: images cannot be made smaller, or not to about as many tokens; the reason.
    """
    model = asker.model
    with wrapped(model, config=config):
        counts = [
            image.count
            for part in asker.parts(rows)
            for image in prompt_images(model, on_model(model, asker.batch(part)))
        ]
        merged = sum(counts) / len(counts)
        merged_ms = _first_token_ms(model, asker.batch((rows[0],)))
    with unwrapped(model), contextlib.ExitStack() as stack:
        limit = size_limit(asker.processor)
        if limit is None:
            how, batch_of = "images scaled down", _scaled(asker, rows, merged)
            stack.enter_context(any_image_size(model))
        else:
            value = _limit_for(asker, limit, rows, merged)
            how, batch_of = f"{limit.name}={value}", _limited(asker, limit.options(value))
        answers: list[str] = []
        seen = 0
        for part in asker.parts(rows):
            batch = batch_of(part)
            seen += _placeholders(model, batch)
            answers += asker.answer(batch)[0]
            advance(len(part))
        ms = _first_token_ms(model, batch_of((rows[0],)))
    return Smaller(how, seen / len(counts), merged, answers, ms, merged_ms)


def _scaled(
    asker: Questions, rows: Sequence[int], tokens: float
) -> Callable[[tuple[int, ...]], Batch]:
    if any(len(asker.rows[row].images) > 1 for row in rows):
        raise ValueError("there are questions about several images, whose pixels are not scaled")
    wanted = round(tokens)

    def batch_of(part: tuple[int, ...]) -> Batch:
        return shrunk(asker.model, asker.batch(part), wanted)[0]

    _check_equal(_placeholders(asker.model, batch_of((rows[0],))), tokens, "a grid of patches")
    return batch_of


def _limited(asker: Questions, options: dict[str, Any]) -> Callable[[tuple[int, ...]], Batch]:
    return lambda part: asker.prepare(part, options)


def _limit_for(asker: Questions, limit: SizeLimit, rows: Sequence[int], tokens: float) -> int:
    """The smallest value that gives at least `tokens` per image."""
    chosen = rows[:: -(-len(rows) // _LOOKED_AT)]
    images = sum(len(asker.rows[row].images) for row in chosen)
    parts = asker.parts(chosen)

    def mean(value: int) -> float:
        batches = (asker.prepare(part, limit.options(value)) for part in parts)
        return sum(_placeholders(asker.model, batch) for batch in batches) / images

    place = bisect.bisect_left(limit.values, tokens, key=mean)
    value = limit.values[min(place, len(limit.values) - 1)]
    _check_equal(mean(value), tokens, f"{limit.name}={value}")
    return value


def _check_equal(found: float, tokens: float, what: str) -> None:
    if found > _MOST_MORE * tokens:
        raise ValueError(
            f"no smaller image has about {tokens:.0f} tokens: {what} still makes {found:.0f}"
        )


def _placeholders(model: Any, batch: Batch) -> int:
    """Visual tokens in a batch for the model without merging."""
    base = base_model(model)
    return int((batch["input_ids"] == find_adapter(base).placeholder_ids(base)["image"]).sum())


def _first_token_ms(model: Any, batch: Batch) -> float:
    return time_prefill(model, on_model(model, batch), repeats=_TIMED_RUNS, warmup=1).median_ms
