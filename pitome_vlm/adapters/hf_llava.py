"""Hugging Face LLaVA and ViP-LLaVA: where tower and projector are and how features are read.

Knows: `vision_feature_layer`, the select strategy, the projector. Does not know: algorithms,
prompts, or how a layer merges (`tower.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..merge_pass import MergePass, VisualTokens
from ..schedule import TowerShape
from .parts import ModelParts
from .tower import (
    encoding,
    feature_depth,
    find_encoder_layers,
    has_class_token,
    install_tower,
    patch_grid,
    uninstall_tower,
)

MODEL_TYPES = ("llava", "vipllava")
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
STRATEGIES = ("default", "full")
VARIABLE_GRID = ("pixtral",)


class HFLlavaAdapter:
    """LlavaForConditionalGeneration and VipLlavaForConditionalGeneration."""

    name = " | ".join(MODEL_TYPES)
    calls = "transformers"

    def matches(self, model: Any) -> bool:
        """By model type and parts, not by class path, which differs between releases."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        core = getattr(model, "model", None)
        return model_type in MODEL_TYPES and all(hasattr(core, part) for part in PARTS)

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """See `Adapter`; `feature_options` may override `vision_feature_layer` and strategy.

        Raises:
            TypeError: the tower's number of patches depends on the picture.
            ValueError: unknown select strategy, or a feature layer outside of the tower.
        """
        layer, strategy = self._features(model, feature_options)
        vision, tower = model.config.vision_config, model.model.vision_tower
        if vision.model_type in VARIABLE_GRID:
            raise TypeError(
                f"a {vision.model_type} vision tower is not supported yet: its number of patches "
                "depends on the picture, so no count can be promised"
            )
        grid = patch_grid(vision)
        patches = grid[0] * grid[1]
        class_tokens = int(has_class_token(tower))
        # "default" cuts off the first token whatever it is; on a tower without a class token that
        # is the first patch, which then must not be merged into anything that stays.
        n_leading = max(class_tokens, int(strategy == "default"))
        return TowerShape(
            n_tokens=patches + class_tokens - n_leading,
            n_leading=n_leading,
            leading_kept=n_leading if strategy == "full" else 0,
            n_layers=vision.num_hidden_layers,
            used_layers=max(feature_depth(layer, vision.num_hidden_layers)),
            grid=grid if n_leading == class_tokens else None,
        )

    def install(self, model: Any, *, inside_tower: bool) -> None:
        """Swap the classes of the tower's layers.

        An unknown tower is an error where it has to merge. Where merging happens behind it the
        tower is left alone.
        """
        try:
            find_encoder_layers(model.model.vision_tower)
        except TypeError:
            if inside_tower:
                raise
            return
        install_tower(model.model.vision_tower)

    def uninstall(self, model: Any) -> None:
        """Give the tower its own classes back."""
        uninstall_tower(model.model.vision_tower)

    def encode_images(
        self, model: Any, pixel_values: Tensor, merge_pass: MergePass, **feature_options: Any
    ) -> VisualTokens:
        """`get_image_features` of the model itself, with merging in its two places.

        Args:
            model: an installed model.
            pixel_values: [images, 3, H, W].
            merge_pass: a fresh pass; holds the plans afterwards.
            **feature_options: `vision_feature_layer`, `vision_feature_select_strategy`.
        """
        layer, strategy = self._features(model, feature_options)
        core = model.model
        with encoding(core.vision_tower, merge_pass):
            outputs = core.vision_tower(pixel_values, output_hidden_states=True)
        states = outputs.hidden_states
        depths = feature_depth(layer, len(states) - 1)
        # Features of several depths are concatenated per token: the shallower ones have to go
        # through the merges that were made behind them.
        carried = [merge_pass.carry(states[depth], depth) for depth in depths]
        if strategy == "default":
            carried = [state[:, 1:] for state in carried]
        joined = torch.cat(carried, dim=-1)
        _check_count(joined.shape[1], merge_pass.schedule.tower_out)
        features = merge_pass.merge_features(joined)
        counts = [len(feature) for feature in features]
        # Projectors work token by token: images of different length go through as one row.
        same = len(set(counts)) == 1
        batch = torch.stack(features) if same else torch.cat(features)[None]
        projected = core.multi_modal_projector(batch)
        _check_count(projected.shape[1], batch.shape[1])
        images, device = len(features), projected.device
        return VisualTokens(
            list(projected) if same else list(torch.split(projected[0], counts)),
            merge_pass.source_maps(images, device),
            [merge_pass.schedule.tokens_in] * images,
            merge_pass.anchors(images, device),
        )

    def text_config(self, model: Any) -> Any:
        """Configuration of the language model, the object its attention layers read."""
        return model.model.language_model.config

    def parts(self, model: Any) -> ModelParts:
        """See `Adapter`."""
        core = model.model
        return ModelParts(
            core.vision_tower,
            model.config.vision_config,
            core.multi_modal_projector,
            (core.language_model,),
        )

    def _features(self, model: Any, options: dict[str, Any]) -> tuple[int | list[int], str]:
        config = model.config
        layer = options.get("vision_feature_layer")
        for name in ("vision_feature_layer", "vision_feature_layers"):
            layer = getattr(config, name, None) if layer is None else layer
        if layer is None:
            raise ValueError("the model's config names no vision_feature_layer")
        strategy = options.get("vision_feature_select_strategy")
        if strategy is None:
            # ViP-LLaVA has no such option: it always drops the first token.
            strategy = getattr(config, "vision_feature_select_strategy", None) or "default"
        if strategy not in STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy must be one of {', '.join(STRATEGIES)}, "
                f"got {strategy!r}"
            )
        return (layer if isinstance(layer, int) else list(layer)), strategy


def _check_count(found: int, scheduled: int) -> None:
    if found != scheduled:
        raise RuntimeError(
            f"the vision tower gave {found} visual tokens per image where {scheduled} were "
            "scheduled; pixel_values of another size, or a module that hides the tower, are the "
            "usual reasons"
        )
