"""vLLM's LLaVA with merged visual tokens.

Only what has to differ. Projector, language model, caches and scheduling are vLLM's own; how a
tower merges is in `tower.py`, what all served models share in `language.py` and `processing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..adapters.features import merged_images
from ..merge.merge_pass import MergePass
from ..merge.tokens import VisualTokens
from .language import Encoder, MergedModel
from .processing import MergedDummies, MergedInfo, MergedProcessor
from .tower import tower_features


class PiToMeLlavaProcessingInfo(MergedInfo, LlavaProcessingInfo):
    """What is merged."""


class PiToMeLlavaDummyInputsBuilder(MergedDummies, LlavaDummyInputsBuilder):
    """Dummy images of the largest budget."""


class PiToMeLlavaMultiModalProcessor(MergedProcessor, LlavaMultiModalProcessor):
    """Counts merged tokens."""


# Without a registration of its own the subclass would inherit one that counts unmerged tokens.
@MULTIMODAL_REGISTRY.register_processor(
    PiToMeLlavaMultiModalProcessor,
    info=PiToMeLlavaProcessingInfo,
    dummy_inputs=PiToMeLlavaDummyInputsBuilder,
)
class PiToMeLlavaForConditionalGeneration(
    MergedModel, LlavaForConditionalGeneration, SupportsMRoPE
):
    """LLaVA whose visual tokens are merged in the tower and before the projector."""

    @override
    def encoders(self) -> Mapping[str, Encoder]:
        return {"pixel_values": self._images}

    def _images(self, inputs: dict[str, Any], merge_pass: MergePass) -> VisualTokens:
        pixels = self._parse_and_validate_image_input(**inputs)["pixel_values"]
        strategy = self.config.vision_feature_select_strategy
        features = tower_features(self.vision_tower, pixels, merge_pass, strategy)
        return merged_images(features, self.multi_modal_projector, merge_pass)
