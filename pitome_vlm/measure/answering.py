"""One answer of a LLaVA as it appears: its pieces, its length, the wait for its first token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from . import asking


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it took.

    Attributes:
        text: without prompt and special tokens.
        tokens: generated, the end token included.
        first_token_s: seconds from pixels and ids to the first token.
        total_s: seconds to the last one.
    """

    text: str
    tokens: int
    first_token_s: float
    total_s: float


def answer(
    model: Any,
    processor: Any,
    batch: Mapping[str, Tensor],
    *,
    on_text: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> Answer:
    """Generate the answer to one prompt.

    Args:
        model: a LLaVA, wrapped or not.
        processor: its processor.
        batch: of `asking.encoded`, one row.
        on_text: called with every piece of the answer as soon as it is generated.
        stop: once set, the answer ends after the current token and is kept as far as it came.
        **options: of `generate`, such as `max_new_tokens`.
    """
    streamer = _Streamer(asking.tokenizer_of(processor), on_text)
    started = time.perf_counter()
    sequences = asking.generated(
        model,
        batch,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([_Stop(stop or threading.Event())]),
        **options,
    )
    total = time.perf_counter() - started
    (text,) = asking.decoded(processor, batch, sequences)
    new = sequences.shape[1] - batch["input_ids"].shape[1]
    first = total if streamer.first is None else streamer.first - started
    return Answer(text, new, first, total)


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        del scores, kwargs
        stopped = self.event.is_set()
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device)


class _Streamer(TextStreamer):
    """Whole words to a function instead of to stdout; remembers when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.started = False
        self.prompt_seen = False
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt, then every token; they come from the CPU, so none is still computed."""
        if self.prompt_seen and self.first is None:
            self.first = time.perf_counter()
        self.prompt_seen = True
        if self.on_text is not None:
            super().put(value)

    def end(self) -> None:
        """Pass on what is left of the text."""
        if self.on_text is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece on, without the space before the first visible character."""
        del stream_end
        text = text if self.started else text.lstrip()
        self.started = self.started or bool(text)
        if text and self.on_text is not None:
            self.on_text(text)
