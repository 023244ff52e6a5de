"""The bookkeeping around generate: lengths, criteria and the caller's own prompt.

Some arguments of generate count or look at prompt tokens. Nothing here knows images or models; it
is told how long a prompt was and how long it became.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..releases import LEGACY_DEFAULT_LENGTH, SAMPLES_HAVE_NUMBERS

_generate_logger = logging.get_logger("transformers.generation.utils")


def _restored(sequences: Tensor, prompt: Tensor, compact_length: int) -> Tensor:
    """Sequences that begin with the shortened prompt, beginning with the caller's instead."""
    copies = sequences.shape[0] // prompt.shape[0]
    front = prompt.repeat_interleave(copies, 0).to(sequences.device)
    return torch.cat([front, sequences[:, compact_length:]], 1)


class FullPromptCriterion(StoppingCriteria):
    """A caller's stopping criterion that sees its own prompt, not the shortened one."""

    def __init__(self, criterion: Any, prompt: Tensor, compact_length: int) -> None:
        self.criterion, self.prompt, self.compact_length = criterion, prompt, compact_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        """Ask the criterion about [B, T + new] ids."""
        return self.criterion(
            _restored(input_ids, self.prompt, self.compact_length), scores, **kwargs
        )


class FullPromptProcessor(LogitsProcessor):
    """A caller's logits processor that sees its own prompt, not the shortened one."""

    def __init__(self, processor: Any, prompt: Tensor, compact_length: int) -> None:
        self.processor, self.prompt, self.compact_length = processor, prompt, compact_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process [B, V] scores for [B, T + new] ids."""
        full = _restored(input_ids, self.prompt, self.compact_length)
        result: Tensor = self.processor(full, scores)
        return result


class FullPromptStreamer(BaseStreamer):
    """A caller's streamer that gets its own prompt first, not the shortened one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer, self.prompt = streamer, prompt
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Hand on what was generated; the first value is the prompt."""
        self.streamer.put(value if self.begun else self.prompt.cpu())
        self.begun = True

    def end(self) -> None:
        """Hand on the end."""
        self.streamer.end()


def inferred_mask(model: Any, call: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """The mask that `generate` infers from padding where the caller gave none.

    Args:
        model: with a generation config of its own.
        call: arguments of generate.
        ids: [B, T].

    Returns:
        [B, T] int64, None where all tokens count: no padding, no pad token, or one that ends
        answers as well.
    """
    lookup = _options_of(call, getattr(model, "generation_config", None))
    pad, ends = lookup("pad_token_id"), lookup("eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    if pad is None or int(pad) in ends or not bool((ids == pad).any()):
        return None
    return ids.ne(int(pad)).long()


def warn_of_right_padding(call: Mapping[str, Any]) -> None:
    """The warning of `generate`, which does not look at prompts that are embedded already."""
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) > 1 and (mask[:, -1] == 0).any():
        _generate_logger.warning(
            "A decoder-only architecture is being used, but right-padding was detected! For "
            "correct generation results, please set `padding_side='left'` when initializing the "
            "tokenizer."
        )


def with_full_prompt(
    kwargs: dict[str, Any], default: Any, prompt: Tensor | None, compact_length: int
) -> dict[str, Any]:
    """What of a caller's arguments looks at the prompt, wrapped so that it sees the caller's.

    Criteria, processors, constraints and the streamer; nothing where none were given.

    Args:
        kwargs: arguments of generate.
        default: the model's own generation config.
        prompt: [B, T] the caller's prompt.
        compact_length: tokens of the shortened one.
    """
    found: dict[str, Any] = {}
    if prompt is None:
        return found
    for name, wrapper in (
        ("stopping_criteria", FullPromptCriterion),
        ("logits_processor", FullPromptProcessor),
    ):
        given = kwargs.get(name)
        if given is not None and len(given):
            found[name] = type(given)(wrapper(one, prompt, compact_length) for one in given)
    if kwargs.get("streamer") is not None:
        found["streamer"] = FullPromptStreamer(kwargs["streamer"], prompt)
    allowed = kwargs.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        lookup = _options_of(kwargs, default)
        beams, copies = int(lookup("num_beams") or 1), int(lookup("num_return_sequences") or 1)

        def full(row: int, ids: Tensor) -> Any:
            of = row * beams // max(beams, copies) if SAMPLES_HAVE_NUMBERS else row
            own = prompt[of].to(ids.device)
            return allowed(row, torch.cat([own, ids[compact_length:]]))

        found["prefix_allowed_tokens_fn"] = full
    return found


def _options_of(kwargs: Mapping[str, Any], default: Any) -> Callable[[str], Any]:
    """Looks an option of generate up: in the call, its generation config, the model's own."""
    configs = (kwargs.get("generation_config"), default)

    def lookup(name: str) -> Any:
        given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    return lookup


def with_prompt(output: Any, prompt: Tensor | None, compact_length: int) -> Any:
    """The result of generate that begins with the caller's own prompt."""
    if prompt is None:
        return output
    if isinstance(output, Tensor):
        return _restored(output, prompt, compact_length)
    output.sequences = _restored(output.sequences, prompt, compact_length)
    return output


def shorter_limits(
    kwargs: dict[str, Any], default: GenerationConfig | None, *, width: int, removed: int
) -> dict[str, int]:
    """max_length and min_length count the prompt, hence shrink with it.

    Args:
        kwargs: arguments of generate.
        default: the model's own generation config.
        width: tokens of the caller's prompt.
        removed: tokens by which it got shorter.

    Raises:
        ValueError: the prompt alone is longer than max_length, in the caller's numbers.
    """
    lookup = _options_of(kwargs, default)
    limits = {}
    for end in ("max", "min"):
        value, explicit = lookup(f"{end}_length"), kwargs.get(f"{end}_length") is not None
        unset = not value or (value == LEGACY_DEFAULT_LENGTH and not explicit)
        if unset or lookup(f"{end}_new_tokens") is not None:
            continue
        if end == "max" and value <= width:
            raise ValueError(
                f"max_length is {value}, but the prompt alone has {width} tokens; raise it, or "
                "use max_new_tokens"
            )
        limits[f"{end}_length"] = max(0, value - removed)
    return limits
