"""A conversation with a LLaVA about pictures, without a terminal.

Knows: prompts, generation, how an answer is streamed and stopped. Does not know: keyboards,
consoles, or merging; the same engine serves wrapped and unwrapped models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..wrapping.image_cache import ImageCache
from ..wrapping.wrap import is_wrapped

PLACEHOLDER = "<image>"


@dataclass
class Conversation:
    """Pictures and what was said about them.

    Every answer is computed from the whole conversation, so that the pictures or the number of
    visual tokens may change between two questions.

    Attributes:
        model: a LLaVA, wrapped or not.
        processor: its processor.
        max_new_tokens: longest answer.
        temperature: 0 for the most likely answer, above it samples.
        images: pictures the first question is about.
        turns: (question, answer) so far.
        image_cache: visual tokens of the pictures, so that only the first question needs the tower.
    """

    model: Any
    processor: Any
    max_new_tokens: int = 256
    temperature: float = 0.0
    images: list[Image.Image] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    image_cache: ImageCache = field(default_factory=ImageCache)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    def show(self, images: Sequence[Image.Image]) -> None:
        """Look at other pictures; what was said about the old ones is forgotten."""
        self.images, self.turns = list(images), []

    def reset(self) -> None:
        """Forget what was said; the pictures stay."""
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
            on_text: called with every piece of the answer as soon as it is there.
            stop: once set, the answer ends with the token being made; what is there is kept.

        Returns:
            The whole answer.

        Raises:
            ValueError: an empty question, or one with an image placeholder.
        """
        question = check_question(question, self.processor)
        prompt = build_prompt(self.processor, [*self.turns, (question, None)], len(self.images))
        inputs = encode(self.processor, prompt, self.images)
        inputs = inputs.to(self.model.device, self.model.dtype)
        merged = {"image_cache": self.image_cache} if is_wrapped(self.model) else {}
        sampling = {"do_sample": True, "temperature": self.temperature}
        sequence = self.model.generate(
            **inputs,
            **merged,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
            max_new_tokens=self.max_new_tokens,
            streamer=None if on_text is None else _Streamer(tokenizer_of(self.processor), on_text),
            stopping_criteria=StoppingCriteriaList([_Stop(stop or threading.Event())]),
        )[0]
        new = sequence[inputs["input_ids"].shape[1] :]
        answer = str(tokenizer_of(self.processor).decode(new, skip_special_tokens=True)).strip()
        if answer:
            self.turns.append((question, answer))
        return answer


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
        """Hand a piece on; the answer begins with its first visible character."""
        del stream_end
        text = text if self.started else text.lstrip()
        self.started = self.started or bool(text)
        if text:
            self.on_text(text)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor."""
    return getattr(processor, "tokenizer", processor)


def check_question(question: str, processor: Any) -> str:
    """The question without outer spaces.

    Raises:
        ValueError: it is empty, or holds an image placeholder.
    """
    question = question.strip()
    if not question:
        raise ValueError("the question is empty")
    placeholder = str(getattr(processor, "image_token", None) or PLACEHOLDER)
    if placeholder in question:
        raise ValueError(
            f"the question must not contain {placeholder!r}: pictures are put in front of it"
        )
    return question


def build_prompt(processor: Any, turns: Sequence[tuple[str, str | None]], n_images: int) -> str:
    """The text of a conversation, ready for the processor.

    Args:
        processor: its chat template is used where there is one, else LLaVA-1.5's format.
        turns: (question, answer) pairs; the last answer is None.
        n_images: pictures in front of the first question.
    """
    messages: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(turns):
        pictures = [{"type": "image"}] * (n_images if index == 0 else 0)
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [*pictures, text]})
        if answer is not None:
            content = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": content})
    if getattr(processor, "chat_template", None):
        return str(processor.apply_chat_template(messages, add_generation_prompt=True))
    return _llava_prompt(processor, turns, n_images)


def _llava_prompt(processor: Any, turns: Sequence[tuple[str, str | None]], n_images: int) -> str:
    placeholder = str(getattr(processor, "image_token", None) or PLACEHOLDER)
    end = tokenizer_of(processor).eos_token or ""
    prompt = ""
    for index, (question, answer) in enumerate(turns):
        pictures = f"{placeholder}\n" * (n_images if index == 0 else 0)
        prompt += f"USER: {pictures}{question} ASSISTANT:"
        prompt += "" if answer is None else f" {answer}{end}"
    return prompt


def encode(processor: Any, prompt: str, images: Sequence[Image.Image]) -> Any:
    """A prompt and its pictures as the processor's tensors, with one beginning-of-text token."""
    begin = tokenizer_of(processor).bos_token
    # Some chat templates write the token themselves; the tokenizer would add a second one.
    special = {"add_special_tokens": False} if begin and prompt.startswith(begin) else {}
    pictures = {"images": list(images)} if images else {}
    return processor(text=prompt, **pictures, return_tensors="pt", **special)
