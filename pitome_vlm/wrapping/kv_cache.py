"""What a cache remembers about the merged images in it, and how a forward pass goes on from there.

Knows: caches, masks and positions over columns that are cached and columns that are new. Does not
know: how images are encoded (`prompt.py`), how a mask or a position is computed
(`positions.py`), or `generate`.

What is remembered travels as an attribute of the cache: it is copied, kept and thrown away with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..merge.config import MergeConfig
from ..merge.schedule import Schedule
from ..releases import CACHE_NAME
from .merging import Merging
from .positions import Calibration, additive_mask, as_model_positions, extended, later_positions
from .prompt import CompactPrompt, PromptImages

# The attribute of a cache that holds its `CachedImages`.
_CACHED_IMAGES = "_pitome_images"


def cached_length(cache: Any) -> int:
    """Tokens in a cache of any kind, 0 for none."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


@dataclass(frozen=True)
class CachedImages:
    """What a cache remembers about the merged images in it.

    Attributes:
        config: the merge options they were merged with.
        tokens_out: visual tokens per image (or tile) by those options (the most, where images
            differ).
        images: every image that is in it.
        calibration: what the language model was told when the keys were computed.
        sizes: [B, S] float32, patches behind every column of the prompt.
        positions: [B, S] float32, positions of the prompt's columns; None for its own columns.
    """

    config: MergeConfig
    tokens_out: int
    images: PromptImages
    calibration: Calibration
    sizes: Tensor
    positions: Tensor | None


def mark_cache(cache: Any, images: CachedImages) -> None:
    """Remember in a cache what images are in it."""
    if isinstance(cache, Cache):
        setattr(cache, _CACHED_IMAGES, images)


def cached_images(cache: Any) -> CachedImages | None:
    """What `mark_cache` wrote, None for a cache without merged images."""
    return getattr(cache, _CACHED_IMAGES, None) if isinstance(cache, Cache) else None


def check_cache(
    model: Any, merging: Merging, cache: Any, placeholders: Tensor | None, schedule: Schedule
) -> None:
    """Refuse a cache whose images were merged otherwise than they would be now.

    Args:
        model: the wrapped model itself.
        merging: what `wrap` put on it.
        cache: the caller's cache.
        placeholders: [B, T] bool over the whole conversation, None where it is not at hand.
        schedule: token counts of this call.

    Raises:
        ValueError: old and new count, or old and new calibration differ.
    """
    length, images = cached_length(cache), cached_images(cache)
    if not length:
        return
    if images is not None:
        cached = images.tokens_out
    else:
        # Filled by an unwrapped model, or by text alone: its columns are those of the prompt.
        holds_image = placeholders is not None and bool(placeholders[:, :length].any())
        cached = schedule.tokens_in if holds_image else schedule.tokens_out
    if cached != schedule.tokens_out:
        raise ValueError(
            f"{CACHE_NAME} holds images of {cached} visual tokens each, but the model now makes "
            f"{schedule.tokens_out}; start a new cache after changing the merge settings"
        )
    if images is None:
        return
    calibration = merging.calibration(model)
    if images.calibration != calibration:
        raise ValueError(
            f"{CACHE_NAME} was computed with {images.calibration}, but the model now uses "
            f"{calibration}; start a new cache after changing the merge settings"
        )
    adaptive = images.config.is_adaptive or merging.config.is_adaptive
    if adaptive and images.config != merging.config:
        raise ValueError(
            f"{CACHE_NAME} holds images merged with {images.config.summary()!r}, but the model "
            f"now merges with {merging.config.summary()!r}; start a new cache after changing the "
            "merge settings"
        )


def query_of(call: dict[str, Any]) -> Tensor:
    """The new columns of a call: embeddings [B, Q, C] or ids [B, Q]."""
    embeds = call.get("inputs_embeds")
    found: Tensor = call["input_ids"] if embeds is None else embeds
    return found


def first_position(cache: Any, mask: Any, device: torch.device) -> Tensor | None:
    """[B] or [1] position of the first column behind a cache; None for an empty one.

    Args:
        cache: the caller's cache.
        mask: [B, cached + Q] or [B, Q] or None.
        device: of the result.
    """
    cached, images = cached_length(cache), cached_images(cache)
    if not cached:
        return None
    past = mask[:, :cached] if isinstance(mask, Tensor) and mask.shape[1] > cached else None
    if images is not None and images.positions is not None:
        last = later_positions(images.positions, past, cached)[:, -1].float()
        return (last.amax(-1) if last.dim() == 2 else last) + 1
    if past is not None:
        return past.sum(1).float()
    return torch.full((1,), float(cached), device=device)


def with_prompt_images(
    cache: Any, prompt: CompactPrompt, config: MergeConfig, tokens_out: int
) -> CachedImages:
    """What a cache remembers once a prompt is in it too."""
    sizes, positions, found = prompt.sizes, prompt.position_ids, prompt.images
    cached, images = cached_length(cache), cached_images(cache)
    if cached:
        before = torch.ones(len(sizes), cached, device=sizes.device)
        if images is not None:
            before = extended(images.sizes, cached, 1.0)
            found = images.images.copied(len(sizes)).followed_by(found)
        sizes = torch.cat([before, sizes], 1)
    if cached and positions is not None:
        past = torch.arange(cached, device=sizes.device).expand(len(sizes), cached)
        if images is not None and images.positions is not None:
            past = later_positions(images.positions, None, cached)
        if positions.dim() > past.dim():
            past = past[..., None].expand(-1, -1, positions.shape[-1])
        positions = torch.cat([past.to(positions.dtype), positions], 1)
    return CachedImages(config, tokens_out, found, prompt.calibration, sizes, positions)


def calibrated(
    model: Any,
    merging: Merging,
    call: dict[str, Any],
    sizes: Tensor | None = None,
    packed: Tensor | None = None,
) -> dict[str, Any]:
    """Arguments of one forward pass, with what the language model is told about merged tokens.

    Args:
        model: the wrapped model itself.
        merging: what `wrap` put on it.
        call: arguments without images. A mask that has its four axes already is left as it is.
        sizes: [B, S] of the columns from the first cached one on; None takes the cache's.
        packed: [B, Q] integer positions that restart where samples share a row.
    """
    mask, cache = call.get("attention_mask"), call.get(CACHE_NAME)
    images = cached_images(cache) if sizes is None else None
    ready = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)
    if ready or (sizes is None and images is None):
        return call
    query = query_of(call)
    if images is not None:
        call, sizes = _continued(call, images, query), images.sizes
    calibration = merging.calibration(model)
    if not calibration.is_active:
        return call
    if not calibration.size_bias and packed is None:
        if mask is None:
            # Without a mask, positions that do not rise by one would read as packed samples.
            width = cached_length(cache) + query.shape[1]
            mask = torch.ones(len(query), width, dtype=torch.long, device=query.device)
        return call | {"attention_mask": mask}
    weight: Tensor = model.get_input_embeddings().weight
    floats = additive_mask(
        merging.adapter.text_config(model),
        sizes if calibration.size_bias else None,
        batch=query.shape[0],
        queries=query.shape[1],
        dtype=query.dtype if query.is_floating_point() else weight.dtype,
        device=query.device,
        attention_mask=mask,
        cache=cache,
        packed_positions=packed,
    )
    return call | {"attention_mask": floats}


def _continued(call: dict[str, Any], images: CachedImages, query: Tensor) -> dict[str, Any]:
    """A call on a cache with merged images: positions count on in the unreduced layout.

    Raises:
        ValueError: the cache has other rows than the new inputs.
    """
    if images.sizes.shape[0] != query.shape[0]:
        raise ValueError(
            f"{CACHE_NAME} holds {images.sizes.shape[0]} rows with merged images, but the new "
            f"inputs have {query.shape[0]}; pass the same rows, or start a new cache"
        )
    if images.positions is None or call.get("position_ids") is not None:
        return call
    total = cached_length(call[CACHE_NAME]) + query.shape[1]
    positions = later_positions(images.positions, call.get("attention_mask"), total)
    return call | {"position_ids": as_model_positions(positions[:, -query.shape[1] :])}
