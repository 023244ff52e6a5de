"""From conversations to tensors: chat template, images, and labels on answers only.

Answers are found in the tokens by the tokenizer's character offsets. Placeholders stay as many as
the processor writes; shortening comes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loading.images import ImageError
from ..loading.records import DataError
from ..measure.asking import encoded_rows, image_token, prompt_text, special_tokens
from ..wrapping.columns import IGNORED_LABEL
from .alignment import answers_among_marks
from .conversations import ASSISTANT, IMAGE_MARK, Conversation
from .examples import Example


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    Attributes:
        text: with one image token per image.
        answers: [start, end) of every answer in the text, including its end token.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class Collator:
    """A batch for the model from examples: `input_ids`, `attention_mask`, `pixel_values`, `labels`.

    Labels are the tokens of answers, including the token that ends them, and -100 elsewhere. Rows
    are padded on the right. A batch without images has no `pixel_values`.
    """

    def __init__(self, processor: Any, *, max_length: int | None = None) -> None:
        """Make a collator.

        Args:
            processor: of the model; its tokenizer must be a fast one.
            max_length: longest row in tokens before merging, so with every placeholder of an
                image; longer rows are cut off at the end, None cuts nothing.

        Raises:
            TypeError: not a processor of text and images.
            ValueError: the tokenizer gives no character offsets.
        """
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise TypeError(
                "processor must be the model's, with a tokenizer and an image processor, got "
                f"{type(processor).__name__}"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which labels need; load "
                "the processor with use_fast=True"
            )
        self.processor, self.max_length = processor, max_length
        # Not `tokenizer`: a Trainer would save an attribute of that name, without the processor.
        self._tokenizer = tokenizer
        self._image_token = image_token(processor)
        self.image_id = int(tokenizer.convert_tokens_to_ids(self._image_token))
        # Gemma 3 writes one token for an image into a text and others into its place.
        self._visual = torch.tensor(
            [self.image_id, int(getattr(tokenizer, "image_token_id", None) or self.image_id)]
        )

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """[B, T] ids, mask and labels, and the pixels of the images of all rows, in order.

        Raises:
            DataError: a conversation that cannot be labelled, or would be cut inside an image.
        """
        return self.cut(self.whole(examples), examples)

    def whole(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The batch before rows are cut to `max_length`."""
        rendered = [self.render(example.conversation) for example in examples]
        images = [example.images for example in examples]
        names = [example.conversation.where for example in examples]
        texts = [one.text for one in rendered]
        special = special_tokens(self.processor, texts)
        try:
            batch = encoded_rows(self.processor, texts, images, names, side="right")
        except ImageError as error:
            raise DataError(str(error)) from error
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batch["labels"] = torch.stack(
            [
                self._labels(row, attended, one, special, example.conversation.where)
                for row, attended, one, example in zip(ids, mask, rendered, examples, strict=True)
            ]
        )
        return batch

    def check(self, conversation: Conversation) -> None:
        """Refuse texts with tokens that would be read as images, or as the end of an answer.

        Raises:
            DataError: an answer holds the end token, so that the rest of it would not be learnt;
                or a text holds the processor's token of an image or a video.
        """
        end = self._tokenizer.eos_token
        visual = {self._image_token, str(getattr(self.processor, "video_token", "") or IMAGE_MARK)}
        for number, message in enumerate(conversation.messages):
            where = f"{conversation.where}: turn {number}"
            text = message.text.replace(IMAGE_MARK, "")
            if message.role == ASSISTANT and end and end in text:
                raise DataError(
                    f"{where}: the answer holds the end token {end!r}, and what follows it would "
                    "not be learnt; remove it, one is added at the end"
                )
            for token in visual:
                if token in text:
                    raise DataError(
                        f"{where}: the text holds {token!r}, which stands for what is not there; "
                        f"remove it, {IMAGE_MARK} marks the place of an image"
                    )

    def render(self, conversation: Conversation) -> Rendered:
        """The text of a conversation, and the places of its answers in it.

        The processor's chat template writes the text, or LLaVA-1.5's format if there is none. An
        answer ends with the end token; it is added if a template leaves it out, because a model
        that never sees it never stops.

        Raises:
            DataError: as `check`, or the template writes earlier turns differently once later ones
                follow.
        """
        self.check(conversation)
        messages, end = conversation.messages, self._tokenizer.eos_token or ""
        whole, text, answers, done = self._template(conversation, None, False), "", [], 0
        for index, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            asked = self._template(conversation, index, True)
            told = self._template(conversation, index + 1, False)
            if not (whole.startswith(told) and told.startswith(asked)):
                raise DataError(
                    f"{conversation.where}: the processor's chat template writes a turn "
                    "differently once others follow, so answers cannot be told from questions"
                )
            answer = told[len(asked) :]
            body = answer.split(end)[0] + end if end and end in answer else answer.rstrip() + end
            text += whole[done : len(asked)]
            answers.append((len(text), len(text) + len(body)))
            rest = (
                answer[len(body) :] if answer.startswith(body) else answer[len(body) - len(end) :]
            )
            text, done = text + body + rest, len(told)
        return Rendered(text + whole[done:], tuple(answers))

    def _template(self, conversation: Conversation, turns: int | None, ask: bool) -> str:
        messages = [message.chat() for message in conversation.messages[:turns]]
        try:
            return prompt_text(self.processor, messages, ask=ask)
        except ValueError as error:
            raise DataError(f"{conversation.where}: {error}") from error

    def _labels(
        self, ids: Tensor, mask: Tensor, rendered: Rendered, special: bool, where: str
    ) -> Tensor:
        """[T] labels of one padded row.

        The text is tokenised once more without images: there, characters and tokens correspond.
        Both have the same tokens apart from placeholders and what some families write around them.
        """
        plain = self._tokenizer(
            rendered.text, add_special_tokens=special, return_offsets_mapping=True
        )
        tokens = [
            (token, any(first < end and last > start for start, end in rendered.answers))
            for token, (first, last) in zip(
                plain["input_ids"], plain["offset_mapping"], strict=True
            )
        ]
        words = [one for one in tokens if one[0] != self.image_id]
        text = (ids != self.image_id) & (mask != 0)
        wanted: Tensor | None
        if ids[text].tolist() == [token for token, _ in words]:
            wanted = torch.zeros_like(text)
            wanted[text] = torch.tensor([answer for _, answer in words], dtype=torch.bool)
        else:
            wanted = answers_among_marks(ids, mask, tokens, self._visual, self.image_id)
        if wanted is None:
            raise DataError(
                f"{where}: the processor tokenises the text differently with images than "
                "without, so answers cannot be found in it"
            )
        return ids.masked_fill(~wanted, IGNORED_LABEL)

    def cut(self, batch: dict[str, Tensor], examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch of `whole` with rows of at most `max_length` tokens.

        Raises:
            DataError: an image would be cut.
        """
        width = batch["input_ids"].shape[1]
        if self.max_length is None or width <= self.max_length:
            return batch
        beyond = batch["input_ids"][:, self.max_length :]
        beyond = torch.isin(beyond, self._visual)
        if bool(beyond.any()):
            row = int(beyond.any(1).nonzero()[0])
            raise DataError(
                f"{examples[row].conversation.where}: max_length={self.max_length} would cut an "
                "image in two; raise it, or leave the record out"
            )
        # Not whatever has two dimensions: the patches of some towers are [N, D].
        shape = batch["input_ids"].shape
        return {
            name: value[:, : self.max_length] if value.shape == shape else value
            for name, value in batch.items()
        }
