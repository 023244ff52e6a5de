"""Shapes of a checkpoint of the original llava package, without that package or any weights.

Reads config.json and builds the transformers model of the same shapes, for counting costs. Loading
the weights is left to the package.
"""

from __future__ import annotations

import ast
import os
import re
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaNextConfig,
    PretrainedConfig,
)

from .checkpoints import is_original, raw_config, squeezed

# Language model by model_type; the package's first checkpoints only say "llava".
LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mpt": "mpt",
}
STRATEGIES = {"patch": "default", "cls_patch": "full"}
# Fields of the whole checkpoint, not of its language model.
_NOT_FOR_TEXT = ("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version")


def original_shapes(path: str | os.PathLike[str]) -> nn.Module | None:
    """A transformers model on the meta device with the shapes of an original checkpoint.

    One difference remains: for a prompt, transformers computes the logits of one position, the
    package those of all.

    Args:
        path: a folder with the checkpoint's config.json, or a name on the hub.

    Returns:
        None if `path` is not a checkpoint of the original package.

    Raises:
        OSError: its config, or that of the vision tower it names, cannot be read.
        TypeError: its language model is of an unknown kind.
        ValueError: its config lacks a field or has an unusable value.
    """
    raw = raw_config(path)
    if not is_original(raw):
        return None
    config = _config_like(raw, str(path))
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
        model.model.multi_modal_projector = _projector(raw, config)
    return model.eval()  # type: ignore[no-any-return]


def _config_like(raw: dict[str, Any], name: str) -> Any:
    kind = raw.get("model_type")
    if kind not in LANGUAGE_MODELS:
        raise TypeError(
            f"{name} has model_type {kind!r}; known types of the original llava package: "
            f"{', '.join(LANGUAGE_MODELS)}"
        )
    layer = raw.get("mm_vision_select_layer")
    selection = raw.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or selection not in STRATEGIES:
        raise ValueError(
            f"{name}: mm_vision_select_layer must be a number and mm_vision_select_feature one of "
            f"{', '.join(STRATEGIES)}, got {layer!r} and {selection!r}"
        )
    text = {field: value for field, value in raw.items() if field not in _NOT_FOR_TEXT}
    options: dict[str, Any] = {
        "text_config": AutoConfig.for_model(LANGUAGE_MODELS[kind], **text),
        "vision_config": _tower_config(raw.get("mm_vision_tower"), name),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": STRATEGIES[selection],
    }
    tiled = str(raw.get("mm_patch_merge_type", "flat")).startswith("spatial")
    if not tiled or raw.get("image_aspect_ratio") != "anyres":
        return LlavaConfig(**options)
    return LlavaNextConfig(image_grid_pinpoints=_pinpoints(raw, name), **options)


def _tower_config(tower: Any, name: str) -> Any:
    if not isinstance(tower, str):
        raise ValueError(f"{name}: mm_vision_tower must name a vision tower, got {tower!r}")
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name} names {tower!r} as its vision tower, whose config cannot be read: "
            f"{squeezed(error)}"
        ) from error
    return getattr(config, "vision_config", config)


def _pinpoints(raw: dict[str, Any], name: str) -> list[list[int]]:
    """[height, width] pairs for transformers; the package writes (width, height), maybe as text."""
    found = raw.get("image_grid_pinpoints")
    try:
        pairs: Any = ast.literal_eval(found) if isinstance(found, str) else found
        return [[int(height), int(width)] for width, height in pairs]
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: image_grid_pinpoints must be a list of [width, height], got {found!r}"
        ) from error


def _projector(raw: dict[str, Any], config: PretrainedConfig) -> nn.Module:
    """The package's projector: linear, mlpNx_gelu or identity."""
    kind = raw.get("mm_projector_type", "linear")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind == "identity":
        return nn.Identity()
    if kind != "linear" and depth is None:
        raise ValueError(f"mm_projector_type must be linear, mlpNx_gelu or identity, got {kind!r}")
    width = config.get_text_config().hidden_size
    layers: list[nn.Module] = [nn.Linear(config.vision_config.hidden_size, width)]
    for _ in range(1, int(depth[1]) if depth else 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)
