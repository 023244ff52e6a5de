"""What `forward` and `generate` refuse where images are merged: it would be silently wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..adapters.swap import is_swapped
from ..releases import CACHE_NAME, EMBEDS_NEED_EMPTY_CACHE, HANDED_FEATURES, TRANSFORMERS
from .generation import options_of
from .kv_cache import CachedImages, cached_images, cached_length
from .merging import CallPlan, Merging
from .placeholders import all_placeholders
from .positions import by_mask


def check_cache(plan: CallPlan, cache: Any, ids: Tensor | None) -> None:
    """Refuse a cache whose images were merged otherwise than they would be now.

    Args:
        plan: of this call.
        cache: the caller's cache.
        ids: [B, T] of the whole conversation, None where it is not at hand.

    Raises:
        ValueError: old and new count, or old and new calibration differ.
    """
    length, images, schedule = cached_length(cache), cached_images(cache), plan.schedule
    if not length:
        return
    if images is not None:
        cached = images.tokens_out
    else:
        # Filled by an unwrapped model, or by text alone: its columns are those of the prompt.
        holds_image = ids is not None and bool(
            all_placeholders(plan.adapter, plan.model, ids[:, :length]).any()
        )
        cached = schedule.tokens_in if holds_image else schedule.tokens_out
    advice = "start a new cache after changing the merge settings"
    if cached != schedule.tokens_out:
        raise ValueError(
            f"{CACHE_NAME} holds images of {cached} visual tokens each, but the model now makes "
            f"{schedule.tokens_out}; {advice}"
        )
    if images is None:
        return
    if images.calibration != plan.calibration:
        raise ValueError(
            f"{CACHE_NAME} was computed with {images.calibration}, but the model now uses "
            f"{plan.calibration}; {advice}"
        )
    adaptive = images.config.is_adaptive or plan.config.is_adaptive
    if adaptive and images.config != plan.config:
        raise ValueError(
            f"{CACHE_NAME} holds images merged with {images.config.summary()!r}, but the model "
            f"now merges with {plan.config.summary()!r}; {advice}"
        )


def check_carrier(images: CachedImages, text_config: Any) -> None:
    """Refuse a cache that was filled before the language model got another attention kernel.

    Args:
        images: what the cache remembers.
        text_config: of the language model.

    Raises:
        ValueError: the kernel reads sizes in another way than the one that filled the cache.
    """
    name = text_config._attn_implementation
    if images.calibration.is_active and by_mask(text_config) != (
        images.calibration.carrier == "mask"
    ):
        raise ValueError(
            f"{CACHE_NAME} was computed with {images.calibration}, which the attention "
            f"implementation {name!r} does not read; start a new cache after changing it"
        )


def refuse_stale_inputs(model: Any, merging: Merging, call: dict[str, Any]) -> None:
    """Refuse old placeholders or an old mask with a shortened cache.

    Args:
        model: the wrapped model itself.
        merging: what `wrap` put on it.
        call: arguments of `forward` without images.

    Raises:
        ValueError: the inputs are those of the unmerged conversation.
    """
    ids, cache, mask = (call.get(name) for name in ("input_ids", CACHE_NAME, "attention_mask"))
    # Other caches are only filled inside generate, which keeps all lengths consistent, and asking
    # a static cache for its length costs a device synchronisation per decoded token.
    cached = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
    if ids is None or not cached or call.get(HANDED_FEATURES) is not None:
        return
    expected = cached + ids.shape[1]
    covered = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0
    long_mask = covered > expected
    # One token a step is the decoding loop; looking at it would cost a synchronisation too.
    old_images = ids.shape[1] > 1 and bool(all_placeholders(merging.adapter, model, ids).any())
    if not (long_mask or old_images) or merging.plan(model, call).schedule.is_identity:
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


def refuse_unsupported(model: Any, call: dict[str, Any]) -> None:
    """Refuse the modes of `generate` that do not work with a prompt passed as embeddings.

    Args:
        model: the wrapped model itself.
        call: arguments of `generate`.

    Raises:
        ValueError: one of them is asked for.
    """
    lookup = options_of(call, getattr(model, "generation_config", None))
    chunk = lookup("prefill_chunk_size")
    if chunk is not None:
        raise ValueError(
            f"prefill_chunk_size={chunk} cannot be combined with merged images: the prompt "
            "is passed as embeddings, which generate does not cut into chunks"
        )
    for name, off in (("use_mtp", False), ("speculation_type", None)):
        value = lookup(name)
        if value not in (None, off):
            raise ValueError(
                f"{name}={value!r} cannot be combined with merged images: its drafts count "
                "columns of the unmerged prompt; use prompt_lookup_num_tokens or assistant_model"
            )
    if call.get("cache_implementation") == "paged":
        raise ValueError(
            "cache_implementation='paged' (continuous batching) takes ids alone, without images; "
            "leave it out, or serve the model with vLLM"
        )
    # PEFT puts its own method on the instance while it generates.
    peft = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    method = getattr(peft, "active_peft_config", None)
    if getattr(method, "is_prompt_learning", False):
        raise ValueError(
            f"{type(method).__name__} cannot be combined with merged images in generate(): "
            "PEFT takes the prompt as ids there, not as embeddings; use LoRA, or keep=1.0"
        )


def refuse_assisting(model: Any, merging: Merging, call: dict[str, Any]) -> None:
    """Refuse to draft for a model that is not wrapped: it counts the cache in unmerged columns.

    Args:
        model: the wrapped model itself.
        merging: what `wrap` put on it.
        call: arguments of `generate`.

    Raises:
        ValueError: such a model asks for a draft about images.
    """
    asked = getattr(call.get("generation_config"), "is_assistant", False)
    ids = call.get("input_ids")
    if not asked or ids is None or cached_images(call.get(CACHE_NAME)) is not None:
        return
    if bool(all_placeholders(merging.adapter, model, ids).any()):
        raise ValueError(
            "a wrapped assistant_model needs a wrapped main model; wrap() that too (keep=1.0 "
            "changes nothing there), or unwrap() the assistant"
        )


def is_wrapped_assistant(assistant: Any) -> bool:
    """Whether an assistant model, None for none, shortens prompts too."""
    base = getattr(assistant, "get_base_model", lambda: assistant)()
    return isinstance(base, torch.nn.Module) and is_swapped(base)


def refuse_blind_assistant(call: dict[str, Any], merging: Merging) -> None:
    """Refuse an assistant that would not see what the main model sees.

    Args:
        call: arguments of `generate`.
        merging: what `wrap` put on the main model.

    Raises:
        ValueError: the prompt is embedded already, or the assistant is wrapped and the images are
            left to the main model's cache.
    """
    assistant = call.get("assistant_model")
    if assistant is None:
        return
    if call.get("input_ids") is None:
        raise ValueError(
            "assistant_model needs input_ids: embeddings mean nothing to another model; pass what "
            "the processor returned, generate() shortens it itself"
        )
    if is_wrapped_assistant(assistant) and not merging.has_pixels(call):
        raise ValueError(
            "a wrapped assistant_model has a cache of its own: pass the pixel_values of all images "
            "of the conversation too, or unwrap() the assistant"
        )


def refuse_new_image() -> None:
    """Refuse an image after what a cache holds, on releases that do not read embeddings there.

    Raises:
        ValueError: this is such a release.
    """
    if EMBEDS_NEED_EMPTY_CACHE:
        raise ValueError(
            f"transformers {TRANSFORMERS} cannot add an image to a cache that is already filled "
            "(unwrapped, it reads the placeholders as words); leave out "
            f"{CACHE_NAME} for this turn, or use transformers 5"
        )
