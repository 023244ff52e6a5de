"""How many tokens a vision tower makes of an image, from its configuration.

Class tokens, registers and patch grids. An unknown tower is measured by running one layer of it.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from .tower import find_encoder_layers

# Towers that name an image_size but cut images of any size into patches.
VARIABLE_GRID = ("pixtral",)


def has_class_token(tower: nn.Module) -> bool:
    """Whether the tower puts a class token before the patches (CLIP does, SigLIP not)."""
    return any(
        hasattr(module, "class_embedding")
        # Pooling heads after the layers may have a token of that name, too.
        or (name.rpartition(".")[2] == "embeddings" and hasattr(module, "cls_token"))
        for name, module in tower.named_modules()
    )


def has_registers(tower: nn.Module) -> bool:
    """Whether the tower puts registers between class token and patches (DINOv2 with registers)."""
    return any(hasattr(module, "register_tokens") for module in tower.modules())


def leading_tokens(tower: nn.Module, vision_config: Any) -> int:
    """Tokens that are not patches: a class token, registers (DINOv2).

    Raises:
        TypeError: the tower makes fewer tokens than its grid has patches.
    """
    # Every call asks, and the answer takes a walk through all modules of the tower.
    if tower not in _LEADING:
        _LEADING[tower] = _leading_tokens(tower, vision_config)
    return _LEADING[tower]


_LEADING: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _leading_tokens(tower: nn.Module, vision_config: Any) -> int:
    try:
        find_encoder_layers(tower)
        known = not has_registers(tower)
    except TypeError:
        known = False
    if not known:
        length = _sequence_length(_Described(vision_config))
        rows, columns = patch_grid(vision_config)
        if length < rows * columns:
            raise TypeError(
                f"a {vision_config.model_type} vision tower makes {length} tokens of an image of "
                f"{rows} x {columns} patches; only towers that keep all patches are supported"
            )
        return length - rows * columns
    return int(has_class_token(tower))


class _Described:
    """A configuration that equals every other one with the same values."""

    def __init__(self, config: Any) -> None:
        self.config, self._text = config, f"{type(config)} {config.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


@functools.lru_cache(maxsize=16)
def _sequence_length(described: _Described) -> int:
    """Tokens in the sequence of a tower, by running its embedding and one layer on a blank."""
    config = copy.deepcopy(described.config)
    config.num_hidden_layers = 1
    image = config.image_size
    height, width = (image, image) if isinstance(image, int) else image
    # Making weights draws random numbers, which must not change the caller's.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        tower = AutoModel.from_config(config).float().eval()
        pixels = torch.zeros(1, getattr(config, "num_channels", 3), height, width)
        states = tower(pixels, output_hidden_states=True).hidden_states
    return int(states[-1].shape[1])


def patch_grid(vision_config: Any) -> tuple[int, int]:
    """(rows, columns) of patches that the processor prepares images for.

    Raises:
        TypeError: the config does not say, because the number depends on the image.
    """
    image = getattr(vision_config, "image_size", None)
    patch = getattr(vision_config, "patch_size", None)
    if image is None or patch is None or vision_config.model_type in VARIABLE_GRID:
        raise TypeError(
            f"a {vision_config.model_type} vision tower is not supported yet: its number of "
            "patches depends on the image (looked for image_size and patch_size in its config), "
            "so no count can be promised"
        )
    rows, columns = (image, image) if isinstance(image, int) else image
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    return rows // high, columns // wide


def feature_depth(vision_feature_layer: int | list[int], n_layers: int) -> list[int]:
    """Indices into `hidden_states` (0 is the embedding) as numbers of layers passed.

    Raises:
        ValueError: an index outside the tower.
    """
    wanted = (
        [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
    )
    depths = [index if index >= 0 else n_layers + 1 + index for index in wanted]
    for index, depth in zip(wanted, depths, strict=True):
        if not 0 <= depth <= n_layers:
            raise ValueError(
                f"vision_feature_layer must be in {-n_layers - 1}..{n_layers} for this tower of "
                f"{n_layers} layers, got {index}"
            )
    return depths
