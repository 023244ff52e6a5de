"""The original llava package (haotian-liu/LLaVA, `llava-torch`): where its tower and projector are.

Knows: the parts that `LlavaLlamaForCausalLM` and its Mistral and MPT siblings have in common, by
duck type; the package is no dependency. Does not know: algorithms, prompts, how the package lays
pictures out (`original_layout.py`).
"""

from __future__ import annotations

import inspect
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

METHODS = ("get_model", "get_vision_tower", "prepare_inputs_labels_for_multimodal")
SELECTIONS = ("patch", "cls_patch")


class OriginalLlavaAdapter:
    """LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaMptForCausalLM and their like."""

    name = "LlavaLlamaForCausalLM of the original llava package"
    calls = "original"

    def matches(self, model: Any) -> bool:
        """By methods and the projector, so that forks and other language models match too."""
        return all(callable(getattr(model, method, None)) for method in METHODS) and hasattr(
            model.get_model(), "mm_projector"
        )

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """See `Adapter`; numbers of one tile where a picture is cut into tiles.

        Args:
            model: the model.
            **feature_options: the package has none.

        Raises:
            TypeError: the tower is of a kind that is not known here.
            ValueError: the tower is not loaded, or reads features in an unknown way.
        """
        del feature_options
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
                f"{tower.num_patches} patches where its picture has {grid[0]} x {grid[1]}"
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

    def install(self, model: Any, *, inside_tower: bool) -> None:
        """Swap the classes of the tower's layers; see `HFLlavaAdapter.install`."""
        tower = _loaded_tower(model)
        try:
            find_encoder_layers(tower)
        except TypeError:
            if inside_tower:
                raise
            return
        install_tower(tower)

    def uninstall(self, model: Any) -> None:
        """Give the tower its own classes back."""
        uninstall_tower(model.get_vision_tower())

    def text_config(self, model: Any) -> Any:
        """Configuration of the language model, the object its attention layers read."""
        return model.get_model().config

    def parts(self, model: Any) -> ModelParts:
        """See `Adapter`. Tower and projector sit inside the language model here."""
        core, tower = model.get_model(), _loaded_tower(model)
        others = (tower, core.mm_projector)
        language = tuple(part for part in core.children() if all(part is not one for one in others))
        # generate asks for the last logits alone where `forward` can be asked so.
        all_logits = "logits_to_keep" not in inspect.signature(model.forward).parameters
        return ModelParts(tower, tower.config, core.mm_projector, language, all_logits)

    def encode_images(
        self, model: Any, pixel_values: Tensor, merge_pass: MergePass, **feature_options: Any
    ) -> VisualTokens:
        """`encode_images` of the model itself, with merging in its two places.

        Args:
            model: an installed model.
            pixel_values: [tiles, 3, H, W].
            merge_pass: a fresh pass; holds the plans afterwards.
            **feature_options: the package has none.
        """
        del feature_options
        tower = _loaded_tower(model)
        with encoding(tower, merge_pass):
            states = tower(pixel_values)
        _check_count(states.shape[1], merge_pass.schedule.tower_out)
        features = merge_pass.merge_features(states)
        counts = [len(feature) for feature in features]
        # Projectors work token by token: pictures of different length go through as one row.
        same = len(set(counts)) == 1
        batch = torch.stack(features) if same else torch.cat(features)[None]
        projected = model.get_model().mm_projector(batch)
        _check_count(projected.shape[1], batch.shape[1])
        images, device = len(features), projected.device
        return VisualTokens(
            list(projected) if same else list(torch.split(projected[0], counts)),
            merge_pass.source_maps(images, device),
            [merge_pass.schedule.tokens_in] * images,
            merge_pass.anchors(images, device),
        )


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


def _check_count(found: int, scheduled: int) -> None:
    if found != scheduled:
        raise RuntimeError(
            f"the vision tower or the projector gave {found} visual tokens per picture where "
            f"{scheduled} were scheduled; pictures of another size, or a projector that changes "
            "the number of tokens, are the usual reasons"
        )
