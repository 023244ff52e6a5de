"""Asking a LLaVA: prompts, tensors, generation, answers.

One way from messages to answers for the command line, the benchmarks, tuning, lmms-eval and
training. Whether the model is wrapped makes no difference here.

Messages are those of chat templates: `{"role": "user", "content": [{"type": "image"},
{"type": "text", "text": "What is this?"}]}`; images themselves are handed over separately, in
order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2
import numpy as np
from PIL import Image
from torch import Tensor

from ..common import check_text
from ..loading.images import ImageError
from ..loading.videos import Video

Message = Mapping[str, Any]

_PLACEHOLDER = "<image>"
# Checkpoints come with sampling options that greedy decoding warns of.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def image_token(processor: Any) -> str:
    """The text that stands for an image in a prompt, usually "<image>"."""
    return str(getattr(processor, "image_token", None) or _PLACEHOLDER)


def checked_question(question: str, processor: Any) -> str:
    """The question without outer spaces; ValueError if empty or with a placeholder."""
    question = check_text("the question", question).strip()
    if not question:
        raise ValueError("the question is empty")
    for kind, token in (("image", image_token(processor)), ("video", _video_token(processor))):
        if token and token in question:
            raise ValueError(
                f"the question must not contain {token!r}: {kind}s are put before the question"
            )
    return question


def _video_token(processor: Any) -> str | None:
    """The text that stands for a video in a prompt; None for models without videos."""
    token = getattr(processor, "video_token", None)
    return token if isinstance(token, str) else None


def user_message(text: str, images: int = 0, videos: int = 0) -> dict[str, Any]:
    """A user's turn: `images` images and `videos` videos, then the text."""
    shown = [*[{"type": "image"}] * images, *[{"type": "video"}] * videos]
    content = [*shown, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def assistant_message(text: str) -> dict[str, Any]:
    """A turn of the model."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def question_prompt(processor: Any, question: str, images: int = 1) -> str:
    """The whole prompt of one question after its images."""
    return prompt_text(processor, [user_message(question, images)])


def prompt_text(processor: Any, messages: Sequence[Message], *, ask: bool = True) -> str:
    """Messages as one text: the processor's chat template, or LLaVA-1.5's format without one.

    With `ask` it ends with the beginning of an answer. A ValueError says that a template fails, or
    that a text holds half of a character (a lone surrogate), which no tokenizer takes.
    """
    if getattr(processor, "chat_template", None):
        return check_text("the prompt", _from_template(processor, messages, ask))
    end = tokenizer_of(processor).eos_token or ""
    text = ""
    for message in messages:
        said = _flat_content(message["content"], processor)
        if message["role"] == "user":
            text += f"USER: {said} "
        elif message["role"] == "assistant":
            text += f"ASSISTANT: {said}{end}"
        else:
            text += f"{said} "
    return check_text("the prompt", f"{text}ASSISTANT:" if ask else text)


def _from_template(processor: Any, messages: Sequence[Message], ask: bool) -> str:
    """Messages in the processor's chat template.

    Some templates take content as text only: they fail with a list of parts, or write it out as
    Python shows it, brackets and all. They get such content as one text.
    """
    flat = [{**one, "content": _flat_content(one["content"], processor)} for one in messages]

    def written(form: Sequence[Message]) -> str:
        return str(
            processor.apply_chat_template(list(form), add_generation_prompt=ask, tokenize=False)
        )

    try:
        try:
            text = written(messages)
        except (jinja2.TemplateError, TypeError):
            return _complete(written(flat), flat)
        shown = [
            not isinstance(one["content"], str) and str(one["content"]) in text for one in messages
        ]
        if not any(shown):
            return text
        chosen = zip(messages, flat, shown, strict=True)
        return _complete(written([other if out else one for one, other, out in chosen]), flat)
    except (jinja2.TemplateError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"the processor's chat template cannot write this ({said})") from error


def _complete(text: str, messages: Sequence[Message]) -> str:
    """The text, if it holds what every message says."""
    for message in messages:
        if not all(line.strip() in text for line in message["content"].splitlines()):
            raise TypeError("it leaves out what was said")
    return text


def special_tokens(processor: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer has to add its own first token.

    Some chat templates write it themselves; the tokenizer would add a second one.
    """
    begin = tokenizer_of(processor).bos_token
    return not (begin and texts and all(text.startswith(begin) for text in texts))


def encoded(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Image.Image] = (),
    *,
    videos: Sequence[Video] = (),
    side: Literal["left", "right"] = "left",
    image_options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Prompts and the images of all of them, in order, as the processor's tensors.

    Args:
        processor: of the model.
        texts: one prompt per row.
        images: as many as there are image tokens in the prompts.
        videos: as many as there are video tokens in the prompts; the processor takes all of their
            frames.
        side: where shorter rows are padded; "left" to generate, because answers continue at the
            end of a row.
        image_options: what the processor is to prepare images with, in place of its own options.

    Returns:
        `input_ids` and `attention_mask` [B, T], and with images `pixel_values` and what else the
        processor says about them; on the CPU.

    Raises:
        ValueError: several prompts, but the tokenizer has no padding token.
    """
    if len(texts) > 1 and tokenizer_of(processor).pad_token is None:
        raise ValueError(
            "the tokenizer has no padding token, so prompts cannot be batched; set one "
            "(tokenizer.pad_token = tokenizer.eos_token), or use a batch size of 1"
        )
    special = {} if special_tokens(processor, texts) else {"add_special_tokens": False}
    padding = {"padding": True, "padding_side": side} if len(texts) > 1 else {}
    options: dict[str, Any] = {**padding, **special, "return_tensors": "pt"}
    if image_options:
        options["images_kwargs"] = dict(image_options)
    if videos:
        options |= {
            "videos": [[np.asarray(frame) for frame in video.frames] for video in videos],
            "video_metadata": [video.metadata() for video in videos],
            "do_sample_frames": False,
        }
    if not images:
        found = dict(processor(text=list(texts), **options))
    else:
        try:
            found = dict(processor(text=list(texts), images=list(images), **options))
        except ValueError:
            rows = _by_row(texts, images, image_token(processor))
            if rows is None:
                raise
            # Idefics and Gemma 3 want the images of every row in a list of their own.
            found = dict(processor(text=list(texts), images=rows, **options))
    if not _marks_images(processor):
        # LLaVA's language models have no token types, and generation refuses what it does not know.
        found.pop("token_type_ids", None)
    return found


def _by_row(
    texts: Sequence[str], images: Sequence[Image.Image], token: str
) -> list[list[Image.Image]] | None:
    """The images of every text; None for one text, or where their numbers differ."""
    counts = [text.count(token) for text in texts]
    if len(texts) < 2 or sum(counts) != len(images):
        return None
    left = iter(images)
    return [list(itertools.islice(left, count)) for count in counts]


def _marks_images(processor: Any) -> bool:
    """Whether token types come from the processor, which says with them where images are.

    Gemma 3 lets the tokens of an image see each other by them.
    """
    names = list(getattr(processor, "model_input_names", ()))
    own = list(getattr(tokenizer_of(processor), "model_input_names", ()))
    return names.count("token_type_ids") > own.count("token_type_ids")


def encoded_rows(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    names: Sequence[str],
    *,
    side: Literal["left", "right"] = "left",
    image_options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """`encoded`, with the images of every row and a name of it for messages.

    Raises:
        ImageError: the processor refuses a row, for instance an image too long and thin for it.
    """
    given: dict[str, Any] = {"side": side, "image_options": image_options}
    try:
        return encoded(processor, texts, [one for row in images for one in row], **given)
    except MemoryError:
        raise
    except Exception:
        for text, own, name in zip(texts, images, names, strict=True):
            try:
                encoded(processor, [text], own, **given)
            except Exception as error:
                said = " ".join(str(error).split())[:200]
                raise ImageError(
                    f"{name}: the processor cannot prepare it ({type(error).__name__}: {said})"
                ) from error
        raise


def on_model(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the model's device, floating point tensors in the model's dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


def generated(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """What `model.generate` returns for a batch, greedy unless `options` say otherwise.

    Args:
        model: a LLaVA, wrapped or not.
        batch: of `encoded`; moved to the model.
        **options: of `generate`, such as `max_new_tokens`; with `do_sample=True` or `num_beams`
            greedy decoding's settings give way.
    """
    sampled = options.get("do_sample") or options.get("num_beams", 1) > 1
    return model.generate(**on_model(model, batch), **({} if sampled else _GREEDY) | options)


def decoded(processor: Any, batch: Mapping[str, Tensor], sequences: Tensor) -> list[str]:
    """The answers in generated sequences [B, T + new] without prompt and special tokens."""
    new = sequences[:, batch["input_ids"].shape[1] :]
    texts = tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)
    return [str(text).strip() for text in texts]


def answers(
    model: Any, processor: Any, batch: Mapping[str, Tensor], *, max_new_tokens: int
) -> list[str]:
    """The model's greedy answers to a batch of `encoded` prompts, one text per row."""
    sequences = generated(model, batch, max_new_tokens=max_new_tokens)
    return decoded(processor, batch, sequences)


def _flat_content(content: Any, processor: Any) -> str:
    if isinstance(content, str):
        return content
    tokens = {"image": image_token(processor), "video": _video_token(processor)}
    return "".join(
        part["text"] if part["type"] == "text" else f"{tokens[part['type']]}\n" for part in content
    )
