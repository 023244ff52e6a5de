"""vLLM's Gemma 3 with merged visual tokens.

Tokens of an image see each other where vLLM's attention can do that (on GPUs); which they are
follows from the merged prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..merge.merge_pass import MergePass
from ..merge.tiles import PackedItem
from .pooled import PooledModel, PooledProcessor
from .processing import MergedDummies, MergedInfo
from .tower import siglip_states


class PiToMeGemma3ProcessingInfo(MergedInfo, Gemma3ProcessingInfo):
    """What is merged."""


class PiToMeGemma3DummyInputsBuilder(MergedDummies, Gemma3DummyInputsBuilder):
    """Dummy images of the largest budget."""


class PiToMeGemma3MultiModalProcessor(PooledProcessor, Gemma3MultiModalProcessor):
    """Counts merged tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeGemma3MultiModalProcessor,
    info=PiToMeGemma3ProcessingInfo,
    dummy_inputs=PiToMeGemma3DummyInputsBuilder,
)
class PiToMeGemma3ForConditionalGeneration(
    PooledModel, Gemma3ForConditionalGeneration, SupportsMRoPE
):
    """Gemma 3 whose visual tokens are merged in the tower, and after the projector."""

    tiles: ClassVar = {"pixel_values": "num_patches"}

    @override
    def projected(
        self, pixels: Tensor, merge_pass: MergePass, items: Sequence[PackedItem]
    ) -> Tensor:
        states = siglip_states(self.vision_tower, pixels, merge_pass, items)
        features: Tensor = self.multi_modal_projector(states)
        return features
