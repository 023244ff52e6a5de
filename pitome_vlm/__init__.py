"""Faster LLaVA-style models: visual tokens are merged before the language model sees them.

    import pitome_vlm
    model = pitome_vlm.wrap(model, keep=0.25)

Only names; importing this module reads no configuration and touches no device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import MergeConfig
from .version import __version__

if TYPE_CHECKING:
    from .description import describe
    from .image_cache import ImageCache
    from .loading import load
    from .wrapper import compact_inputs, encode_images, encode_videos, unwrap, wrap, wrapped

__all__ = [
    "ImageCache",
    "MergeConfig",
    "__version__",
    "compact_inputs",
    "describe",
    "encode_images",
    "encode_videos",
    "load",
    "unwrap",
    "wrap",
    "wrapped",
]

# Loaded on first use, so that `pitome-vlm --help` does not wait for torch.
_LAZY = {
    "ImageCache": "image_cache",
    "compact_inputs": "wrapper",
    "describe": "description",
    "encode_images": "wrapper",
    "encode_videos": "wrapper",
    "load": "loading",
    "unwrap": "wrapper",
    "wrap": "wrapper",
    "wrapped": "wrapper",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from .requirements import check_transformers

    check_transformers()
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
