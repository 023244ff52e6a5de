"""Runs the original llava package's own preparation of a prompt on values other than embeddings.

`prepare_inputs_labels_for_multimodal` only moves embeddings about (and in forks resamples those of
images): what it does to codes or coordinates tells what it does to embeddings, whatever the fork.
Tiles, unpadding, separators between rows of patches, padding and several images remain the model's
own code.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..releases import accepted
from .swap import base_class

PREPARE = "prepare_inputs_labels_for_multimodal"
# The id that stands for an image in a prompt; all other ids are words.
PLACEHOLDER = -200
# Values that the preparation returns; the mask is the third, the embeddings are the fifth of them.
N_VALUES, MASK, EMBEDDINGS = 6, 2, 4
# Methods of these do not deal with images.
LIBRARIES = ("torch.", "transformers.")


@dataclass(frozen=True)
class ImageBatch:
    """The images of a call.

    Attributes:
        pixels: [tiles of all images, 3, H, W].
        tiles: tiles of every image.
        sizes: (width, height) of every image as the package has it, or None.
        listed: given as a list or with five axes, which the package treats as cut into tiles;
            otherwise every image is one tile and nothing is put around it.
    """

    pixels: Tensor
    tiles: list[int]
    sizes: Any
    listed: bool

    def blanks(self) -> Any:
        """Empty images of the same form."""
        if not self.listed:
            return torch.empty(len(self.tiles), 1, 1, 1)
        return [torch.empty(n, 1, 1, 1) for n in self.tiles]


def image_batch(images: Any, image_sizes: Any = None) -> ImageBatch:
    """The images of a call in any form that the package takes.

    Raises:
        ValueError: no image, or a tensor of another number of axes.
    """
    if isinstance(images, Tensor) and images.dim() == 4 and len(images):
        return ImageBatch(images, [1] * len(images), image_sizes, False)
    items = list(images) if isinstance(images, (list, tuple)) or _has_axes(images, 5) else []
    if not items or not all(_has_axes(one, 3) or _has_axes(one, 4) for one in items):
        shown = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            "images must be [images, 3, height, width], [images, tiles, 3, height, width] or a "
            f"list of [tiles, 3, height, width], with at least one image; got {shown}"
        )
    tiles = [one[None] if one.dim() == 3 else one for one in items]
    return ImageBatch(torch.cat(tiles), [len(one) for one in tiles], image_sizes, True)


def _has_axes(value: Any, axes: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == axes


def own_preparation(model: Any) -> Any:
    """The preparation of the model's class as it was before any wrapping."""
    return getattr(base_class(model), PREPARE)


def own_function(model: Any, name: str) -> Any:
    """A function that the preparation calls by name, None if its module has none of that name."""
    for cls in base_class(model).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if PREPARE in cls.__dict__ and found is not None:
            return found
    return None


def run_preparation(
    model: Any,
    images: ImageBatch,
    features: Tensor,
    newline: Tensor,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    words: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The model's own preparation of a prompt, on the device and in the width of `features`.

    Rows are padded on the right, and nothing is cut off: that comes after merging, when rows are
    shorter.

    Args:
        model: the model.
        images: of the prompt.
        features: [tiles, N, C], what stands for visual tokens.
        newline: [C], what stands for separators.
        input_ids: [B, T], `PLACEHOLDER` for every image.
        attention_mask: [B, T].
        words: what stands for the embeddings of [n] ids: [n, C].

    Returns:
        [B, L, C], and [B, L] bool: the columns that hold something.

    Raises:
        ValueError: the method does not return what the package's does.
    """
    stand_in = _StandIn(model, features, newline, words)
    prepare = own_preparation(model)
    given = {
        "input_ids": input_ids,
        "position_ids": None,
        "attention_mask": attention_mask,
        "past_key_values": None,
        "labels": None,
        "images": images.blanks(),
        "image_sizes": images.sizes,
    }
    values = prepare(stand_in, **accepted(prepare, given))
    if len(values) != N_VALUES or not stand_in.was_asked:
        raise ValueError(unfollowed(model))
    return values[EMBEDDINGS], values[MASK].bool()


def unfollowed(model: Any) -> str:
    """The error message for a model whose preparation does more than the package's."""
    merge_type = getattr(model.config, "mm_patch_merge_type", "flat")
    return (
        f"{type(model).__name__} does more with visual tokens than putting them in order "
        f"(mm_patch_merge_type={merge_type!r}), so merged tokens cannot be put in their place; set "
        "model.config.mm_patch_merge_type = 'flat' and wrap() again"
    )


class _StandIn:
    """Takes the place of the model in its own preparation."""

    def __init__(
        self, model: Any, features: Tensor, newline: Tensor, words: Callable[[Tensor], Tensor]
    ) -> None:
        self._model, self._features, self.was_asked = model, features, False
        self._core = _CoreStandIn(model.get_model(), newline, words)
        self.device, self.dtype = features.device, features.dtype
        self.config = copy.copy(model.config)
        self.config.tokenizer_model_max_length = None
        self.config.tokenizer_padding_side = "right"

    def __getattr__(self, name: str) -> Any:
        # Helper methods of the preparation must see the replaced values too.
        method = inspect.getattr_static(base_class(self._model), name, None)
        if inspect.isfunction(method) and not method.__module__.startswith(LIBRARIES):
            return types.MethodType(method, self)
        return getattr(self._model, name)

    @property
    def model(self) -> Any:
        """Where most of the package's classes keep what `get_model` returns."""
        return self._core

    def get_model(self) -> Any:
        """The language model, as the package calls it."""
        return self._core

    def encode_images(self, images: Tensor) -> Tensor:
        """What stands for the visual tokens of all tiles."""
        self.was_asked = len(images) == len(self._features)
        return self._features


class _CoreStandIn:
    """Takes the place of the language model."""

    def __init__(self, core: Any, newline: Tensor, words: Callable[[Tensor], Tensor]) -> None:
        self._core, self.image_newline, self.embed_tokens = core, newline, words

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def pack(model: Any, images: ImageBatch, tiles: Sequence[Tensor], newline: Tensor) -> list[Tensor]:
    """The model's own packing of the tiles of every image: [t, N, C] each to [L, C] each."""
    features = torch.cat(list(tiles))
    ids = torch.tensor([[1, PLACEHOLDER]] * len(tiles), device=features.device)
    packed, valid = run_preparation(
        model,
        images,
        features,
        newline.to(features),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        words=lambda found: features.new_zeros(len(found), features.shape[-1]),
    )
    # Without the word before the image, which a prompt needs.
    return [row[1:length] for row, length in zip(packed, valid.sum(1).tolist(), strict=True)]
