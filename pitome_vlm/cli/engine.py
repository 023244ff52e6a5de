"""A conversation with a LLaVA about images, without a terminal.

The same engine serves wrapped and unwrapped models; prompts, generation and decoding are those of
`measure.asking`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..common import counted
from ..loading.videos import Video
from ..measure import asking
from ..measure.answering import Answer, answer
from ..wrapping.encode import prompt_images
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
        last: the last answer and what it took.
        visual: of its prompt, visual tokens before and after merging; None where that is unknown.
    """

    model: Any
    processor: Any
    max_new_tokens: int = 256
    temperature: float = 0.0
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    image_cache: ImageCache = field(default_factory=ImageCache)
    last: Answer | None = None
    visual: tuple[int, int] | None = None

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
        options: dict[str, Any] = (
            {"image_cache": self.image_cache} if is_wrapped(self.model) else {}
        )
        if self.temperature > 0:
            options |= {"do_sample": True, "temperature": self.temperature}
        self.last = answer(
            self.model,
            self.processor,
            batch,
            max_new_tokens=self.max_new_tokens,
            on_text=on_text,
            stop=stop,
            **options,
        )
        self.visual = self._visual_tokens(batch)
        if self.last.text:
            self.turns.append((question, self.last.text))
        return self.last.text

    def cost(self) -> str:
        """What the last answer took, in one line; empty before the first."""
        if self.last is None:
            return ""
        whole = [f"{self.visual[1]} of {self.visual[0]} visual tokens"] if self.visual else []
        first = f"first token after {self.last.first_token_s:.2f} s"
        length = f"{counted(self.last.tokens, 'token')} in {self.last.total_s:.2f} s"
        return ", ".join([*whole, first, length])

    def _visual_tokens(self, batch: Mapping[str, Any]) -> tuple[int, int] | None:
        """Of a whole prompt without and with merging; after its answer, the cache knows both."""
        if not is_wrapped(self.model) or not (self.images or self.videos):
            return None
        given = {**asking.on_model(self.model, batch), "image_cache": self.image_cache}
        found = prompt_images(self.model, given)
        return sum(one.full for one in found), sum(one.count for one in found)

    def _messages(self, question: str) -> list[asking.Message]:
        """The turns so far and the new question; what is shown comes before the first question."""
        messages: list[asking.Message] = []
        shown = len(self.images), len(self.videos)
        for said, told in self.turns:
            messages += [asking.user_message(said, *shown), asking.assistant_message(told)]
            shown = 0, 0
        return [*messages, asking.user_message(question, *shown)]
