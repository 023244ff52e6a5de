"""Training conversations: LLaVA's JSON records and chat messages in one checked form.

Everything that can be wrong with a record is reported here. Images are only counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common import check_text, shown
from ..loading.records import DataError

IMAGE_MARK = "<image>"
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": SYSTEM,
}


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: "user", "assistant" or "system".
        text: with `<image>` in the place of each image.
    """

    role: str
    text: str

    def chat(self) -> dict[str, Any]:
        """The message as chat templates take it: a list of text and image parts."""
        if IMAGE_MARK not in self.text:
            return {"role": self.role, "content": [{"type": "text", "text": self.text}]}
        content: list[dict[str, Any]] = []
        for index, part in enumerate(self.text.split(IMAGE_MARK)):
            if index:
                content.append({"type": "image"})
            if part.strip():
                content.append({"type": "text", "text": part.strip()})
        return {"role": self.role, "content": content}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about images.

    Attributes:
        where: its place for error messages, for instance "train.jsonl line 12".
        messages: at least one question and one answer.
        images: number of images, equal to the number of `<image>` in the messages.
    """

    where: str
    messages: tuple[Message, ...]
    images: int


def parse(record: Any, where: str, *, text_only: bool = False) -> tuple[Conversation, list[Any]]:
    """A checked conversation, and its images as the record gives them.

    Args:
        record: LLaVA's form (`image` and `conversations` of `from` and `value`) or messages
            (`images` and `messages` of `role` and `content`, a text or a list of parts). Parts
            may hold the images instead: `{"type": "image", "path": "a.png"}`.
        where: for error messages.
        text_only: accept records without an image.

    Returns:
        The conversation; and its images: paths, PIL images, or what a dataset stores.

    Raises:
        DataError: no image, another number of images than `<image>`, no answer, turns in
            another order than question and answer, or a wrong type.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: must be a JSON object, got {type(record).__name__}")
    images = _images(record, where)
    messages, inside = _messages(record, where, len(images))
    if inside and images:
        raise DataError(f"{where}: has images of its own and in its messages; give one of them")
    images = images or inside
    found = sum(message.text.count(IMAGE_MARK) for message in messages)
    if not images and not found and not text_only:
        raise DataError(
            f"{where}: has no image; leave such records out, or allow them with text_only=True "
            "(--text-only)"
        )
    if found != len(images):
        raise DataError(
            f"{where}: {found} {IMAGE_MARK} in the text, but {len(images)} image"
            f"{'' if len(images) == 1 else 's'}"
        )
    _check_turns(messages, where)
    return Conversation(where, tuple(messages), len(images)), images


def _images(record: Mapping[str, Any], where: str) -> list[Any]:
    given = [name for name in ("image", "images") if record.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"{where}: has both image and images; give one of them")
    value = record[given[0]] if given else []
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    for image in images:
        if image is None or (isinstance(image, str) and not image):
            raise DataError(f"{where}: {given[0]} is empty")
    return images


def _messages(
    record: Mapping[str, Any], where: str, images: int
) -> tuple[list[Message], list[Any]]:
    """The turns, and the images that their parts hold."""
    forms = [name for name in ("conversations", "messages") if record.get(name) is not None]
    if len(forms) > 1:
        raise DataError(f"{where}: has both conversations and messages; give one of them")
    if not forms:
        raise DataError(
            f"{where}: has neither conversations nor messages; its keys: {shown(list(record))}"
        )
    (form,) = forms
    turns = record[form]
    if isinstance(turns, Mapping) and all(isinstance(value, list) for value in turns.values()):
        # Some Hugging Face datasets store a list of turns as lists of their fields.
        turns = [
            dict(zip(turns, turn, strict=False)) for turn in zip(*turns.values(), strict=False)
        ]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DataError(f"{where}: {form} must be a list of turns, got {shown(turns)}")
    inside: list[Any] = []
    messages = [_message(turn, f"{where}: {form}[{i}]", inside) for i, turn in enumerate(turns)]
    marked = any(IMAGE_MARK in message.text for message in messages)
    if form == "messages" and images and not marked:
        # Plain text and a list of images: the images belong before the first question.
        first = next((i for i, m in enumerate(messages) if m.role == USER), None)
        if first is not None:
            text = IMAGE_MARK * images + messages[first].text
            messages[first] = Message(USER, text)
    return messages, inside


def _message(turn: Any, where: str, inside: list[Any]) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} must be an object, got {shown(turn)}")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(
            f"{where}: the speaker must be one of {', '.join(_ROLES)}, got {shown(role)}"
        )
    if isinstance(text, (list, tuple)):
        inside += [image for image in map(_image_in, text) if image is not None]
        text = "".join(_part(part, where) for part in text)
    if not isinstance(text, str):
        raise DataError(f"{where}: the text must be a string, got {shown(text)}")
    if not text.strip():
        raise DataError(f"{where}: the text is empty")
    try:
        check_text("the text", text)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if IMAGE_MARK in text and _ROLES[role] != USER:
        raise DataError(f"{where}: only the user can show images, but the text has {IMAGE_MARK}")
    return Message(_ROLES[role], text)


def _image_in(part: Any) -> Any:
    """The image that an image part holds itself."""
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return None
    return next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE_MARK
    if kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_MARK in part["text"]:
            raise DataError(f"{where}: {IMAGE_MARK} is in a text part, but images are parts")
        return str(part["text"])
    raise DataError(f"{where}: a part must be a text or an image, got {shown(part)}")


def _check_turns(messages: list[Message], where: str) -> None:
    turns = [m.role for m in messages]
    if SYSTEM in turns[1:]:
        raise DataError(f"{where}: a system turn may only come first")
    turns = turns[turns[0] == SYSTEM :]
    wanted = [(USER, ASSISTANT)[i % 2] for i in range(len(turns))]
    if turns != wanted or len(turns) < 2:
        raise DataError(
            f"{where}: turns must alternate between question and answer and start with a question, "
            f"got {', '.join(turns) or 'none'}"
        )
    if turns[-1] != ASSISTANT:
        raise DataError(f"{where}: the last turn must be an answer")
