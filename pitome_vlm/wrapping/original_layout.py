"""Where the original llava package puts every word and every image of a prompt.

Read off what its own preparation (see `adapters/original_code.py`) does to codes instead of
embeddings.

Axes: B rows, T columns of the prompt as it is given, L columns once all visual tokens are in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.original_code import PLACEHOLDER, ImageBatch, run_preparation, unfollowed

# What a column holds; 0 is padding, because the package pads with zeros.
TEXT, VISUAL, NEWLINE = 1.0, 2.0, 3.0


@dataclass(frozen=True)
class Layout:
    """A prompt without merging, column by column.

    Attributes:
        text: [B, L] int64, column of the given prompt, -1 where there is no word.
        item: [B, L] int64, the image (or tile, where these are images of their own) that the
            column belongs to, separators included; -1 where there is none.
        place: [B, L] int64, which of its tokens it is; meaningless where there is none.
    """

    text: Tensor
    item: Tensor
    place: Tensor

    @property
    def valid(self) -> Tensor:
        """[B, L] bool, columns that hold something."""
        return (self.text >= 0) | (self.item >= 0)

    def to(self, device: torch.device) -> Layout:
        """The same on a device."""
        return Layout(*(columns.to(device) for columns in (self.text, self.item, self.place)))


def lay_out(
    model: Any,
    images: ImageBatch,
    items: Sequence[int],
    tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
) -> Layout:
    """Run the model's own preparation on codes, on the CPU; nothing is embedded or encoded.

    Args:
        model: the model.
        images: of the prompt.
        items: what every tile is a part of.
        tokens: of one tile.
        input_ids: [B, T].
        attention_mask: [B, T], or None.

    Raises:
        ValueError: images are missing, or the codes do not come out whole.
    """
    ids = input_ids.cpu()
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    _check_mask(mask, ids)
    _check_images(ids, mask, images)
    # Every word is called by its column.
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    per_tile = torch.tensor(items)[:, None].expand(-1, tokens)
    codes, valid = run_preparation(
        model,
        images,
        _codes(VISUAL, per_tile),
        _codes(NEWLINE, torch.tensor(0)),
        input_ids=torch.where(ids == PLACEHOLDER, ids, columns),
        attention_mask=mask,
        words=lambda found: _codes(TEXT, found),
    )
    whole = codes.round()
    kind, index = whole[..., 0], whole[..., 1].long()
    # What is resampled within one image is the same code, but for rounding.
    followed = (codes - whole).abs().max() < 1e-6 and kind.max() <= NEWLINE
    if not followed or not torch.equal(kind > 0, valid):
        raise ValueError(unfollowed(model))
    return _read(kind, index)


def _read(kind: Tensor, index: Tensor) -> Layout:
    text = index.masked_fill(kind != TEXT, -1)
    # A separator belongs to the image before it; images of a row come in their order.
    last = index.masked_fill(kind != VISUAL, -1).cummax(1).values
    item = last.masked_fill((kind != VISUAL) & (kind != NEWLINE), -1)
    columns = torch.arange(kind.shape[1]).expand_as(kind)
    begins = (item >= 0) & (item != torch.nn.functional.pad(item, (1, -1), value=-1))
    first = (columns * begins).cummax(1).values
    return Layout(text, item, columns - first)


def _codes(kind: float, index: Tensor) -> Tensor:
    """[...] int64 to [..., 2] float64, which holds every index exactly."""
    index = index.double()
    return torch.stack([torch.full_like(index, kind), index], -1)


def _check_mask(mask: Tensor, ids: Tensor) -> None:
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be [batch, tokens] like input_ids, {tuple(ids.shape)}, where "
            f"there are images, got {tuple(mask.shape)}"
        )


def _check_images(ids: Tensor, mask: Tensor, images: ImageBatch) -> None:
    """The package itself ends in an IndexError here."""
    per_row = ((ids == PLACEHOLDER) & mask.bool()).sum(1)
    # It takes one image for every row, also for one without a placeholder.
    needed, found = int(per_row.clamp(min=1).sum()), len(images.tiles)
    if needed > found:
        bare = int((per_row == 0).sum())
        rest = f" and {bare} of its rows none (each takes one that is not shown)" if bare else ""
        raise ValueError(
            f"the prompt has {int(per_row.sum())} image placeholders{rest}, so {needed} images are "
            f"needed, got {found}"
        )
