"""What a key-value cache remembers about the merged images in it, and how a pass continues there.

Masks and positions over columns that are cached and columns that are new. What is remembered
travels as an attribute of the cache: it is copied, kept and thrown away with it. How images are
encoded and how a mask is computed is left to `prompt.py` and `masks.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..adapters.wide_attention import KEY_SIZES, KeySizes
from ..merge.config import MergeConfig
from ..releases import CACHE_NAME
from .masks import Masks, additive_mask
from .merging import CallPlan
from .placeholders import PromptImages
from .positions import Calibration, as_model_positions, extended, later_positions
from .prompt import CompactPrompt

# The attribute of a cache that holds its `CachedImages`.
CACHED_IMAGES = "_pitome_images"


def cached_length(cache: Any) -> int:
    """Tokens in a cache of any kind, 0 for none."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


@dataclass(frozen=True, eq=False)
class CachedImages:
    """What a cache remembers about the merged images in it.

    Attributes:
        config: the merge options they were merged with.
        tokens_out: visual tokens per image (or tile) by those options (the most, where images
            differ).
        images: every image that is in it.
        calibration: what the language model was told when the keys were computed.
        sizes: [B, S] float32, patches that every column of the prompt stands for.
        positions: [B, S] (or [B, S, D]) float32 of the prompt's columns; None for the model's own.
        last: [B] the position at the prompt's end; None for that of its last column.
        masks: see `masks.Masks`.
        removed: columns by which the conversation in the cache got shorter.
        prompt: what this was copied from for beams and samples; None where it was not.
    """

    config: MergeConfig
    tokens_out: int
    images: PromptImages
    calibration: Calibration
    sizes: Tensor
    positions: Tensor | None
    masks: Masks
    last: Tensor | None = None
    removed: int = 0
    prompt: CachedImages | None = None

    @functools.cached_property
    def bias(self) -> Tensor:
        """[B, S] float32 log(size), once for all decoded tokens."""
        return self.sizes.log()

    @classmethod
    def of(cls, plan: CallPlan, prompt: CompactPrompt) -> CachedImages:
        """What a cache that holds one prompt remembers."""
        return cls(
            config=plan.config,
            tokens_out=plan.schedule.tokens_out,
            images=prompt.images,
            calibration=plan.calibration,
            sizes=prompt.sizes,
            positions=prompt.position_ids,
            last=prompt.last_position,
            masks=plan.masks(),
            removed=prompt.compaction.removed,
        )

    @classmethod
    def of_sizes(cls, plan: CallPlan, sizes: Tensor, position_ids: Tensor | None) -> CachedImages:
        """What a cache remembers of a prompt that `compact_inputs` made.

        Args:
            plan: of this call.
            sizes: [B, S] float32.
            position_ids: [B, S] or [D, B, S], as a model takes them.
        """
        if position_ids is not None and position_ids.dim() == 3:
            position_ids = position_ids.permute(1, 2, 0)
        return cls(
            config=plan.config,
            tokens_out=plan.schedule.tokens_out,
            images=PromptImages([], len(sizes)),
            calibration=plan.calibration,
            sizes=sizes,
            positions=position_ids,
            masks=plan.masks(),
        )

    def copied(self, rows: int) -> CachedImages:
        """The same after `generate` copied every row, so that there are `rows` of them."""
        copies = rows // len(self.sizes)
        if copies < 2:
            return self
        places = self.positions
        return dataclasses.replace(
            self,
            sizes=self.sizes.repeat_interleave(copies, 0),
            last=None if self.last is None else self.last.repeat_interleave(copies, 0),
            positions=None if places is None else places.repeat_interleave(copies, 0),
            prompt=self,
        )

    def step(self, inputs: dict[str, Any], mask: Tensor | None, dtype: torch.dtype) -> None:
        """Put positions and mask of merged tokens into the inputs of one step of `generate`.

        This runs for every decoded token.

        Args:
            inputs: what the model's own preparation returned; changed.
            mask: [B, T] over everything up to now, None for no padding.
            dtype: of the attention logits.
        """
        embeds, cache = inputs.get("inputs_embeds"), inputs.get(CACHE_NAME)
        query = inputs["input_ids"] if embeds is None else embeds
        queries = query.shape[1]
        if mask is not None:
            total = mask.shape[1]
        else:
            total = queries + (0 if cache is None else int(cache.get_seq_length()))
        if self.positions is not None:
            places = later_positions(self.positions, mask, total, self.last, queries)
            inputs["position_ids"] = places if places.dim() < 3 else places.permute(2, 0, 1)
        if self.calibration.carrier == "channels":
            inputs[KEY_SIZES] = KeySizes(self.sizes if self.calibration.size_bias else None, total)
        elif self.calibration.size_bias:
            inputs["attention_mask"] = additive_mask(
                self.masks,
                self.bias,
                batch=query.shape[0],
                queries=queries,
                dtype=dtype if embeds is None else embeds.dtype,
                device=query.device,
                # With two axes: a mask made for a compiled step knows nothing of sizes.
                attention_mask=mask,
                cache=cache,
                token_types=inputs,
            )


def mark_cache(cache: Any, images: CachedImages) -> None:
    """Remember in a cache what images are in it."""
    if isinstance(cache, Cache):
        setattr(cache, CACHED_IMAGES, images)


def cached_images(cache: Any) -> CachedImages | None:
    """What `mark_cache` wrote, None for a cache without merged images."""
    return getattr(cache, CACHED_IMAGES, None) if isinstance(cache, Cache) else None


def first_position(cache: Any, mask: Any, device: torch.device) -> Tensor | None:
    """[B] or [1] position of the first column after a cache; None for an empty one.

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
        if images.last is not None and cached == images.positions.shape[1]:
            return images.last + 1
        last = later_positions(images.positions, past, cached, images.last)[:, -1].float()
        return (last.amax(-1) if last.dim() == 2 else last) + 1
    if past is not None:
        return past.sum(1).float()
    return torch.full((1,), float(cached), device=device)


def with_prompt_images(cache: Any, plan: CallPlan, prompt: CompactPrompt) -> CachedImages:
    """What a cache remembers once a prompt is in it too."""
    new, cached, images = CachedImages.of(plan, prompt), cached_length(cache), cached_images(cache)
    if not cached:
        return new
    sizes, positions, rows = new.sizes, new.positions, len(new.sizes)
    before = torch.ones(rows, cached, device=sizes.device)
    found = new.images
    if images is not None:
        before = extended(images.sizes, cached, 1.0)
        found = images.images.copied(rows).followed_by(found)
        new = dataclasses.replace(new, removed=new.removed + images.removed)
    if positions is not None:
        past = torch.arange(cached, device=sizes.device).expand(rows, cached)
        if images is not None and images.positions is not None:
            past = later_positions(images.positions, None, cached, images.last)
        if positions.dim() > past.dim():
            past = past[..., None].expand(-1, -1, positions.shape[-1])
        positions = torch.cat([past.to(positions.dtype), positions], 1)
    sizes = torch.cat([before, sizes], 1)
    return dataclasses.replace(new, images=found, sizes=sizes, positions=positions)


def continued(model: Any, call: dict[str, Any], images: CachedImages) -> dict[str, Any]:
    """Arguments of one forward pass on a cache with merged images.

    Positions count on in the unreduced layout. A mask that has its four axes already is left as
    it is, with positions: then it is `generate`'s or made by somebody who knows them.

    Args:
        model: the wrapped model itself.
        call: arguments without images.
        images: what the cache remembers.

    Raises:
        ValueError: the cache has other rows than the new inputs, or a mask of four axes comes
            without positions.
    """
    if _is_made(call.get("attention_mask")):
        if images.positions is not None and call.get("position_ids") is None:
            raise ValueError(
                "attention_mask must be [batch, tokens] where the cache holds merged images, "
                "because positions and log sizes of merged tokens follow from it; a mask with four "
                "axes needs position_ids and log sizes of its own"
            )
        return call
    query = query_of(call)
    if images.sizes.shape[0] != query.shape[0]:
        raise ValueError(
            f"{CACHE_NAME} holds {images.sizes.shape[0]} rows with merged images, but the new "
            f"inputs have {query.shape[0]}; pass the same rows, or start a new cache"
        )
    if images.positions is not None and call.get("position_ids") is None:
        total = cached_length(call[CACHE_NAME]) + query.shape[1]
        mask = call.get("attention_mask")
        positions = later_positions(images.positions, mask, total, images.last)
        call = call | {"position_ids": as_model_positions(positions[:, -query.shape[1] :])}
    return calibrated(model, call, images.calibration, images.sizes, images.masks)


def calibrated(
    model: Any,
    call: dict[str, Any],
    calibration: Calibration,
    sizes: Tensor,
    masks: Masks,
    packed: Tensor | None = None,
) -> dict[str, Any]:
    """Arguments of one forward pass, with what the language model is told about merged tokens.

    Args:
        model: the wrapped model itself.
        call: arguments without images. A mask that has its four axes already is left as it is.
        calibration: what it is told.
        sizes: [B, S] of the columns from the first cached one on.
        masks: see `masks.Masks`.
        packed: [B, Q] integer positions that restart where samples share a row.
    """
    mask, cache = call.get("attention_mask"), call.get(CACHE_NAME)
    if _is_made(mask) or not calibration.is_active:
        return call
    query = query_of(call)
    if calibration.carrier == "channels":
        total = cached_length(cache) + query.shape[1]
        return call | {KEY_SIZES: KeySizes(sizes if calibration.size_bias else None, total, packed)}
    if not calibration.size_bias and packed is None:
        if mask is None:
            # Without a mask, positions that do not rise by one would read as packed samples.
            width = cached_length(cache) + query.shape[1]
            mask = torch.ones(len(query), width, dtype=torch.long, device=query.device)
        return call | {"attention_mask": mask}
    weight: Tensor = model.get_input_embeddings().weight
    floats = additive_mask(
        masks,
        sizes.log() if calibration.size_bias else None,
        batch=query.shape[0],
        queries=query.shape[1],
        dtype=query.dtype if query.is_floating_point() else weight.dtype,
        device=query.device,
        attention_mask=mask,
        cache=cache,
        packed_positions=packed,
        token_types=call,
    )
    return call | {"attention_mask": floats}


def _is_made(mask: Any) -> bool:
    """Whether a mask is what attention layers read, and not one number per token."""
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)


def query_of(call: dict[str, Any]) -> Tensor:
    """The new columns of a call: embeddings [B, Q, C] or ids [B, Q]."""
    embeds = call.get("inputs_embeds")
    found: Tensor = call["input_ids"] if embeds is None else embeds
    return found
