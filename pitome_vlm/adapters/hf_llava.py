"""Hugging Face LLaVA and ViP-LLaVA: one vision tower, all images resized to one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tokens import Encoded
from .base import Adapter
from .features import (
    FEATURE_OPTIONS,
    checked_pixels,
    feature_choice,
    merged_images,
    read_features,
    shape_of_tower,
)
from .parts import ModelParts


class HFLlavaAdapter(Adapter):
    """LlavaForConditionalGeneration and VipLlavaForConditionalGeneration.

    Inputs: `pixel_values` [images, 3, height, width].
    """

    model_types: tuple[str, ...] = ("llava", "vipllava")
    part_names: Mapping[str, str] = {
        "vision_tower": "vision_tower",
        "projector": "multi_modal_projector",
        "language_model": "language_model",
    }
    vision_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")
    feature_options: tuple[str, ...] = FEATURE_OPTIONS

    @override
    def parts(self, model: Any) -> ModelParts:
        core, names = model.model, self.part_names
        return ModelParts(
            getattr(core, names["vision_tower"]),
            model.config.vision_config,
            getattr(core, names["projector"]),
            (getattr(core, names["language_model"]),),
        )

    @override
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        choice, parts = feature_choice(model.config, feature_options), self.parts(model)
        return shape_of_tower(parts.vision_tower, parts.vision_config, choice)

    @override
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        shape = self.tower_shape(model, **options)
        return Footprint(shape.n_tokens + shape.leading_kept)

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        if inputs.get("pixel_values") is None:
            return {}
        pixels = checked_pixels(inputs["pixel_values"], "[images, 3, height, width]", (4,))
        return {"image": [self.footprint(model, **self.options_of(inputs))] * len(pixels)}

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        pixels = checked_pixels(inputs["pixel_values"], "[images, 3, height, width]", (4,))
        choice, parts = feature_choice(model.config, inputs), self.parts(model)
        features = read_features(parts.vision_tower, pixels, merge_pass, choice)
        visual = merged_images(features, parts.projector, merge_pass)
        return [Encoded("image", self.placeholder_ids(model)["image"], visual)]

    @override
    def looked_at(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        if inputs.get("pixel_values") is None:
            return {}
        pixels = checked_pixels(inputs["pixel_values"], "[images, 3, height, width]", (4,))
        return {"image": list(pixels[:, None])}

    @override
    def select(
        self, model: Any, inputs: Mapping[str, Any], kind: str, members: list[int]
    ) -> dict[str, Any]:
        return {**inputs, "pixel_values": inputs["pixel_values"][members]}
