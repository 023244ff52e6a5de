"""`forward` and `generate` of a wrapped LLaVA: the usual contract, fewer tokens inside.

Knows: the calling conventions of transformers. Does not know: how images are encoded or merged
(`inputs.py`), nor how a model gets wrapped (`wrapper.py`).
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .inputs import (
    FEATURE_OPTIONS,
    SEQUENCE_INPUTS,
    CompactPrompt,
    Merging,
    drop_stale_placeholders,
    image_token_id,
    prepare,
)
from .prompt import compaction

# The length GenerationConfig() came with before transformers 5; it means "not set".
LEGACY_DEFAULT_LENGTH = 20


class WrappedLlava:
    """Mixin in front of a LLaVA's class."""

    # Methods whose signature callers read (Trainer's column names, generate's validation): the
    # swapped class shows the signature of the original ones.
    _pitome_mirrored = ("forward", "generate")

    _pitome: Merging

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward on the shortened prompt; logits and loss are of that length."""
        original = super().forward  # type: ignore[misc]
        call = _named_arguments(original, args, kwargs)
        if call.get("pixel_values") is None or self._pitome_schedule(call).is_identity:
            self._refuse_stale_inputs(call)
            return original(**call)
        keep = call.get("logits_to_keep")
        if isinstance(keep, Tensor) and keep.numel() > 1:
            raise ValueError(
                "logits_to_keep must be a number where images are merged: indices would point "
                "into the prompt as it was before"
            )
        prompt = prepare(self, self._pitome, call)
        call = _without_images(call, prompt)
        output = original(inputs_embeds=prompt.inputs_embeds, **_sequence(prompt), **call)
        if getattr(output, "image_hidden_states", 0) is None:
            output["image_hidden_states"] = torch.cat(prompt.visual.features)
        return output

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """The model's own generate; `sequences` begin with the caller's prompt as it was."""
        original = super().generate  # type: ignore[misc]
        if inputs is not None:
            kwargs["input_ids"] = inputs
        ids = kwargs.get("input_ids")
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if kwargs.get("pixel_values") is None:
            if _cached_length(kwargs.get("past_key_values")) and ids is not None:
                return self._continue_chat(original, ids, kwargs)
            return original(**kwargs)
        if self._pitome_schedule(kwargs).is_identity:
            return original(**kwargs)
        prompt = prepare(self, self._pitome, kwargs, left=_pad_side(kwargs))
        call = _without_images(kwargs, prompt)
        call |= {k: v for k, v in _sequence(prompt).items() if k == "attention_mask"}
        if call.get("attention_mask") is None:
            call["attention_mask"] = prompt.compaction.valid.long()
        call["inputs_embeds"] = prompt.inputs_embeds
        if ids is not None:
            call["input_ids"] = prompt.input_ids
            call |= self._shorter_limits(kwargs, prompt.compaction.removed)
        return _with_prompt(original(**call), ids, prompt.inputs_embeds.shape[1])

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Save the untouched checkpoint and `pitome_config.json` beside it."""
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            self._pitome.config.save_pretrained(save_directory)
        return result

    def extra_repr(self) -> str:
        """Say in `print(model)` what is on."""
        schedule = self._pitome.schedule(self)
        note = (
            f"pitome: {self._pitome.config.summary()}, {schedule.tokens_in} -> "
            f"{schedule.tokens_out} visual tokens per image"
        )
        return ", ".join(part for part in (super().extra_repr(), note) if part)  # type: ignore[misc]

    def _pitome_schedule(self, call: dict[str, Any]) -> Any:
        options = {name: call[name] for name in FEATURE_OPTIONS if call.get(name) is not None}
        return self._pitome.schedule(self, **options)

    def _refuse_stale_inputs(self, call: dict[str, Any]) -> None:
        """Old placeholders or an old mask beside a shortened cache would be silently wrong."""
        ids, cache, mask = (
            call.get(name) for name in ("input_ids", "past_key_values", "attention_mask")
        )
        # Other caches are only filled inside generate, which keeps all lengths consistent, and
        # asking a static cache for its length costs a device synchronisation per decoded token.
        cached = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
        if ids is None or not cached:
            return
        expected = cached + ids.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > expected:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens, but the cache holds {cached} "
                f"(images merged) and {ids.shape[1]} are new; build the mask for {expected} tokens"
            )
        # One token a step is the decoding loop; looking at it would cost a synchronisation too.
        if ids.shape[1] > 1 and bool((ids == image_token_id(self)).any()):
            raise ValueError(
                "input_ids hold image placeholders, but pixel_values are missing and the cache "
                "already holds merged images; pass only the new tokens, or use generate(), which "
                "shortens an old conversation itself"
            )

    def _continue_chat(self, original: Any, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """A later turn on a cache whose images were merged when they were encoded."""
        placeholders, drop = drop_stale_placeholders(self, self._pitome, ids)
        if not bool(drop.any()):
            return original(**kwargs)
        mask = kwargs.get("attention_mask")
        moves = compaction(drop, mask, left=_pad_side(kwargs))
        compact = moves.take(ids, 0)
        cached = _cached_length(kwargs["past_key_values"])
        if bool(moves.take(placeholders, False)[:, cached:].any()):
            raise ValueError(
                "the conversation holds an image that the cache does not; pass the pixel_values "
                "of all its images"
            )
        call = kwargs | {"input_ids": compact} | self._shorter_limits(kwargs, moves.removed)
        call["attention_mask"] = moves.valid.long() if mask is None else moves.take(mask, 0)
        call.pop("position_ids", None)
        return _with_prompt(original(**call), ids, compact.shape[1])

    def _shorter_limits(self, kwargs: dict[str, Any], removed: int) -> dict[str, int]:
        """max_length and min_length count the prompt, hence shrink with it."""
        sources = [kwargs.get("generation_config"), getattr(self, "generation_config", None)]

        def lookup(name: str) -> Any:
            given = [kwargs.get(name)] + [getattr(source, name, None) for source in sources]
            return next((value for value in given if value is not None), None)

        limits = {}
        for end in ("max", "min"):
            value = lookup(f"{end}_length")
            unset = not value or (
                value == LEGACY_DEFAULT_LENGTH and kwargs.get(f"{end}_length") is None
            )
            if not unset and lookup(f"{end}_new_tokens") is None:
                limits[f"{end}_length"] = value - removed
        return limits


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    """Looked up once per class: this runs for every decoded token."""
    return inspect.signature(function)


def _named_arguments(function: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, those of **kwargs included."""
    signature = _signature(function.__func__)
    named = dict(signature.bind(function.__self__, *args, **kwargs).arguments)
    del named[next(iter(signature.parameters))]  # self
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def _without_images(call: dict[str, Any], prompt: CompactPrompt) -> dict[str, Any]:
    """The other arguments; further per-token ones (token types) are shortened with the prompt."""
    consumed = {"pixel_values", "image_sizes", "cache_position", *FEATURE_OPTIONS, *SEQUENCE_INPUTS}
    shape = prompt.compaction.keep.shape
    return {
        name: prompt.compaction.take(value, 0)
        if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
        else value
        for name, value in call.items()
        if name not in consumed
    }


def _sequence(prompt: CompactPrompt) -> dict[str, Tensor | None]:
    return {
        "attention_mask": prompt.attention_mask,
        "labels": prompt.labels,
        "position_ids": prompt.position_ids,
    }


def _pad_side(kwargs: dict[str, Any]) -> bool | None:
    """generate() continues at the end of a row, so rows without a mask are padded in front."""
    return True if kwargs.get("attention_mask") is None else None


def _cached_length(cache: Any) -> int:
    """Tokens in a cache of any kind, 0 for none."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


def _with_prompt(output: Any, ids: Tensor | None, compact_length: int) -> Any:
    """Put the caller's own prompt in front of what was generated."""
    if ids is None:
        return output
    sequences = output if isinstance(output, Tensor) else output.sequences
    per_prompt = sequences.shape[0] // ids.shape[0]
    prompt = ids.repeat_interleave(per_prompt, 0).to(sequences.device)
    full = torch.cat([prompt, sequences[:, compact_length:]], 1)
    if isinstance(output, Tensor):
        return full
    output.sequences = full
    return output
