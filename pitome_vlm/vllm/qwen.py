"""vLLM's Qwen-VL models with merged visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grids import GridInfo, GridModel, GridProcessor
from .processing import MergedDummies


class PiToMeQwen2VLProcessingInfo(GridInfo, Qwen2VLProcessingInfo):
    """What is merged."""


class PiToMeQwen2VLDummyInputsBuilder(MergedDummies, Qwen2VLDummyInputsBuilder):
    """Dummy images of the largest budget."""


class PiToMeQwen2VLMultiModalProcessor(GridProcessor, Qwen2VLMultiModalProcessor):
    """Counts merged tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeQwen2VLMultiModalProcessor,
    info=PiToMeQwen2VLProcessingInfo,
    dummy_inputs=PiToMeQwen2VLDummyInputsBuilder,
)
class PiToMeQwen2VLForConditionalGeneration(GridModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL whose visual tokens are merged in the tower and after the patch merger."""


class PiToMeQwen2_5_VLProcessingInfo(GridInfo, Qwen2_5_VLProcessingInfo):
    """What is merged."""


class PiToMeQwen2_5_VLDummyInputsBuilder(MergedDummies, Qwen2_5_VLDummyInputsBuilder):
    """Dummy images of the largest budget."""


class PiToMeQwen2_5_VLMultiModalProcessor(GridProcessor, Qwen2_5_VLMultiModalProcessor):
    """Counts merged tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeQwen2_5_VLMultiModalProcessor,
    info=PiToMeQwen2_5_VLProcessingInfo,
    dummy_inputs=PiToMeQwen2_5_VLDummyInputsBuilder,
)
class PiToMeQwen2_5_VLForConditionalGeneration(GridModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL: units merge within the windows of its tower."""


class PiToMeQwen3VLProcessingInfo(GridInfo, Qwen3VLProcessingInfo):
    """What is merged."""


class PiToMeQwen3VLDummyInputsBuilder(MergedDummies, Qwen3VLDummyInputsBuilder):
    """Dummy images of the largest budget."""


class PiToMeQwen3VLMultiModalProcessor(GridProcessor, Qwen3VLMultiModalProcessor):
    """Counts merged tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeQwen3VLMultiModalProcessor,
    info=PiToMeQwen3VLProcessingInfo,
    dummy_inputs=PiToMeQwen3VLDummyInputsBuilder,
)
class PiToMeQwen3VLForConditionalGeneration(GridModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: features for deeper layers are merged with the same groups."""


class PiToMeQwen3_5ProcessingInfo(GridInfo, Qwen3_5ProcessingInfo):
    """What is merged."""


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeQwen3VLMultiModalProcessor,
    info=PiToMeQwen3_5ProcessingInfo,
    dummy_inputs=PiToMeQwen3VLDummyInputsBuilder,
)
class PiToMeQwen3_5ForConditionalGeneration(GridModel, Qwen3_5ForConditionalGeneration):
    """Qwen3.5: linear attention takes no sizes, in vLLM as in the library."""
