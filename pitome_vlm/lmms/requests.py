"""From lmms-eval's requests to messages, images, and the document they belong to.

Handles the tuples that lmms-eval packs a request into and what tasks put into messages. Leaves
chat templates to `pitome_vlm.measure.asking` and batches to `engine.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..loading.images import load_image


class RequestError(RuntimeError):
    """A request that cannot be answered; the message names its task and document."""


@dataclass(frozen=True)
class Round:
    """What a task says about a round: turns (None at the end), and what it is told in the next."""

    messages: list[dict[str, Any]] | None
    info: Any = None


@dataclass(frozen=True)
class Call:
    """One request of lmms-eval, chat or simple.

    Attributes:
        task: name of the task.
        split: split of its data.
        doc_id: number of the document in the split.
        options: the task's generation options.
        padding: whether the request only keeps lmms-eval's processes in step.
        first: document to the messages of the first round.
        later: (document, round, answers so far, info) to the next round, None without rounds.
        target: the continuation to be scored, or document to continuation; None to generate.
    """

    task: str
    split: str
    doc_id: int
    options: dict[str, Any]
    padding: bool
    first: Callable[[Any], Any]
    later: Callable[[Any, int, list[str], Any], Round] | None = None
    target: Any = None

    def __str__(self) -> str:
        return f"task {self.task!r}, document {self.doc_id}"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the processor takes it.

    Attributes:
        call: the request it belongs to.
        text: the whole prompt in the model's chat format.
        images: its images in order.
        continuation: the text to be scored after the prompt, None to generate.
    """

    call: Call
    text: str
    images: list[Image.Image]
    continuation: str | None = None


def generation_call(request: Any, *, simple: bool) -> Call:
    """A `generate_until` request."""
    if simple:
        context, options, to_visual, doc_id, task, split = request.args
        first = _simple_turn(context, to_visual)
    else:
        _, first, options, doc_id, task, split = request.args
    return Call(task, split, doc_id, dict(options or {}), _is_padding(request), first)


def dialogue_call(request: Any, *, simple: bool) -> Call:
    """A `generate_until_multi_round` request."""
    if simple:
        context, options, to_visual, to_text, doc_id, task, split = request.args
        first, later = _simple_turn(context, to_visual), _simple_rounds(to_text)
    else:
        _, first, options, doc_id, task, split = request.args
        later = _chat_rounds(first)
    return Call(task, split, doc_id, dict(options or {}), _is_padding(request), first, later)


def scoring_call(request: Any) -> Call:
    """A `loglikelihood` request; lmms-eval makes them in the simple form only."""
    if len(request.args) != 6:
        raise RequestError(
            f"task {request.task_name!r}, document {request.doc_id}: a continuation without an "
            "image and a question cannot be scored; remove acc_mutual_info from metric_list"
        )
    context, target, to_visual, doc_id, task, split = request.args
    first = _simple_turn(context, to_visual)
    return Call(task, split, doc_id, {}, _is_padding(request), first, target=target)


def _is_padding(request: Any) -> bool:
    return bool((request.metadata or {}).get("__padding_only__", False))


def _user_turn(visuals: Sequence[Any] | None, text: str) -> list[dict[str, Any]]:
    images = [{"type": _kind(visual), "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def _kind(visual: Any) -> str:
    if isinstance(visual, Image.Image):
        return "image"
    if isinstance(visual, dict):
        stored = "image" if visual.get("bytes") is not None else _kind(visual.get("path"))
        return str(visual.get("type", stored))
    suffix = os.path.splitext(str(visual))[1].lower()
    return "image" if suffix in Image.registered_extensions() else "video"


def _simple_turn(context: str, to_visual: Any) -> Callable[[Any], list[dict[str, Any]]]:
    return lambda doc: _user_turn(to_visual(doc) if callable(to_visual) else to_visual, context)


def _simple_rounds(to_text: Any) -> Callable[[Any, int, list[str], Any], Round]:
    def later(doc: Any, number: int, answers: list[str], info: Any) -> Round:
        said = to_text(doc, previous_output=answers, round_idx=number, previous_round_info=info)
        if not (isinstance(said, tuple) and len(said) == 5):
            return Round(None)
        visuals, text, terminal, _, info = said
        return Round(None if terminal else _user_turn(visuals, text), info)

    return later


def _chat_rounds(to_messages: Any) -> Callable[[Any, int, list[str], Any], Round]:
    def later(doc: Any, number: int, answers: list[str], info: Any) -> Round:
        said = to_messages(doc, round_idx=number, previous_output=answers, previous_round_info=info)
        # A task without rounds ignores the number and hands over its messages again.
        if not (isinstance(said, tuple) and len(said) == 4):
            return Round(None)
        messages, terminal, _, info = said
        return Round(None if terminal else messages, info)

    return later


def plain_messages(
    raw: Sequence[dict[str, Any]], placeholder: str, system_prompt: str | None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages for a chat template, without the images, and the images.

    A task may mark in its text where its images belong; they go there, else they stay where the
    message has them.

    Args:
        raw: what the task handed over.
        placeholder: the processor's image token.
        system_prompt: text of a system turn at the start, instead of the task's own.

    Raises:
        ValueError: something that is neither text nor an image, or markers and images of
            different numbers.
    """
    turns = [(message["role"], _parts(message["content"])) for message in raw]
    images = [url for _, parts in turns for kind, url in parts if kind == "image"]
    marked = sum(
        text.count(placeholder) for _, parts in turns for kind, text in parts if kind == "text"
    )
    if marked and marked != len(images):
        raise ValueError(
            f"the text marks {marked} places for images with {placeholder}, but there are "
            f"{len(images)} images"
        )
    messages = [
        {"role": role, "content": _content(parts, placeholder, marked=marked > 0)}
        for role, parts in turns
    ]
    if system_prompt:
        messages = [message for message in messages if message["role"] != "system"]
        turn = {"role": "system", "content": [{"type": "text", "text": system_prompt}]}
        messages.insert(0, turn)
    return messages, images


def _parts(content: Any) -> list[tuple[str, Any]]:
    if isinstance(content, str):
        return [("text", content)]
    found: list[tuple[str, Any]] = []
    for part in content:
        kind = part["type"]
        if kind == "text":
            found.append((kind, str(part["text"])))
        elif kind == "image":
            found.append((kind, part.get("url", part.get("image"))))
        else:
            raise ValueError(f"LLaVA answers questions about images; this one holds {kind}")
    return found


def _content(
    parts: list[tuple[str, Any]], placeholder: str, *, marked: bool
) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for kind, value in parts:
        if kind == "text":
            content += _marked_text(value, placeholder)
        elif not marked:
            content.append({"type": "image"})
    return content


def _marked_text(text: str, placeholder: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(placeholder)):
        if number:
            content.append({"type": "image"})
        if piece.strip() or placeholder not in text:
            content.append({"type": "text", "text": piece})
    return content


def opened(given: Any, max_pixels: int | None) -> Image.Image:
    """An RGB image from what a task hands over, scaled down where it is too large.

    Raises:
        ImageError: a file that is no image.
        TypeError: in no form of an image.
    """
    image = load_image(given)
    if max_pixels is not None and image.width * image.height > max_pixels:
        scale = math.sqrt(max_pixels / (image.width * image.height))
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image
