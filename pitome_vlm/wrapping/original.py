"""`forward` and `generate` of a wrapped model of the original llava package.

The package's calling conventions: `images`, one placeholder per image, a prompt that
`prepare_inputs_labels_for_multimodal` turns into embeddings. Where a word or a patch goes is left
to `original_layout.py` and `original_inputs.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..adapters.original_code import PREPARE
from ..adapters.swap import BASE
from ..releases import CACHE_NAME, TRANSFORMERS, cache_of, continues_from_embeds
from .arguments import by_name, named_arguments, parameters_of
from .forward import PREPARED, WrappedLlava
from .generation import shorter_limits
from .image_cache import IMAGE_CACHE
from .kv_cache import (
    CachedImages,
    cached_length,
    calibrated,
    first_position,
    mark_cache,
    with_prompt_images,
)
from .merging import CallPlan
from .original_inputs import prepare_original
from .positions import Calibration
from .prompt import CompactPrompt
from .refusals import check_cache, refuse_unsupported
from .wrapped_model import handed_on

logger = logging.get_logger(__name__)

# What becomes embeddings, and what does when they are there already.
CONSUMED = (
    *("input_ids", "images", "image_sizes", "attention_mask", "labels", "position_ids"),
    IMAGE_CACHE,
)
UNCALIBRATED = Calibration(size_bias=False, positions="compact")


@dataclass(frozen=True)
class PreparedPrompt:
    """Stands in `images` of the package's own `generate` for a prompt that is embedded already."""

    prompt: CompactPrompt


class WrappedOriginalLlava(WrappedLlava):
    """Mixin that `wrap` puts before the class of a model of the original llava package."""

    _pitome_mirrored = (*WrappedLlava._pitome_mirrored, PREPARE)

    def forward(self, *args: Any, token_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own forward on the shortened prompt; logits and loss are of that length.

        Args:
            *args: as of the model's own method.
            token_sizes: [B, S] float32 patches that every column stands for, see `compact_inputs`.
            **kwargs: as of the model's own method.
        """
        if not hasattr(type(self), BASE):
            return handed_on(self, "forward", args, kwargs)
        original = super(WrappedLlava, self).forward  # type: ignore[misc]
        call = named_arguments(original, args, kwargs)
        if call.pop(PREPARED, False):
            return original(**_as_named_by(original, call))
        image_cache = call.pop(IMAGE_CACHE, None)
        plan, cache = self._pitome.plan(self, call), call.get(CACHE_NAME)
        if not _sees_images(plan, call):
            call = self._pitome_without_pixels(call, token_sizes)
            with plan.unmerged():
                return original(**_as_named_by(original, call))
        check_cache(plan, cache, None)
        start = first_position(cache, call.get("attention_mask"), call["input_ids"].device)
        past, call = _without_past(call)
        prompt = prepare_original(plan, call, image_cache=image_cache, start=start)
        short = _without_images(call) | _language_inputs(prompt, past)
        images = with_prompt_images(cache, plan, prompt)
        short = calibrated(self, short, plan.calibration, images.sizes, images.masks)
        # The cache has to be found in the output.
        as_tuple = short.get("return_dict") is False
        short |= {"return_dict": True} if as_tuple else {}
        output = original(**_as_named_by(original, short))
        mark_cache(cache_of(output), images)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate, which returns the new tokens only."""
        if not hasattr(type(self), BASE):
            return handed_on(self, "generate", args, kwargs)
        original = super(WrappedLlava, self).generate  # type: ignore[misc]
        call = named_arguments(original, args, kwargs)
        image_cache = call.pop(IMAGE_CACHE, None)
        seen = call | {"input_ids": call.get("inputs")}
        plan = self._pitome.plan(self, seen)
        if not _sees_images(plan, seen):
            with plan.unmerged():
                return original(**call)
        refuse_unsupported(self, call)
        cache = call.get(CACHE_NAME)
        self._refuse_filled_cache(cache)
        check_cache(plan, cache, None)
        # Decoding continues at the end of a row, so shorter rows are padded at the start.
        prompt = prepare_original(plan, seen, image_cache=image_cache, left=True)
        full, short = prompt.compaction.keep.shape[1], prompt.sizes.shape[1]
        limits = shorter_limits(
            call,
            getattr(self, "generation_config", None),
            width=full,
            removed=full - short,
        )
        given = {
            "inputs": call["inputs"],
            # The package passes this to `prepare_inputs_labels_for_multimodal`, see below.
            "images": PreparedPrompt(prompt),
            "prompt_images": CachedImages.of(plan, prompt),
        }
        return original(**_without_images(call) | limits | given)

    def prepare_inputs_labels_for_multimodal(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own preparation with merged tokens; its six values cannot carry sizes."""
        if not hasattr(type(self), BASE):
            return handed_on(self, PREPARE, args, kwargs)
        original = getattr(super(), PREPARE)
        call = by_name(original, args, kwargs)
        images = call.get("images")
        if isinstance(images, PreparedPrompt):
            prompt = images.prompt
            mask = prompt.attention_mask
            if mask is None:
                mask = prompt.compaction.valid.long()
            return (None, prompt.position_ids, mask, None, prompt.inputs_embeds, None)
        plan = self._pitome.plan(self, call)
        if not _sees_images(plan, call):
            with plan.unmerged():
                return original(**call)
        if plan.calibration.is_active:
            logger.warning_once(
                f"{PREPARE}() was called directly: its values cannot carry sizes and places of "
                "merged tokens, so they are left out, which costs accuracy at small budgets; call "
                "forward() or generate() with images=..., or use pitome_vlm.compact_inputs()"
            )
        prompt = prepare_original(dataclasses.replace(plan, calibration=UNCALIBRATED), call)
        return (
            None,
            prompt.position_ids,
            prompt.attention_mask,
            call.get("past_key_values"),
            prompt.inputs_embeds,
            prompt.labels,
        )

    def _refuse_filled_cache(self, cache: Any) -> None:
        if cached_length(cache) and not continues_from_embeds(self.forward):
            raise ValueError(
                f"the original llava package cannot continue a filled {CACHE_NAME} in generate() "
                f"on transformers {TRANSFORMERS}, wrapped or not; leave it out"
            )

    def _pitome_compact_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """See `pitome_vlm.compact_inputs`; a batch without images comes back unchanged."""
        given = {name: value for name, value in inputs.items() if name != IMAGE_CACHE}
        plan = self._pitome.plan(self, given)
        if not _sees_images(plan, given):
            return given
        prompt = prepare_original(plan, given, image_cache=inputs.get(IMAGE_CACHE))
        compact = _without_images(given) | _language_inputs(prompt, None)
        if plan.calibration.size_bias:
            compact["token_sizes"] = prompt.sizes
        return {name: value for name, value in compact.items() if value is not None}


def _sees_images(plan: CallPlan, call: dict[str, Any]) -> bool:
    """Whether there is something to merge: the package ignores images while it decodes."""
    ids = call.get("input_ids")
    given = call.get("images") is not None and call.get("inputs_embeds") is None
    if not given or not isinstance(ids, Tensor) or ids.shape[1] == 1:
        return False
    return not plan.schedule.is_identity


def _takes_any(parameters: dict[str, inspect.Parameter]) -> bool:
    return any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _as_named_by(method: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Arguments under the names that a method of the package has for them.

    Its `forward` lists what transformers 4.37 passed. Releases before 5 pass `cache_position` as
    well, which follows from the cache; from 5.24 on the cache has another name.
    """
    parameters = parameters_of(method)
    if _takes_any(parameters):
        return call
    renamed = {
        _own_cache_name(parameters) if name == CACHE_NAME else name: value
        for name, value in call.items()
    }
    if "cache_position" not in parameters:
        renamed.pop("cache_position", None)
    return {n: value for n, value in renamed.items() if value is not None or n in parameters}


def _own_cache_name(parameters: dict[str, inspect.Parameter]) -> str:
    return CACHE_NAME if CACHE_NAME in parameters else "past_key_values"


def _without_images(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in CONSUMED}


def _language_inputs(prompt: CompactPrompt, past: Tensor | None) -> dict[str, Any]:
    """What the language model reads of a prompt; `past` is the mask over the cache, if any."""
    mask = prompt.attention_mask
    if past is not None:
        new = prompt.compaction.valid.to(past) if mask is None else mask.to(past)
        mask = torch.cat([past.to(new.device), new], 1)
    return {
        "inputs_embeds": prompt.inputs_embeds,
        "attention_mask": mask,
        "labels": prompt.labels,
        "position_ids": prompt.position_ids,
    }


def _without_past(call: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The mask over a filled cache, and the call with the mask over the new tokens alone."""
    cached = cached_length(call.get(CACHE_NAME))
    if not cached:
        return None, call
    ids, mask = call["input_ids"], call.get("attention_mask")
    if mask is None:
        return ids.new_ones(len(ids), cached), call
    if mask.shape[1] == cached + ids.shape[1]:
        return mask[:, :cached], call | {"attention_mask": mask[:, cached:]}
    return mask.new_ones(len(ids), cached), call
