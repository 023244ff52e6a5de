"""What the first token of a prompt costs: FLOPs and KV cache, from shapes and a schedule alone.

Nothing is run; the formulas are in `flops.py`. An image that is cut into tiles costs the tower as
often as it has tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import find_adapter
from ..adapters.wide_attention import head_dims
from ..common import whole_number
from ..merge.config import MergeConfig
from ..merge.counts import Footprint, count_tokens
from ..merge.schedule import Schedule
from ..merge.size_channels import channel_width
from ..releases import layer_configs
from ..wrapping.encode import planned, planned_schedule
from ..wrapping.wrap import base_model, is_wrapped, merge_config, schedule_of
from .flops import projector_flops, tower_flops
from .language_flops import layers_without_attention, prefill_flops
from .sizes import pieces_of


@dataclass(frozen=True)
class Costs:
    """Cost of the first token of one prompt at batch size one.

    Attributes:
        images: number of images in the prompt.
        text_tokens: tokens of the prompt other than visual tokens.
        visual_tokens: tokens per image that reach the language model.
        layer_flops: FLOPs of every tower layer that is run, for one image (all its tiles).
        tower_flops: patch embedding, layers and (SigLIP) pooling head, for all images.
        projector_flops: merging before or after the projector and the projector, for all images.
        merge_flops: the part of `tower_flops` and `projector_flops` that merging adds:
            comparing tokens, ranking them by attention.
        prefill_flops: the language model over the whole prompt, logits of one position.
        kv_bytes_per_image: bytes of KV cache that the visual tokens of one image take.
        kv_bytes: bytes of KV cache after the prompt.
        kv_dtype: dtype of the KV cache, for instance "bfloat16".
    """

    images: int
    text_tokens: int
    visual_tokens: int
    layer_flops: tuple[int, ...]
    tower_flops: int
    projector_flops: int
    merge_flops: int
    prefill_flops: int
    kv_bytes_per_image: int
    kv_bytes: int
    kv_dtype: str

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the language model prefills."""
        return self.text_tokens + self.images * self.visual_tokens

    @property
    def total_flops(self) -> int:
        """FLOPs of everything before the first token: tower, projector and prefill."""
        return self.tower_flops + self.projector_flops + self.prefill_flops


def costs(
    model: nn.Module,
    schedule: Schedule | None = None,
    text_tokens: int = 64,
    images: int = 1,
    dtype: torch.dtype | None = None,
    *,
    config: MergeConfig | None = None,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
    image_processor: Any = None,
) -> Costs:
    """Costs of one prompt; nothing is run.

    Args:
        model: a LLaVA, wrapped or not; it may be on the meta device or inside a `PeftModel`.
        schedule: token counts; None takes those in force (no merging on an unwrapped model).
        text_tokens: tokens of the prompt other than visual tokens, >= 0.
        images: number of images in the prompt, >= 0.
        dtype: dtype of the KV cache; None takes that of the embeddings.
        config: the options that `schedule` was made with (algorithm, metric and placement change
            what a merge costs); None takes those in force, else the defaults.
        image_size: (height, width) of every image in pixels, None for a typical image; models
            that resize every image to one size ignore it.
        frames: the prompt shows videos of so many frames instead of images.
        image_processor: is asked how many tokens an image of that size has (`pieces_of`).

    Raises:
        TypeError: not a supported model, or a count that is no whole number.
        ValueError: a negative number of text tokens or images.
    """
    whole_number("text_tokens", text_tokens, 0)
    whole_number("images", images, 0)
    base: Any = base_model(model)
    if find_adapter(base).calls == "encoder":
        raise TypeError(
            f"{type(base).__name__} is an encoder on its own and prefills nothing; its costs are "
            "in pitome_vlm.describe(model)"
        )
    pieces = pieces_of(base, image_size=image_size, frames=frames, image_processor=image_processor)
    if config is None:
        config = merge_config(model) if is_wrapped(model) else MergeConfig(keep=1.0)
    if schedule is None:
        schedule = schedule_of(model) if is_wrapped(model) else planned_schedule(model, config)
    towers = [_tower(base, schedule, config, piece) for piece in pieces]
    projectors = [projector_flops(base, schedule, config, piece) for piece in pieces]
    layers = tuple(sum(own) for own in zip(*(layers for layers, _, _ in towers), strict=True))
    around = sum(one for _, one, _ in towers)
    tower_merging = sum(one for _, _, one in towers)
    projector, projector_merging = (sum(column) for column in zip(*projectors, strict=True))
    joined = config.frames_together
    visual = sum(
        count_tokens(schedule, config.budget, piece, frames_together=joined).out for piece in pieces
    )
    per_token = kv_bytes_per_token(base, dtype, None if schedule.is_identity else config)
    prompt = text_tokens + images * visual
    return Costs(
        images=images,
        text_tokens=text_tokens,
        visual_tokens=visual,
        layer_flops=layers,
        tower_flops=images * (sum(layers) + around),
        projector_flops=images * projector,
        merge_flops=images * (tower_merging + projector_merging),
        prefill_flops=prefill_flops(base, prompt),
        kv_bytes_per_image=visual * per_token,
        kv_bytes=prompt * per_token,
        kv_dtype=str(kv_dtype(base, dtype)).removeprefix("torch."),
    )


def _tower(
    base: Any, schedule: Schedule, config: MergeConfig, piece: Footprint
) -> tuple[tuple[int, ...], int, int]:
    """`tower_flops` of all tiles of a piece."""
    layers, around, merging = tower_flops(base, schedule, config, piece)
    return tuple(piece.tiles * one for one in layers), piece.tiles * around, piece.tiles * merging


def kv_bytes_per_token(
    base: Any, dtype: torch.dtype | None = None, config: MergeConfig | None = None
) -> int:
    """Bytes of KV cache per token: layers x 2 x kv_heads x head_dim x bytes per element.

    Layers without attention hold nothing per token; compressed keys and values (MLA) are held once.
    """
    text, itemsize = base.config.get_text_config(), kv_dtype(base, dtype).itemsize
    # The last layers may read what earlier ones cached.
    own = int(text.num_hidden_layers) - (getattr(text, "num_kv_shared_layers", None) or 0)
    without = {number for number, _ in layers_without_attention(text)}
    cached = [number for number in range(own) if number not in without]
    compressed = getattr(text, "kv_lora_rank", None)
    if compressed is not None:
        return int(len(cached) * (compressed + text.qk_rope_head_dim) * itemsize)
    layers, widths = layer_configs(text), head_dims(text)
    if config is not None:
        told = planned(base, config).calibration
        if told.size_bias and told.carrier == "channels":
            widths = [channel_width(width) for width in widths]
    return int(sum(2 * _kv_heads(layers[n]) * widths[n] for n in cached) * itemsize)


def _kv_heads(layer: Any) -> int:
    return int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)


def kv_dtype(base: Any, dtype: torch.dtype | None = None) -> torch.dtype:
    """The given dtype, else that of the embeddings, which the cache has in quantised models too."""
    found: torch.dtype = dtype or base.get_input_embeddings().weight.dtype
    return found
