"""`forward` and `generate` of a wrapped LLaVA: the usual contract, fewer tokens inside.

The calling conventions of transformers. How a prompt is shortened is left to `prompt.py`, how a
model gets wrapped to `wrap.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters.swap import BASE
from ..releases import CACHE_NAME, FIRST_STEP, HANDED_FEATURES, cache_of, fill_image_states
from .arguments import named_arguments
from .candidates import prepare_first_step
from .generation import (
    CALLER,
    CallerPrompt,
    inferred_mask,
    shorter_limits,
    warn_of_right_padding,
    with_full_prompt,
    with_prompt,
)
from .hand_over import PromptFeatures
from .hooks import GenerateHooks
from .image_cache import IMAGE_CACHE
from .kv_cache import (
    CACHED_IMAGES,
    CachedImages,
    cached_images,
    cached_length,
    calibrated,
    continued,
    first_position,
    mark_cache,
    query_of,
    with_prompt_images,
)
from .later_turns import brings_new_images_only, with_new_images, without_new_images
from .positions import as_model_positions
from .prompt import for_every_row, other_arguments, prepare
from .refusals import (
    check_cache,
    check_carrier,
    is_wrapped_assistant,
    refuse_assisting,
    refuse_blind_assistant,
    refuse_new_image,
    refuse_stale_inputs,
    refuse_unsupported,
)
from .wrapped_model import WrappedModel, handed_on

# In the inputs of a pass: `prepare_inputs_for_generation` has seen to everything.
PREPARED = "pitome_prepared"


class WrappedLlava(GenerateHooks, WrappedModel):
    """Mixin that `wrap` puts before a model's class."""

    _pitome_mirrored = (
        *WrappedModel._pitome_mirrored,
        "forward",
        "generate",
        "prepare_inputs_for_generation",
    )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward on the shortened prompt; logits and loss are of that length."""
        if not hasattr(type(self), BASE):
            return handed_on(self, "forward", args, kwargs)
        if kwargs.pop(PREPARED, False):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        original = super().forward  # type: ignore[misc]
        call = named_arguments(original, args, kwargs)
        sizes, image_cache = call.pop("token_sizes", None), call.pop(IMAGE_CACHE, None)
        if not self._pitome.has_pixels(call):
            return original(**self._pitome_without_pixels(call, sizes))
        plan, cache = self._pitome.plan(self, call), call.get(CACHE_NAME)
        if plan.is_identity():
            with plan.unmerged():
                return original(**call)
        keep = call.get("logits_to_keep")
        if isinstance(keep, Tensor) and keep.numel() > 1:
            raise ValueError(
                "logits_to_keep must be a number where images are merged: indices would point "
                "into the prompt as it was before"
            )
        check_cache(plan, cache, None)
        cached = cached_length(cache)
        start = first_position(cache, call.get("attention_mask"), self.device)  # type: ignore[attr-defined]
        prompt = prepare(plan, call, image_cache=image_cache, cached=cached, start=start)
        call = other_arguments(plan, call, prompt.compaction.keep.shape, prompt.compaction.take) | {
            name: getattr(prompt, name) for name in ("attention_mask", "labels", "position_ids")
        }
        call |= prompt.language_inputs()
        call["position_ids"] = as_model_positions(prompt.position_ids)
        images = with_prompt_images(cache, plan, prompt)
        call = calibrated(
            self,
            call,
            plan.calibration,
            images.sizes,
            images.masks,
            prompt.packed_positions,
        )
        # The cache has to be found in the output.
        as_tuple = call.get("return_dict") is False
        output = original(**call | ({"return_dict": True} if as_tuple else {}))
        for one in prompt.encoded:
            fill_image_states(output, one.visual.features, one.kind)
        mark_cache(cache_of(output), images)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate; `sequences` begin with the caller's prompt as it was."""
        if not hasattr(type(self), BASE):
            return handed_on(self, "generate", args, kwargs)
        original = super().generate  # type: ignore[misc]
        call = named_arguments(original, args, kwargs)
        ids, image_cache = call.pop("inputs", None), call.pop(IMAGE_CACHE, None)
        sizes = call.pop("token_sizes", None)
        if ids is not None:
            call["input_ids"] = ids
        ids, cache = call.get("input_ids"), call.get(CACHE_NAME)
        plan, has_pixels = self._pitome.plan(self, call), self._pitome.has_pixels(call)
        if sizes is not None and not has_pixels:
            refuse_blind_assistant(call, self._pitome)
            # What `compact_inputs` made. Positions are put in step by step, as they do not simply
            # count on from the prompt's.
            images = CachedImages.of_sizes(plan, sizes, call.pop("position_ids", None))
            return original(**call, prompt_images=images)
        if not plan.schedule.is_identity:
            refuse_assisting(self, self._pitome, call)
        if plan.is_identity() or (not has_pixels and (ids is None or not cached_length(cache))):
            # From release 5.24 on generate itself asks for the features, before `forward`.
            with plan.unmerged():
                return original(**self._pitome_unshortened(call))
        refuse_unsupported(self, call)
        if ids is not None and call.get("attention_mask") is None:
            call["attention_mask"] = inferred_mask(self, call, ids)
        if ids is not None:
            call["attention_mask"] = for_every_row(call["attention_mask"], len(ids))
        check_cache(plan, cache, ids)
        left = _pad_left(call)
        if not has_pixels:
            turn = without_new_images(plan, ids, call, left=left)
            return original(**call) if turn is None else self._run(original, call, call | turn, ids)
        if ids is not None:
            warn_of_right_padding(call)
            if brings_new_images_only(plan, ids, call):
                refuse_new_image()
                turn = with_new_images(plan, ids, call, left=left, image_cache=image_cache)
                return self._run(original, call, turn, ids)
        prompt = prepare(plan, call, image_cache=image_cache, left=left)
        if cached := cached_length(cache):
            shown = prompt.compaction.take(prompt.placeholders, False)
            if bool(shown[:, cached:].any()):
                refuse_new_image()
        mask = prompt.attention_mask
        short = other_arguments(
            plan, call, prompt.compaction.keep.shape, prompt.compaction.take
        ) | {
            "inputs_embeds": prompt.inputs_embeds,
            "prompt_features": prompt.features,
            "attention_mask": prompt.compaction.valid.long() if mask is None else mask,
            "input_ids": prompt.input_ids,
            # With several numbers per token they are only put in step by step (below).
            "position_ids": None if plan.adapter.own_positions else prompt.position_ids,
            "prompt_images": CachedImages.of(plan, prompt),
        }
        return self._run(original, call, short, ids)

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        prompt_images: CachedImages | None = None,
        caller_prompt: CallerPrompt | None = None,
        prompt_features: PromptFeatures | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own inputs of one step, with sizes and positions of merged tokens in them.

        This and `forward` run for every decoded token: what follows from the prompt is not worked
        out again.

        Args:
            *args: as of the model's own method.
            prompt_images: the images of the prompt and what is told about them.
            caller_prompt: for `hooks.py`; the model does not get it.
            prompt_features: their features, where the model's own forward puts them in.
            **kwargs: as of the model's own method.
        """
        del caller_prompt
        if not hasattr(type(self), BASE):
            return handed_on(self, "prepare_inputs_for_generation", args, kwargs)
        if prompt_images is not None:
            cache = kwargs.get(CACHE_NAME)
            # Not a function of its own: this runs for every token.
            if kwargs.get(FIRST_STEP, cache is None or not cache.get_seq_length()):
                prepare_first_step(self, args[0] if args else kwargs["input_ids"], kwargs)
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        cache = inputs.get(CACHE_NAME)
        images = getattr(cache, CACHED_IMAGES, None)
        if prompt_images is None:
            if images is None and not self._pitome.has_pixels(inputs):
                inputs[PREPARED] = True
            return inputs
        if images is None or prompt_images not in (images, images.prompt):
            # The first step of this prompt.
            if prompt_features is not None:
                ids = inputs["input_ids"]
                inputs[HANDED_FEATURES] = prompt_features.of_columns(ids, cached_length(cache))
            images = prompt_images.copied(len(query_of(inputs)))
            mark_cache(cache, images)
        weight: Tensor = self.get_input_embeddings().weight  # type: ignore[attr-defined]
        images.step(inputs, kwargs.get("attention_mask"), weight.dtype)
        inputs[PREPARED] = True
        return inputs

    def _pitome_without_pixels(self, call: dict[str, Any], sizes: Tensor | None) -> dict[str, Any]:
        """Arguments of a pass over text alone, or over what `compact_inputs` made."""
        refuse_stale_inputs(self, self._pitome, call)
        if sizes is not None:
            plan = self._pitome.plan(self)
            return calibrated(self, call, plan.calibration, sizes, plan.masks())
        images = cached_images(call.get(CACHE_NAME))
        if images is None:
            return call
        check_carrier(images, self._pitome.adapter.text_config(self))
        return continued(self, call, images)

    def _pitome_unshortened(self, call: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` where nothing is merged here, but an assistant may merge."""
        ids = call.get("input_ids")
        if ids is None or not is_wrapped_assistant(call.get("assistant_model")):
            return call
        return call | {CALLER: self._pitome_caller(call, ids, ids.shape[1])}

    def _pitome_caller(self, call: dict[str, Any], ids: Tensor, length: int) -> CallerPrompt:
        vision = frozenset(self._pitome.adapter.vision_inputs)
        return CallerPrompt(ids, call.get("attention_mask"), length, call, vision)

    def _run(
        self,
        original: Any,
        call: dict[str, Any],
        short: dict[str, Any],
        ids: Tensor | None,
    ) -> Any:
        """Generate from the shortened call; everything the caller sees has its own prompt."""
        refuse_blind_assistant(call, self._pitome)
        width = (call["inputs_embeds"] if ids is None else ids).shape[1]
        length = query_of(short).shape[1]
        default = getattr(self, "generation_config", None)
        short = short | shorter_limits(call, default, width=width, removed=width - length)
        if ids is None:
            return original(**{n: value for n, value in short.items() if value is not None})
        caller = self._pitome_caller(call, ids, length)
        short |= with_full_prompt(call, caller)
        given = {name: value for name, value in short.items() if value is not None}
        return with_prompt(original(**given), caller)


def _pad_left(call: dict[str, Any]) -> bool | None:
    """generate() continues at the end of a row: shorter rows are padded at the start.

    Unless the caller padded at the end; then that stays as it is (and transformers warns).
    """
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return True
    return None if bool((mask[:, -1] == 0).any()) else True
