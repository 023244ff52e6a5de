"""Faster multimodal models: visual tokens are merged before the language model sees them.

    import pitome_vlm
    model = pitome_vlm.wrap(model, keep=0.25)

Only names; importing this module reads no configuration and touches no device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .common import __version__, lazy_names
from .merge.config import MergeConfig

if TYPE_CHECKING:
    from .loading import load
    from .measure import describe
    from .wrapping import (
        ImageCache,
        compact_inputs,
        encode_images,
        encode_videos,
        unwrap,
        wrap,
        wrapped,
    )

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

_WRAPPING = ("ImageCache", "compact_inputs", "encode_images", "encode_videos")
_load = lazy_names(
    __name__,
    dict.fromkeys((*_WRAPPING, "unwrap", "wrap", "wrapped"), "wrapping")
    | {"describe": "measure", "load": "loading"},
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        # First, because an old transformers would fail with an ImportError about some name.
        from . import releases  # noqa: F401
    return _load(name)


def __dir__() -> list[str]:
    return sorted(__all__)
