"""Qwen2-VL and Qwen2.5-VL: a record like others, on releases of transformers before 5.18 too.

Their features are put into the prompt by us, because earlier releases take none from outside.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from .families import PATCH_GRIDS, ROPE, merge_size, merged_patches, merged_pixels
from .family import Family, patch_grids, rounded
from .generic import GenericAdapter

QWEN_VL = Family(
    ("qwen2_5_vl", "qwen2_vl"),
    patch_grids(merge_size),
    rounded(merged_pixels),
    PATCH_GRIDS,
    ROPE,
    patches=merged_patches,
    tower="units",
)


class QwenVLAdapter(GenericAdapter):
    """Qwen2VLForConditionalGeneration and Qwen2_5_VLForConditionalGeneration."""

    own_scatter = False

    def __init__(self) -> None:
        super().__init__(QWEN_VL)

    @override
    def matches(self, model: Any) -> bool:
        return super().matches(model) and hasattr(model.model, "get_rope_index")

    @override
    def text_config(self, model: Any) -> Any:
        return model.model.language_model.config

    @override
    def opening_token(self, model: Any) -> int | None:
        # Releases of transformers before 5 look for it to find the images.
        return int(model.config.vision_start_token_id)
