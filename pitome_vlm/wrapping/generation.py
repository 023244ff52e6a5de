"""The bookkeeping around generate: lengths, criteria and the caller's own prompt.

Some arguments of generate count or look at prompt tokens. Nothing here knows images or models; it
is told how long a prompt was and how long it became.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..releases import LEGACY_DEFAULT_LENGTH

# The argument of generate that carries a `CallerPrompt` to where it is needed.
CALLER = "caller_prompt"

_generate_logger = logging.get_logger("transformers.generation.utils")


@dataclass(frozen=True, eq=False)
class CallerPrompt:
    """The prompt that a caller of `generate` knows, of which the model sees a shortened one.

    Attributes:
        ids: [B, T] int64.
        mask: [B, T], or over a cache and the new tokens; None for no padding.
        length: columns of the shortened prompt.
        inputs: the caller's own arguments of `generate`.
        vision: names of those that only a model which sees takes.
    """

    ids: Tensor
    mask: Tensor | None
    length: int
    inputs: Mapping[str, Any]
    vision: frozenset[str]

    @property
    def removed(self) -> int:
        """Columns by which it got shorter."""
        return self.ids.shape[1] - self.length

    def restored(self, sequences: Tensor) -> Tensor:
        """Sequences that begin with the shortened prompt, beginning with the caller's instead.

        Args:
            sequences: [B x copies, length + new].
        """
        front = self.ids.to(sequences.device)
        copies = len(sequences) // len(front)
        if copies > 1:
            front = front.repeat_interleave(copies, 0)
        return torch.cat([front, sequences[:, self.length :]], 1)

    def limits(self, config: GenerationConfig) -> GenerationConfig:
        """A copy of the options of generate, with lengths in the caller's columns."""
        found = copy.copy(config)
        for name in ("max_length", "min_length"):
            if getattr(config, name, None):
                setattr(found, name, getattr(config, name) + self.removed)
        return found

    def copied_mask(self, config: GenerationConfig) -> Tensor | None:
        """[B x copies, T], the mask of the prompt alone, in as many rows as generate makes."""
        if self.mask is None:
            return None
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        return self.mask[:, -self.ids.shape[1] :].repeat_interleave(copies, 0)


class FullPromptCriterion(StoppingCriteria):
    """A stopping criterion that sees the caller's prompt, not the shortened one."""

    def __init__(self, criterion: Any, caller: CallerPrompt) -> None:
        self.criterion, self.caller = criterion, caller

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        """Ask the criterion about [B, S + new] ids."""
        return self.criterion(self.caller.restored(input_ids), scores, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # generate looks for `eos_token_id`.
        if name == "criterion":
            raise AttributeError(name)
        return getattr(self.criterion, name)


class FullPromptProcessor(LogitsProcessor):
    """All processors of a call, which see the caller's prompt, not the shortened one."""

    def __init__(self, processors: LogitsProcessorList, caller: CallerPrompt) -> None:
        self.processors, self.caller = processors, caller

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process [B, V] scores for [B, S + new] ids."""
        result: Tensor = self.processors(self.caller.restored(input_ids), scores)
        return result


class FullPromptCriteria(StoppingCriteriaList):
    """A caller's stopping criteria on their way through `generate`, with its prompt."""

    caller: CallerPrompt


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
    lookup = options_of(call, getattr(model, "generation_config", None))
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


def with_full_prompt(kwargs: dict[str, Any], caller: CallerPrompt) -> dict[str, Any]:
    """What of a caller's arguments looks at the prompt, so that it sees the caller's.

    Processors and constraints are seen to where generate makes them (`hooks.py`).
    """
    criteria = FullPromptCriteria(kwargs.get("stopping_criteria") or ())
    criteria.caller = caller
    found: dict[str, Any] = {"stopping_criteria": criteria, CALLER: caller}
    if kwargs.get("streamer") is not None:
        found["streamer"] = FullPromptStreamer(kwargs["streamer"], caller.ids)
    return found


def caller_criteria(criteria: StoppingCriteriaList, caller: CallerPrompt) -> StoppingCriteriaList:
    """The criteria of a call in the caller's columns, asked about shortened sequences."""

    def seeing(one: Any) -> Any:
        if type(one) is MaxLengthCriteria:
            return MaxLengthCriteria(one.max_length - caller.removed, one.max_position_embeddings)
        # These look at the last token or at none.
        plain = type(one) in (EosTokenCriteria, MaxTimeCriteria, ConfidenceCriteria)
        return one if plain else FullPromptCriterion(one, caller)

    return StoppingCriteriaList(seeing(one) for one in criteria)


def options_of(kwargs: Mapping[str, Any], default: Any) -> Callable[[str], Any]:
    """Looks an option of generate up: in the call, its generation config, the model's own."""
    configs = (kwargs.get("generation_config"), default)

    def lookup(name: str) -> Any:
        given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    return lookup


def with_prompt(output: Any, caller: CallerPrompt) -> Any:
    """The result of generate that begins with the caller's own prompt."""
    if isinstance(output, Tensor):
        return caller.restored(output)
    output.sequences = caller.restored(output.sequences)
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
    lookup = options_of(kwargs, default)
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
