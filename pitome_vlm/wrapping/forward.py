"""`forward` and `generate` of a wrapped LLaVA: the usual contract, fewer tokens inside.

Knows: the calling conventions of transformers. Does not know: how images are encoded or merged
(`prompt.py`), nor how a model gets wrapped (`wrap.py`).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..merge.schedule import Schedule
from ..releases import (
    CACHE_NAME,
    EMBEDS_NEED_EMPTY_CACHE,
    TRANSFORMERS,
    cache_of,
    fill_image_states,
    with_cache_name,
)
from .columns import compaction
from .generation import shorter_limits, with_full_prompt, with_prompt
from .image_cache import IMAGE_CACHE
from .kv_cache import (
    CachedImages,
    cached_images,
    cached_length,
    calibrated,
    check_cache,
    first_position,
    mark_cache,
    query_of,
    with_prompt_images,
)
from .merging import Merging
from .positions import as_model_positions, later_positions
from .prompt import (
    SEQUENCE_INPUTS,
    CompactPrompt,
    PromptImages,
    all_placeholders,
    compact_attention_mask,
    drop_stale_placeholders,
    prepare,
)


class WrappedLlava:
    """Mixin in front of a LLaVA's class."""

    # Methods whose signature callers read (Trainer's column names, generate's validation): the
    # swapped class shows the signature of the original ones.
    _pitome_mirrored: tuple[str, ...] = (
        "forward",
        "generate",
        "prepare_inputs_for_generation",
        "save_pretrained",
    )

    _pitome: Merging

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward on the shortened prompt; logits and loss are of that length."""
        original = super().forward  # type: ignore[misc]
        call = _named_arguments(original, args, kwargs)
        sizes, image_cache = call.pop("token_sizes", None), call.pop(IMAGE_CACHE, None)
        if not self._pitome.has_pixels(call):
            self._refuse_stale_inputs(call)
            return original(**calibrated(self, self._pitome, call, sizes))
        schedule, cache = self._pitome_schedule(call), call.get(CACHE_NAME)
        if self._pitome.is_identity(self, call):
            with self._pitome.unmerged(self, call):
                return original(**call)
        keep = call.get("logits_to_keep")
        if isinstance(keep, Tensor) and keep.numel() > 1:
            raise ValueError(
                "logits_to_keep must be a number where images are merged: indices would point "
                "into the prompt as it was before"
            )
        check_cache(self, self._pitome, cache, None, schedule)
        cached = cached_length(cache)
        start = first_position(cache, call.get("attention_mask"), self.device)  # type: ignore[attr-defined]
        seen = call | {IMAGE_CACHE: image_cache}
        prompt = prepare(self, self._pitome, seen, cached=cached, start=start)
        call = self._without_images(call, prompt) | {
            name: getattr(prompt, name) for name in ("attention_mask", "labels", "position_ids")
        }
        call["inputs_embeds"] = prompt.inputs_embeds
        call["position_ids"] = as_model_positions(prompt.position_ids)
        images = with_prompt_images(cache, prompt, self._pitome.config, schedule.tokens_out)
        call = calibrated(self, self._pitome, call, images.sizes, prompt.packed_positions)
        output = original(**call)
        for one in prompt.encoded:
            fill_image_states(output, one.visual.features, one.kind)
        mark_cache(cache_of(output), images)
        return output

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate; `sequences` begin with the caller's prompt as it was."""
        original = super().generate  # type: ignore[misc]
        call = _named_arguments(original, args, kwargs)
        ids, image_cache = call.pop("inputs", None), call.pop(IMAGE_CACHE, None)
        if ids is not None:
            call["input_ids"] = ids
        ids, cache = call.get("input_ids"), call.get(CACHE_NAME)
        schedule, has_pixels = self._pitome_schedule(call), self._pitome.has_pixels(call)
        if self._pitome.is_identity(self, call) or (
            not has_pixels and (ids is None or not cached_length(cache))
        ):
            # From release 5.24 on generate itself asks for the features, in front of `forward`.
            with self._pitome.unmerged(self, call):
                return original(**call)
        self._refuse_unsupported(call)
        placeholders = None if ids is None else all_placeholders(self, self._pitome, ids)
        check_cache(self, self._pitome, cache, placeholders, schedule)
        if not has_pixels:
            return self._continue_chat(original, ids, call)
        seen = call | {IMAGE_CACHE: image_cache}
        prompt = prepare(self, self._pitome, seen, left=_pad_left(call))
        if EMBEDS_NEED_EMPTY_CACHE and cached_length(cache):
            self._refuse_new_image(prompt, cached_length(cache))
        mask = prompt.attention_mask
        short = self._without_images(call, prompt) | {
            "inputs_embeds": prompt.inputs_embeds,
            "attention_mask": prompt.compaction.valid.long() if mask is None else mask,
            "input_ids": prompt.input_ids,
            # With several numbers per token they are only put in step by step (below).
            "position_ids": None if self._pitome.adapter.own_positions else prompt.position_ids,
            "token_sizes": prompt.sizes,
            "token_positions": prompt.position_ids,
            "prompt_images": prompt.images,
        }
        return self._run(original, call, short, ids, prompt.inputs_embeds.shape[1])

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        token_sizes: Tensor | None = None,
        token_positions: Tensor | None = None,
        prompt_images: PromptImages | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own inputs of one step, with sizes and positions of merged tokens in them.

        Args:
            *args: as of the model's own method.
            token_sizes: [B, S] float32, patches behind every column of the prompt.
            token_positions: [B, S] float32 positions of the prompt, None for the model's own.
            prompt_images: every image of the prompt.
            **kwargs: as of the model's own method.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if token_sizes is None:
            return inputs
        cache, mask = inputs.get(CACHE_NAME), kwargs.get("attention_mask")
        images = cached_images(cache)
        if images is None or images.sizes is not token_sizes:
            # The first step of this prompt. What follows from the model's modules is not looked
            # up again for every token.
            images = CachedImages(
                self._pitome.config,
                self._pitome.schedule(self).tokens_out,
                prompt_images or PromptImages([], len(token_sizes)),
                self._pitome.calibration(self),
                token_sizes,
                token_positions,
            )
            mark_cache(cache, images)
        # The mask with two axes: one made for a compiled step knows nothing of sizes.
        step = inputs if mask is None else inputs | {"attention_mask": mask}
        if token_positions is not None:
            queries = query_of(inputs).shape[1]
            total = cached_length(cache) + queries if mask is None else mask.shape[1]
            positions = as_model_positions(
                later_positions(token_positions, mask, total)[:, -queries:]
            )
            step, inputs = step | {"position_ids": positions}, inputs | {"position_ids": positions}
        return (
            calibrated(self, self._pitome, step, token_sizes)
            if images.calibration.size_bias
            else inputs
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the untouched checkpoint with `pitome_config.json` beside it."""
        original = super().save_pretrained  # type: ignore[misc]
        call = _named_arguments(original, args, kwargs)
        if call.get("is_main_process", True):
            # First, so that it is there when the folder is pushed to a hub.
            self._pitome.config.save_pretrained(call["save_directory"])
        return original(**call)

    def extra_repr(self) -> str:
        """Say in `print(model)` what is on."""
        note = f"pitome: {self._pitome.config.summary()}"
        try:
            schedule = self._pitome.schedule(self)
            unit = self._pitome.adapter.counted_per
            note += f", {schedule.tokens_in} -> {schedule.counts_out} visual tokens per {unit}"
        except (TypeError, ValueError) as error:
            # The model's config was changed after wrap; printing a model must not fail for it.
            note += f", not applicable: {error}"
        return ", ".join(part for part in (super().extra_repr(), note) if part)  # type: ignore[misc]

    def _pitome_schedule(self, call: dict[str, Any]) -> Schedule:
        names = self._pitome.adapter.feature_options
        options = {name: call[name] for name in names if call.get(name) is not None}
        return self._pitome.schedule(self, **options)

    def _without_images(self, call: dict[str, Any], prompt: CompactPrompt) -> dict[str, Any]:
        """The other arguments; further per-token ones (token types) are shortened with it."""
        adapter = self._pitome.adapter
        consumed = {*adapter.vision_inputs, *adapter.feature_options, *SEQUENCE_INPUTS}
        consumed.add("cache_position")
        shape = prompt.compaction.keep.shape
        return {
            name: prompt.compaction.take(value, 0)
            if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
            else value
            for name, value in call.items()
            if name not in consumed
        }

    def _refuse_stale_inputs(self, call: dict[str, Any]) -> None:
        """Old placeholders or an old mask beside a shortened cache would be silently wrong."""
        ids, cache, mask = (call.get(name) for name in ("input_ids", CACHE_NAME, "attention_mask"))
        # Other caches are only filled inside generate, which keeps all lengths consistent, and
        # asking a static cache for its length costs a device synchronisation per decoded token.
        cached = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
        if ids is None or not cached:
            return
        expected = cached + ids.shape[1]
        covered = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0
        long_mask = covered > expected
        # One token a step is the decoding loop; looking at it would cost a synchronisation too.
        old_images = ids.shape[1] > 1 and bool(all_placeholders(self, self._pitome, ids).any())
        if not (long_mask or old_images) or self._pitome_schedule(call).is_identity:
            return
        if long_mask:
            raise ValueError(
                f"attention_mask covers {covered} tokens, but the cache holds {cached} "
                f"(images merged) and {ids.shape[1]} are new; build the mask for {expected} tokens"
            )
        raise ValueError(
            "input_ids hold image placeholders, but pixel_values are missing and the cache "
            "already holds merged images; pass only the new tokens, or use generate(), which "
            "shortens an old conversation itself"
        )

    def _refuse_unsupported(self, call: dict[str, Any]) -> None:
        chunk = call.get("prefill_chunk_size")
        if chunk is None:
            chunk = getattr(call.get("generation_config"), "prefill_chunk_size", None)
        if chunk is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} cannot be combined with merged images: the prompt "
                "is passed as embeddings, which generate does not cut into chunks"
            )

    def _refuse_new_image(self, prompt: CompactPrompt, cached: int) -> None:
        slots = prompt.compaction.take(prompt.placeholders, False)
        if bool(slots[:, cached:].any()):
            raise ValueError(
                f"transformers {TRANSFORMERS} cannot add an image to a cache that is "
                "already filled (unwrapped, it reads the placeholders as words); leave out "
                f"{CACHE_NAME} for this turn, or use transformers 5"
            )

    def _continue_chat(self, original: Any, ids: Any, call: dict[str, Any]) -> Any:
        """A later turn on a cache whose images were merged when they were encoded."""
        images = cached_images(call[CACHE_NAME])
        known = None if images is None else images.images
        placeholders, drop = drop_stale_placeholders(self, self._pitome, ids, known)
        if not bool(placeholders.any()):
            return original(**call)
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        moves = compaction(placeholders, drop, mask, left=_pad_left(call))
        compact = moves.take(ids, 0)
        cached = cached_length(call[CACHE_NAME])
        if bool(moves.take(placeholders, False)[:, cached:].any()):
            raise ValueError(
                "the conversation holds an image that the cache does not; pass the pixel_values "
                "of all its images"
            )
        if positions is not None:
            raise ValueError(
                "position_ids cannot be combined with a cache that holds merged images; leave "
                "them out, they follow from the attention_mask"
            )
        compact_mask = compact_attention_mask(moves, mask)
        short = call | {
            "input_ids": compact,
            "attention_mask": moves.valid.long() if compact_mask is None else compact_mask,
            "token_sizes": None if images is None else images.sizes,
            "token_positions": None if images is None else images.positions,
            "prompt_images": known,
        }
        return self._run(original, call, short, ids, compact.shape[1])

    def _run(
        self,
        original: Any,
        call: dict[str, Any],
        short: dict[str, Any],
        ids: Tensor | None,
        length: int,
    ) -> Any:
        """Generate from the shortened call; everything the caller sees has its own prompt."""
        width = (call["inputs_embeds"] if ids is None else ids).shape[1]
        default = getattr(self, "generation_config", None)
        short = short | shorter_limits(call, default, width=width, removed=width - length)
        short |= with_full_prompt(call, ids, length)
        given = {name: value for name, value in short.items() if value is not None}
        return with_prompt(original(**given), ids, length)


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
    return with_cache_name(named)


def _pad_left(call: dict[str, Any]) -> bool | None:
    """generate() continues at the end of a row: shorter rows are padded in front.

    Unless the caller padded behind; then that stays as it is (and transformers warns).
    """
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return True
    return None if bool((mask[:, -1] == 0).any()) else True
