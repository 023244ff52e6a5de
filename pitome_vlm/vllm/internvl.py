"""vLLM's InternVL (in the format of transformers) with merged visual tokens.

vLLM serves it with its class of Intern-S1, which has the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor
from typing_extensions import override
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..merge.merge_pass import MergePass
from ..merge.tiles import PackedItem
from .pooled import PooledModel, PooledProcessor
from .processing import MergedDummies, MergedInfo
from .tower import intern_states


class PiToMeInternVLProcessingInfo(MergedInfo, InternS1ProcessingInfo):
    """What is merged."""


class PiToMeInternVLDummyInputsBuilder(MergedDummies, InternS1DummyInputsBuilder):
    """Dummy images and videos of the largest budget."""


class PiToMeInternVLMultiModalProcessor(PooledProcessor, InternS1MultiModalProcessor):
    """Counts merged tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeInternVLMultiModalProcessor,
    info=PiToMeInternVLProcessingInfo,
    dummy_inputs=PiToMeInternVLDummyInputsBuilder,
)
class PiToMeInternVLForConditionalGeneration(
    PooledModel, InternS1ForConditionalGeneration, SupportsMRoPE
):
    """InternVL whose visual tokens are merged in the tower, and after the projector."""

    tiles: ClassVar = {
        "pixel_values": "image_num_patches",
        "pixel_values_videos": "video_num_patches",
    }

    @override
    def projected(
        self, pixels: Tensor, merge_pass: MergePass, items: Sequence[PackedItem]
    ) -> Tensor:
        states = intern_states(self.vision_tower, pixels, merge_pass, items)
        # vLLM's own function, told what the tower returns.
        stand_in = SimpleNamespace(
            vision_tower=lambda **_: states,
            pixel_shuffle=self.pixel_shuffle,
            downsample_ratio=self.downsample_ratio,
            multi_modal_projector=self.multi_modal_projector,
        )
        features: Tensor = InternS1ForConditionalGeneration.extract_feature(stand_in, pixels)
        return features
