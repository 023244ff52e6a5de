"""Later turns of a conversation: what of it is in a cache already, and what is new.

Callers hand over the whole conversation as the processor wrote it; the cache holds a shortened one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..releases import CACHE_NAME
from .columns import Compaction, compaction
from .image_cache import ImageCache
from .kv_cache import cached_images, cached_length, first_position, with_prompt_images
from .merging import CallPlan
from .placeholders import drop_stale_placeholders
from .prompt import compact_attention_mask, other_arguments, prepare


def without_new_images(
    plan: CallPlan, ids: Tensor, call: dict[str, Any], *, left: bool | None
) -> dict[str, Any] | None:
    """Arguments of a follow-up question without new images, shortened as the cache is.

    Args:
        plan: of this call.
        ids: [B, T], the whole conversation.
        call: arguments of `generate`, with a filled cache.
        left: see `columns.compaction`.

    Returns:
        What replaces the caller's arguments; None where the conversation shows no image.

    Raises:
        ValueError: there is an image that the cache does not hold, or `position_ids` are given.
    """
    images = cached_images(call[CACHE_NAME])
    known = None if images is None else images.images
    placeholders, drop = drop_stale_placeholders(plan, ids, known)
    if not bool(placeholders.any()):
        return None
    mask = call.get("attention_mask")
    moves = compaction(placeholders, drop, mask, left=left)
    cached = cached_length(call[CACHE_NAME])
    if bool(moves.take(placeholders, False)[:, cached:].any()):
        raise ValueError(
            "the conversation holds an image that the cache does not; pass the pixel_values of "
            "that image, or of all images"
        )
    _refuse_positions(call)
    compact_mask = compact_attention_mask(moves, mask)
    return {
        "input_ids": moves.take(ids, 0),
        "attention_mask": moves.valid.long() if compact_mask is None else compact_mask,
        "prompt_images": images,
    }


def brings_new_images_only(plan: CallPlan, ids: Tensor, call: dict[str, Any]) -> bool:
    """Whether the pixels of a call are those of images that its cache does not hold yet.

    Otherwise they are those of the whole conversation.

    Args:
        plan: of this call.
        ids: [B, T], the whole conversation.
        call: arguments of `generate`, with pixels.
    """
    cached, images = cached_length(call.get(CACHE_NAME)), cached_images(call.get(CACHE_NAME))
    if images is None or not cached:
        return False
    new, tokens = ids[:, cached + images.removed :], plan.adapter.placeholder_ids(plan.model)
    only = False
    for kind, counts in plan.counts().items():
        given = sum(one.full for one in counts)
        if int((new == tokens[kind]).sum()) != given:
            return False
        only = only or int((ids == tokens[kind]).sum()) != given
    return only


def with_new_images(
    plan: CallPlan,
    ids: Tensor,
    call: dict[str, Any],
    *,
    left: bool | None,
    image_cache: ImageCache | None,
) -> dict[str, Any]:
    """Arguments of a turn that adds images and brings the pixels of these alone.

    Args:
        plan: of this call.
        ids: [B, T], the whole conversation.
        call: arguments of `generate`, with pixels.
        left: see `columns.compaction`.
        image_cache: where to look for encoded images first.

    Returns:
        All arguments, shortened.

    Raises:
        ValueError: an input cannot be shortened, `position_ids` are given, or the beginning of
            the conversation is not what the cache holds.
    """
    cache, mask = call[CACHE_NAME], call.get("attention_mask")
    _refuse_positions(call)
    mask = torch.ones_like(ids) if mask is None else mask
    begin, moves = _begun(plan, ids, mask, cache, left)
    cached, past = cached_length(cache), moves.take(mask[:, :begin], 0)
    turn = call | {
        name: value[:, begin:]
        for name, value in call.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }
    turn["input_ids"] = ids[:, begin:]
    turn["attention_mask"] = torch.cat([past, mask[:, begin:].to(past)], 1)
    start = first_position(cache, turn["attention_mask"], ids.device)
    prompt = prepare(plan, turn, image_cache=image_cache, left=left, cached=cached, start=start)
    state = with_prompt_images(cache, plan, prompt)
    embeds = prompt.inputs_embeds
    if embeds is not None:
        # What stands in the cache is not read again; the new columns come after it.
        before = embeds.new_zeros(len(ids), cached, embeds.shape[-1])
        embeds = torch.cat([before, embeds], 1)

    def take(values: Tensor, fill: int) -> Tensor:
        earlier, later = values[:, :begin], values[:, begin:]
        return torch.cat([moves.take(earlier, fill), prompt.compaction.take(later, fill)], 1)

    return other_arguments(plan, call, ids.shape, take) | {
        "inputs_embeds": embeds,
        "prompt_features": prompt.features,
        "attention_mask": prompt.attention_mask,
        "input_ids": take(ids, 0),
        "position_ids": None if plan.adapter.own_positions else state.positions,
        "prompt_images": state,
    }


def _begun(
    plan: CallPlan, ids: Tensor, mask: Tensor, cache: Any, left: bool | None
) -> tuple[int, Compaction]:
    """The columns of a conversation that a cache holds, and how they got shorter.

    Raises:
        ValueError: the cache holds something else.
    """
    cached, images = cached_length(cache), cached_images(cache)
    assert images is not None  # see `brings_new_images_only`
    begin = cached + images.removed
    placeholders, drop = drop_stale_placeholders(plan, ids[:, :begin], images.images)
    moves = compaction(placeholders, drop, mask[:, :begin], left=left)
    if moves.valid.shape[1] != cached:
        raise ValueError(
            f"{CACHE_NAME} holds {cached} tokens, but the conversation up to its new images has "
            f"{moves.valid.shape[1]} once its images are merged; pass the conversation as it was "
            "when the cache was filled, or leave the cache out"
        )
    return begin, moves


def _refuse_positions(call: dict[str, Any]) -> None:
    if call.get("position_ids") is not None:
        raise ValueError(
            "position_ids cannot be combined with a cache that holds merged images; leave them "
            "out, they follow from the attention_mask"
        )
