"""A conversation with a LLaVA about images, without a terminal.

The same engine serves wrapped and unwrapped models; prompts, generation and decoding are those of
`measure.asking`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..loading.videos import Video
from ..measure import asking
from ..wrapping.image_cache import ImageCache
from ..wrapping.wrap import is_wrapped


@dataclass
class Conversation:
    """Images, videos and the turns of a conversation about them.

    Every answer is computed from the whole conversation, so that the images or the number of
    visual tokens may change between two questions.

    Attributes:
        model: a LLaVA, wrapped or not.
        processor: its processor.
        max_new_tokens: longest answer in tokens.
        temperature: 0 for the most likely answer; above 0 answers are sampled.
        images: images shown before the first question.
        videos: videos shown after them.
        turns: (question, answer) pairs so far.
        image_cache: visual tokens of the images, so that only the first question runs the tower.
    """

    model: Any
    processor: Any
    max_new_tokens: int = 256
    temperature: float = 0.0
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    image_cache: ImageCache = field(default_factory=ImageCache)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    def show(self, images: Sequence[Image.Image] = (), videos: Sequence[Video] = ()) -> None:
        """Show other images or videos; the conversation about the old ones is forgotten."""
        self.images, self.videos, self.turns = list(images), list(videos), []

    def reset(self) -> None:
        """Forget the conversation; images and videos stay."""
        self.turns = []

    def ask(
        self,
        question: str,
        *,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> str:
        """Answer a question and remember both; after an error nothing is remembered.

        Args:
            question: text without image placeholders.
            on_text: called with every piece of the answer as soon as it is generated.
            stop: once set, the answer ends after the current token and is kept as far as it came.

        Returns:
            The whole answer.

        Raises:
            ValueError: an empty question, or one with an image placeholder.
        """
        question = asking.checked_question(question, self.processor)
        prompt = asking.prompt_text(self.processor, self._messages(question))
        batch = asking.encoded(self.processor, [prompt], self.images, videos=self.videos)
        tokenizer = asking.tokenizer_of(self.processor)
        options: dict[str, Any] = (
            {"image_cache": self.image_cache} if is_wrapped(self.model) else {}
        )
        if self.temperature > 0:
            options |= {"do_sample": True, "temperature": self.temperature}
        sequences = asking.generated(
            self.model,
            batch,
            max_new_tokens=self.max_new_tokens,
            streamer=None if on_text is None else _Streamer(tokenizer, on_text),
            stopping_criteria=StoppingCriteriaList([_Stop(stop or threading.Event())]),
            **options,
        )
        (answer,) = asking.decoded(self.processor, batch, sequences)
        if answer:
            self.turns.append((question, answer))
        return answer

    def _messages(self, question: str) -> list[asking.Message]:
        """The turns so far and the new question; what is shown comes before the first question."""
        messages: list[asking.Message] = []
        shown = len(self.images), len(self.videos)
        for said, answer in self.turns:
            messages += [asking.user_message(said, *shown), asking.assistant_message(answer)]
            shown = 0, 0
        return [*messages, asking.user_message(question, *shown)]


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        del scores, kwargs
        stopped = self.event.is_set()
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device)


class _Streamer(TextStreamer):
    """Whole words to a function instead of to stdout."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.started = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece on, without the space before the first visible character."""
        del stream_end
        text = text if self.started else text.lstrip()
        self.started = self.started or bool(text)
        if text:
            self.on_text(text)
