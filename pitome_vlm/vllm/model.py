"""vLLM's LLaVA with merged visual tokens: the model class and how its prompts are counted.

Only the methods of vLLM's LLaVA that have to differ. Projector, language model, caches and
scheduling are vLLM's own; how a tower merges is in `tower.py`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..merge.tokens import VisualTokens
from .calibration import Calibration, with_numbers
from .options import PlannedServing, plan_serving
from .tower import encode

_TOWER_PREFIXES = ("model.vision_tower.", "vision_tower.")


class PiToMeLlavaProcessingInfo(LlavaProcessingInfo):
    """Counts merged tokens: placeholders, encoder budget and profiling all ask here."""

    @functools.cached_property
    def plan(self) -> PlannedServing:
        """What is merged."""
        return plan_serving(self.get_hf_config())

    @override
    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Visual tokens of one image that reach the language model.

        Raises:
            ValueError: the schedule does not start from the number of tokens that vLLM makes.
        """
        whole = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        schedule = self.plan.schedule
        if whole != schedule.tokens_in:
            raise ValueError(
                f"vLLM makes {whole} visual tokens of an image where {schedule.tokens_in} were "
                "expected; the model's config.json does not fit its processor"
            )
        return schedule.tokens_out


class PiToMeLlavaMultiModalProcessor(LlavaMultiModalProcessor):
    """Adds the merge options to the names under which images are cached.

    vLLM names an image after its content and the processor's options. Caches that outlive a server
    (shared encoder or KV stores) would hand features of one budget to a server with another.
    """

    @override
    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        # Every release asks the inputs for their names.
        salted = copy.copy(inputs)
        salted.get_mm_hashes = functools.partial(
            _salted_names, inputs.get_mm_hashes, self.info.plan.salt
        )
        return super().apply(salted, timing_ctx)


def _salted_names(names_of: Callable[..., Any], salt: str, *args: Any, **options: Any) -> Any:
    return {
        modality: [
            None if name is None else hashlib.sha256(f"{name}/{salt}".encode()).hexdigest()
            for name in names
        ]
        for modality, names in names_of(*args, **options).items()
    }


# Without a registration of its own the subclass would inherit one that counts unmerged tokens.
@MULTIMODAL_REGISTRY.register_processor(
    PiToMeLlavaMultiModalProcessor,
    info=PiToMeLlavaProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PiToMeLlavaForConditionalGeneration(LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA whose visual tokens are merged in the tower and before the projector.

    `SupportsMRoPE` is how a model of vLLM gives its tokens positions; they are asked for where
    `startup.py` marked the model's config.
    """

    # vLLM would hand the LoRA layers of tower and projector only as many tokens as come out.
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        # Before weights are allocated, so that a refusal costs nothing.
        plan = plan_serving(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._plan = plan
        self.calibration = None
        if plan.is_calibrated:
            self.calibration = Calibration(plan, self.language_model, vllm_config)

    @override
    def _process_image_input(self, image_input: Any) -> Any:
        if self._plan.schedule.is_identity or image_input["type"] == "image_embeds":
            return super()._process_image_input(image_input)
        strategy = self.config.vision_feature_select_strategy
        pixels = image_input["pixel_values"]
        features, merge_pass = encode(self.vision_tower, pixels, self._plan, strategy)
        projected = self.multi_modal_projector(features)
        if self.calibration is None:
            return projected
        count, device = len(projected), projected.device
        visual = VisualTokens(
            features=list(projected),
            source_maps=merge_pass.source_maps(count, device),
            full_counts=[self._plan.schedule.tokens_in] * count,
            anchors=merge_pass.anchors(count, device),
        )
        return with_numbers(projected, visual, self._plan.config.positions)

    @override
    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Where every token of a prompt would be without merging; of an image its first place.

        Returns:
            [3, prompt] int64, three equal rows, and what later tokens are moved by.
        """
        positions, moved = torch.arange(len(input_tokens)), 0
        for image in sorted(mm_features, key=lambda one: one.mm_position.offset):
            start = image.mm_position.offset
            end = start + image.mm_position.length
            positions[start:end] = start + moved
            moved += self._plan.schedule.tokens_in - image.mm_position.length
            positions[end:] = torch.arange(end, len(input_tokens)) + moved
        return positions.expand(3, -1).contiguous(), moved

    @override
    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        if self.calibration is not None:
            count = len(input_ids)
            multimodal_embeddings = self.calibration.cut(
                count, multimodal_embeddings, is_multimodal
            )
        embedded: Tensor = super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    @override
    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.calibration is not None:
            positions = self.calibration.prepare(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    @override
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights with the names of published checkpoints or of transformers 5."""
        loaded: set[str] = super().load_weights(_published_names(weights))
        return loaded


def _published_names(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Towers saved by transformers 5 lack the level `vision_model`, which vLLM expects."""
    for name, weight in weights:
        for prefix in _TOWER_PREFIXES:
            rest = name.removeprefix(prefix)
            if rest != name and not rest.startswith("vision_model."):
                name = f"{prefix}vision_model.{rest}"
                break
        yield name, weight
