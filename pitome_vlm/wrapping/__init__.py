"""How a wrapped model runs: prompts, positions, caches, `forward` and `generate`."""

from __future__ import annotations

from .encode import compact_inputs, encode_images, encode_videos
from .image_cache import ImageCache
from .wrap import unwrap, wrap, wrapped

__all__ = [
    "ImageCache",
    "compact_inputs",
    "encode_images",
    "encode_videos",
    "unwrap",
    "wrap",
    "wrapped",
]
