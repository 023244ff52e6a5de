"""Hugging Face LLaVA and ViP-LLaVA: where tower and projector are and how features are read.

Knows: models with one vision tower whose pictures all have one size. Does not know: algorithms,
prompts, or how a layer merges (`tower.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tokens import Encoded, VisualTokens
from .features import (
    FEATURE_OPTIONS,
    check_count,
    checked_pixels,
    feature_choice,
    no_videos,
    read_features,
    shape_of_tower,
    token_id,
)
from .parts import ModelParts
from .tower import find_encoder_layers, install_tower, uninstall_tower
from .usual import UsualModel


class HFLlavaAdapter(UsualModel):
    """LlavaForConditionalGeneration and VipLlavaForConditionalGeneration."""

    model_types: tuple[str, ...] = ("llava", "vipllava")
    # What the parts are called in `model.model`.
    part_names: Mapping[str, str] = {
        "vision_tower": "vision_tower",
        "projector": "multi_modal_projector",
        "language_model": "language_model",
    }
    calls = "transformers"
    counted_per = "image"
    # Pixels of a call and the kind of placeholder they are for.
    pixel_inputs: Mapping[str, str] = {"pixel_values": "image"}
    vision_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")
    feature_options: tuple[str, ...] = FEATURE_OPTIONS
    default_image_size: tuple[int, int] | None = None

    def matches(self, model: Any) -> bool:
        """By model type and parts, not by class path, which differs between releases."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        core = getattr(model, "model", None)
        named = all(hasattr(core, name) for name in self.part_names.values())
        return model_type in self.model_types and named

    def parts(self, model: Any) -> ModelParts:
        """See `Adapter`."""
        core, names = model.model, self.part_names
        return ModelParts(
            getattr(core, names["vision_tower"]),
            model.config.vision_config,
            getattr(core, names["projector"]),
            (getattr(core, names["language_model"]),),
        )

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """See `Adapter`; `feature_options` may override `vision_feature_layer` and strategy.

        Raises:
            TypeError: the tower's number of patches depends on the picture.
            ValueError: unknown select strategy, or a feature layer outside of the tower.
        """
        choice, parts = feature_choice(model.config, feature_options), self.parts(model)
        return shape_of_tower(parts.vision_tower, parts.vision_config, choice)

    def install(self, model: Any, *, inside_tower: bool) -> None:
        """Swap the classes of the tower's layers.

        An unknown tower is an error where it has to merge. Where merging happens behind it the
        tower is left alone.
        """
        towers = self.parts(model).towers
        try:
            for tower in towers:
                find_encoder_layers(tower)
        except TypeError:
            if inside_tower:
                raise
            return
        for tower in towers:
            install_tower(tower)

    def uninstall(self, model: Any) -> None:
        """Give the tower its own classes back."""
        for tower in self.parts(model).towers:
            uninstall_tower(tower)

    def text_config(self, model: Any) -> Any:
        """Configuration of the language model, the object its attention layers read."""
        return getattr(model.model, self.part_names["language_model"]).config

    def placeholder_ids(self, model: Any) -> dict[str, int]:
        """See `Adapter`."""
        return {kind: token_id(model.config, kind) for kind in self.pixel_inputs.values()}

    def footprint(
        self,
        model: Any,
        *,
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        **feature_options: Any,
    ) -> Footprint:
        """See `Adapter`: the processor brings every picture to one size."""
        del image_size
        no_videos(model, frames)
        shape = self.tower_shape(model, **feature_options)
        return Footprint(shape.n_tokens + shape.leading_kept)

    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        """See `Adapter`."""
        if inputs.get("pixel_values") is None:
            return {}
        pixels = checked_pixels(inputs["pixel_values"], "[images, 3, height, width]", (4,))
        options = {name: inputs[name] for name in self.feature_options if name in inputs}
        return {"image": [self.footprint(model, **options)] * len(pixels)}

    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        """`get_image_features` of the model itself, with merging in its two places.

        Args:
            model: an installed model.
            inputs: `pixel_values` [images, 3, H, W] and of `feature_options` what there is.
            merge_pass: a fresh pass; holds the plans afterwards.
        """
        pixels = checked_pixels(inputs["pixel_values"], "[images, 3, height, width]", (4,))
        choice, parts = feature_choice(model.config, inputs), self.parts(model)
        joined = read_features(parts.vision_tower, pixels, merge_pass, choice)
        features = merge_pass.merge_features(joined)
        counts = [len(feature) for feature in features]
        # Projectors work token by token: images of different length go through as one row.
        same = len(set(counts)) == 1
        batch = torch.stack(features) if same else torch.cat(features)[None]
        projected = parts.projector(batch)
        check_count(projected.shape[1], batch.shape[1])
        images, device = len(features), projected.device
        visual = VisualTokens(
            list(projected) if same else list(torch.split(projected[0], counts)),
            merge_pass.source_maps(images, device),
            [merge_pass.schedule.tokens_in] * images,
            merge_pass.anchors(images, device),
        )
        return [Encoded("image", self.placeholder_ids(model)["image"], visual)]
