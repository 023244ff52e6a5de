"""The original llava package (haotian-liu/LLaVA, `llava-torch`): where its tower and projector are.

`LlavaLlamaForCausalLM` and its Mistral and MPT siblings are recognised by the parts they have in
common; the package is no dependency. How it lays images out is found out by calling it
(`original_code.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tokens import Encoded
from ..releases import accepted
from .base import Adapter
from .features import check_count, merged_images
from .original_code import PLACEHOLDER, PREPARE, ImageBatch, image_batch
from .parts import ModelParts
from .tower import encoding, uninstall_tower
from .tower_tokens import feature_depth, has_class_token, patch_grid

METHODS = ("get_model", "get_vision_tower", PREPARE)
SELECTIONS = ("patch", "cls_patch")


class OriginalLlavaAdapter(Adapter):
    """LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaMptForCausalLM and their like.

    With mm_patch_merge_type "flat": an image is one tile, and where it is given as several they
    follow each other like images of their own.
    """

    calls = "original"
    pixel_inputs: Mapping[str, str] = {"images": "image"}
    vision_inputs: tuple[str, ...] = ("images", "image_sizes")

    @override
    def matches(self, model: Any) -> bool:
        """By methods and the projector, so that forks and other language models match too."""
        return is_original(model) and not is_spatial(model)

    @override
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        tower = _loaded_tower(model)
        layer, selection = getattr(tower, "select_layer", None), _selection(tower)
        if not isinstance(layer, int):
            raise TypeError(
                f"vision tower {type(tower).__name__} is not supported: looked for select_layer, "
                f"the hidden state that is read, as a number, found {layer!r}"
            )
        vision = tower.config
        grid = patch_grid(vision)
        patches = grid[0] * grid[1]
        if getattr(tower, "num_patches", patches) != patches:
            raise TypeError(
                f"vision tower {type(tower).__name__} is not supported: it makes "
                f"{tower.num_patches} patches where its image has {grid[0]} x {grid[1]}"
            )
        class_tokens = int(has_class_token(tower))
        # "patch" cuts off the first token whatever it is.
        n_leading = max(class_tokens, int(selection == "patch"))
        return TowerShape(
            n_tokens=patches + class_tokens - n_leading,
            n_leading=n_leading,
            leading_kept=n_leading if selection == "cls_patch" else 0,
            n_layers=vision.num_hidden_layers,
            used_layers=max(feature_depth(layer, vision.num_hidden_layers)),
            grid=grid if n_leading == class_tokens else None,
        )

    @override
    def uninstall(self, model: Any) -> None:
        uninstall_tower(model.get_vision_tower())

    @override
    def text_config(self, model: Any) -> Any:
        return model.get_model().config

    @override
    def parts(self, model: Any) -> ModelParts:
        # Tower and projector are modules of the language model here.
        core, tower = model.get_model(), _loaded_tower(model)
        others = (tower, core.mm_projector)
        language = tuple(part for part in core.children() if all(part is not one for one in others))
        # generate asks for the last logits only, if `forward` can be asked for them.
        all_logits = not accepted(model.forward, {"logits_to_keep": 1})
        return ModelParts(tower, tower.config, core.mm_projector, language, all_logits)

    @override
    def placeholder_ids(self, model: Any) -> dict[str, int]:
        """One id per image, whatever its number of tokens."""
        return {"image": PLACEHOLDER}

    def items_of(self, images: ImageBatch) -> list[int]:
        """Which entry of `encode` every tile is a part of: here each is one of its own."""
        return list(range(len(images.pixels)))

    @override
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        shape = self.tower_shape(model)
        return Footprint(shape.n_tokens + shape.leading_kept)

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        if inputs.get("images") is None:
            return {}
        tiles = image_batch(inputs["images"]).tiles
        return {"image": [self.footprint(model)] * sum(tiles)}

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        features = tower_features(model, image_batch(inputs["images"]).pixels, merge_pass)
        projector = model.get_model().mm_projector
        return [Encoded("image", PLACEHOLDER, merged_images(features, projector, merge_pass))]


def is_original(model: Any) -> bool:
    """Whether a model has the methods and the projector of the package's classes."""
    return all(callable(getattr(model, method, None)) for method in METHODS) and hasattr(
        model.get_model(), "mm_projector"
    )


def is_spatial(model: Any) -> bool:
    """Whether tiles are put together on the grid of their image (LLaVA-1.6)."""
    return str(getattr(model.config, "mm_patch_merge_type", "flat")).startswith("spatial")


def _loaded_tower(model: Any) -> Any:
    tower = model.get_vision_tower()
    if tower is None:
        raise ValueError(
            f"{type(model).__name__} has no vision tower: its config names no mm_vision_tower"
        )
    if not getattr(tower, "is_loaded", True):
        raise ValueError(
            f"the vision tower of {type(model).__name__} is not loaded yet; call "
            "model.get_vision_tower().load_model() first, as load_pretrained_model does"
        )
    return tower


def _selection(tower: Any) -> str:
    selection: str = getattr(tower, "select_feature", "patch")
    if selection not in SELECTIONS:
        raise ValueError(
            f"mm_vision_select_feature must be one of {', '.join(SELECTIONS)}, got {selection!r}"
        )
    return selection


def tower_features(model: Any, pixels: Tensor, merge_pass: MergePass) -> Tensor:
    """[tiles, M, C] from the tower itself, which selects the layer and drops its class token."""
    tower = _loaded_tower(model)
    with encoding(tower, merge_pass):
        states: Tensor = tower(pixels)
    check_count(states.shape[1], merge_pass.schedule.tower_out)
    return states
