"""Where the original llava package puts every word and every patch of a prompt.

Knows: that `prepare_inputs_labels_for_multimodal` only moves embeddings about. It is run as it is,
on codes instead of embeddings, and the codes tell afterwards which column came from where: tiles,
unpadding, separators between rows of patches, padding and several pictures are the model's own
code, whatever the fork. Does not know: merging, what an embedding is, `generate`.

Axes: B rows, T columns of the prompt as it is given, L columns once all patches are in it.
"""

from __future__ import annotations

import copy
import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters.swap import base_class

# What a column holds; 0 is padding, because the package pads with zeros.
TEXT, PATCH, NEWLINE = 1.0, 2.0, 3.0
# Values that `prepare_inputs_labels_for_multimodal` returns; the mask is the third, the embeddings
# are the fifth of them.
N_VALUES, EMBEDDINGS = 6, 4
# Methods of these do not deal with pictures.
LIBRARIES = ("torch.", "transformers.")


@dataclass(frozen=True)
class Layout:
    """A prompt without merging, column by column.

    Attributes:
        text: [B, L] int64, column of the given prompt, -1 where there is no word.
        patch: [B, L] int64, visual token counted over all tiles, -1 where there is none.
        newline: [B, L] bool, separators behind rows of patches.
        pixels: [tiles, 3, H, W], what the vision tower has to see.
    """

    text: Tensor
    patch: Tensor
    newline: Tensor
    pixels: Tensor

    @property
    def valid(self) -> Tensor:
        """[B, L] bool, columns that hold something."""
        return (self.text >= 0) | (self.patch >= 0) | self.newline

    def to(self, device: torch.device) -> Layout:
        """The same with its columns on a device."""
        columns = (column.to(device) for column in (self.text, self.patch, self.newline))
        return Layout(*columns, self.pixels)


def lay_out(model: Any, prepare: Any, inputs: dict[str, Any], tokens_in: int) -> Layout:
    """Run the model's own preparation on codes; nothing is embedded or encoded.

    Args:
        model: the model.
        prepare: its own `prepare_inputs_labels_for_multimodal`, a bound method.
        inputs: `input_ids` [B, T], `images`, and `attention_mask`, `image_sizes` where there are.
        tokens_in: visual tokens per tile without merging.

    Raises:
        ValueError: pictures are missing, or the preparation does more than moving tokens about.
    """
    ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    _check_mask(mask, ids)
    _check_pictures(ids, mask, inputs["images"])
    # Every word is called by its column; placeholders are the negative ids and stay.
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    given = {
        "input_ids": torch.where(ids < 0, ids, columns),
        "attention_mask": mask,
        "images": inputs["images"],
        "image_sizes": inputs.get("image_sizes"),
    }
    known = inspect.signature(prepare).parameters
    stand_in = _StandIn(model, tokens_in)
    empty = dict.fromkeys(("position_ids", "past_key_values", "labels"))
    values = prepare.__func__(
        stand_in, **{name: value for name, value in (empty | given).items() if name in known}
    )
    if len(values) != N_VALUES or not stand_in.seen:
        raise ValueError(_unknown(model))
    return _read(model, values[EMBEDDINGS], torch.cat(stand_in.seen), tokens_in)


def _read(model: Any, codes: Tensor, pixels: Tensor, tokens_in: int) -> Layout:
    kind, index = codes[..., 0], codes[..., 1]
    clean = torch.isin(kind, torch.tensor([0.0, TEXT, PATCH, NEWLINE], dtype=kind.dtype))
    if not bool((clean & (index == index.round())).all()):
        raise ValueError(_unknown(model))
    index = index.long()
    patch = index.masked_fill(kind != PATCH, -1)
    if bool((patch >= len(pixels) * tokens_in).any()):
        raise ValueError(_unknown(model))
    return Layout(index.masked_fill(kind != TEXT, -1), patch, kind == NEWLINE, pixels)


def _unknown(model: Any) -> str:
    merge_type = getattr(model.config, "mm_patch_merge_type", "flat")
    return (
        f"{type(model).__name__} does more with visual tokens than putting them in order "
        f"(mm_patch_merge_type={merge_type!r}), for instance resampling them, so merged tokens "
        "cannot be put in their place; set model.config.mm_patch_merge_type = 'flat'"
    )


def _check_mask(mask: Tensor, ids: Tensor) -> None:
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be [batch, tokens] like input_ids, {tuple(ids.shape)}, where "
            f"there are images, got {tuple(mask.shape)}"
        )


def _check_pictures(ids: Tensor, mask: Tensor, images: Any) -> None:
    """The package itself ends in an IndexError here."""
    per_row = ((ids < 0) & mask).sum(1)
    # It takes one picture for every row, also for one without a placeholder.
    needed, found = int(per_row.clamp(min=1).sum()), len(images)
    if needed > found:
        bare = int((per_row == 0).sum())
        rest = f" and {bare} of its rows none (each takes one that is not shown)" if bare else ""
        raise ValueError(
            f"the prompt has {int(per_row.sum())} image placeholders{rest}, so {needed} images are "
            f"needed, got {found}"
        )


def _codes(kind: float, index: Tensor) -> Tensor:
    """[...] int64 to [..., 2] float64, which holds every index exactly."""
    index = index.double()
    return torch.stack([torch.full_like(index, kind), index], -1)


class _StandIn:
    """Takes the place of the model while its own code lays a prompt out, on the CPU."""

    def __init__(self, model: Any, tokens_in: int) -> None:
        self._model, self._tokens_in = model, tokens_in
        self._core = _CoreStandIn(model.get_model())
        self.seen: list[Tensor] = []
        self.device = torch.device("cpu")
        self.config = copy.copy(model.config)
        # Cutting comes after merging, when there is less to cut.
        self.config.tokenizer_model_max_length = None

    def __getattr__(self, name: str) -> Any:
        # Methods that the preparation is split into have to see the codes too.
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
        """Codes for the visual tokens of a batch of tiles: [tiles, tokens_in, 2]."""
        if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
            shown = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be [tiles, 3, height, width], got {shown}")
        first = sum(len(before) for before in self.seen) * self._tokens_in
        self.seen.append(images)
        last = first + len(images) * self._tokens_in
        return _codes(PATCH, torch.arange(first, last).view(len(images), self._tokens_in))


class _CoreStandIn:
    """Takes the place of the language model."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.image_newline = _codes(NEWLINE, torch.tensor(0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def embed_tokens(self, columns: Tensor) -> Tensor:
        """Codes for words."""
        return _codes(TEXT, columns)
