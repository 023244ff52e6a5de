"""Prompt compaction: make room for fewer visual tokens than the processor wrote placeholders.

Token ids, masks, labels and positions only; why an image has the number of tokens it has is
decided elsewhere.

Axes: B rows, T columns before, S columns after.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Compaction:
    """Which columns of a batch stay, and where they go.

    Attributes:
        keep: [B, T] bool, columns that stay.
        source: [B, S] int64, the column that every new one was; 0 where a row is padded.
        valid: [B, S] bool, new columns that hold something.
        padded: whether any of them does not.
    """

    keep: Tensor
    source: Tensor
    valid: Tensor
    padded: bool

    @property
    def removed(self) -> int:
        """Columns by which the batch got shorter, T - S."""
        return int(self.keep.shape[1] - self.valid.shape[1])

    def take(self, values: Tensor, fill: float | int | bool) -> Tensor:
        """[B, T, ...] to [B, S, ...], `fill` where a row is padded."""
        source, more = self.source.to(values.device), values.shape[2:]
        axes = (..., *(None for _ in more))
        if more:
            source = source[axes].expand(*source.shape, *more)
        found = values.gather(1, source)
        if not self.padded:
            return found
        return found.masked_fill_(~self.valid[axes].to(values.device), fill)


def surplus_placeholders(
    placeholders: Tensor,
    full_counts: list[int],
    counts: list[int],
    kind: str = "image",
    anchors: list[Tensor] | None = None,
) -> Tensor:
    """Which placeholders have to go: [B, T] bool.

    Images follow each other in row order. The processor wrote `full_counts[i]` placeholders for
    image i; `counts[i]` of them stay. Placeholders that already match the merged count are
    accepted as they are.

    Args:
        placeholders: [B, T] bool.
        full_counts: placeholders per image without merging.
        counts: visual tokens per image.
        kind: what they are placeholders of, for the message.
        anchors: per image [counts[i]] int64, the placeholders that stay: those that merged tokens
            are named after, so that words between the rows or frames of an image stay where they
            are. None for the first ones, which is the same where nothing stands in between.

    Raises:
        ValueError: the placeholders match neither; the message names both numbers.
    """
    found, images = int(placeholders.sum()), len(counts)
    none = torch.zeros_like(placeholders)
    if found == sum(full_counts) == sum(counts):
        return none
    if found == sum(counts) and not _looks_unmerged(placeholders, full_counts):
        return none
    if found != sum(full_counts):
        raise ValueError(
            f"the prompt has {found} {kind} placeholders for {images} {kind}"
            f"{'' if images == 1 else 's'}, but {sum(full_counts)} (without merging, as the "
            f"processor writes them) or {sum(counts)} (merged) are needed; check that every "
            f"<{kind}> in the text has its {kind} and that the processor belongs to this model"
        )
    if anchors is None:
        anchors = [torch.arange(count) for count in counts]
    stays = torch.zeros(found, dtype=torch.bool, device=placeholders.device)
    start = 0
    for own, full in zip(anchors, full_counts, strict=True):
        stays[own.to(stays.device) + start] = True
        start += full
    return none.masked_scatter(placeholders, ~stays)


def _looks_unmerged(placeholders: Tensor, full_counts: list[int]) -> bool:
    """Whether every unbroken run of placeholders is made of whole unmerged images.

    Four merged images of 36 tokens fill the 144 places of one unmerged image: such a prompt has
    the right total and the wrong number of images.
    """
    padded = torch.nn.functional.pad(placeholders.long(), (1, 1))
    edges = padded.diff(dim=1)
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    made = _sums(sorted(set(full_counts)), int(runs.max()) if len(runs) else 0)
    return all(made[run] for run in runs.tolist())


def _sums(counts: list[int], largest: int) -> list[bool]:
    """For 0..largest, whether the number is a sum of `counts`, each as often as needed."""
    made = [True] + [False] * largest
    for total in range(1, largest + 1):
        made[total] = any(count <= total and made[total - count] for count in counts)
    return made


def prompt_order(
    placeholders: list[Tensor], full_counts: list[list[int]], counts: list[list[int]]
) -> tuple[list[int], list[int]]:
    """The images of several kinds in the order in which a prompt, row by row, shows them.

    Args:
        placeholders: of every kind, [B, T] bool, unmerged or merged.
        full_counts: of every kind, placeholders per image without merging.
        counts: of every kind, visual tokens per image.

    Returns:
        Numbers of the images (all kinds one after the other), and the row of each, both in
        prompt order.
    """
    starts: list[int] = []
    for places, full, merged in zip(placeholders, full_counts, counts, strict=True):
        found = places.flatten().nonzero()[:, 0]
        lengths = full if len(found) == sum(full) else merged
        firsts = [0, *itertools.accumulate(lengths[:-1])] if lengths else []
        starts += found[firsts].tolist()
    order = sorted(range(len(starts)), key=starts.__getitem__)
    width = placeholders[0].shape[1] if placeholders else 1
    return order, [starts[index] // width for index in order]


def padded_left(attention_mask: Tensor | None) -> bool:
    """Whether rows of different lengths are aligned at their ends."""
    if attention_mask is None or attention_mask.dim() != 2:
        return False
    return bool((attention_mask[:, 0] == 0).any() and (attention_mask[:, -1] != 0).any())


def _outer_padding(attended: Tensor, left: bool) -> Tensor:
    """Columns before the first (or after the last) attended one: [B, T] bool."""
    if left:
        return attended.long().cumsum(1) == 0
    return attended.flip(1).long().cumsum(1).flip(1) == 0


def compaction(
    placeholders: Tensor,
    drop: Tensor,
    attention_mask: Tensor | None,
    *,
    left: bool | None = None,
) -> Compaction:
    """Where every column goes when `drop` and the padding that becomes superfluous are removed.

    Args:
        placeholders: [B, T] bool; those not dropped stay even where they are masked, because
            each of them waits for a visual token.
        drop: [B, T] bool, surplus placeholders.
        attention_mask: [B, T], 0 where padded, or None.
        left: side on which rows that become shorter are padded; None keeps the mask's own.
    """
    keep = ~drop
    if attention_mask is not None and not bool(attention_mask.all()):
        left = padded_left(attention_mask) if left is None else left
        keep &= ~_outer_padding(attention_mask.to(keep.device) != 0, left) | placeholders
    lengths = keep.sum(1)
    every = lengths.tolist()
    width = max(every)
    if min(every) == width:
        source = keep.nonzero()[:, 1].view(len(keep), width)
        return Compaction(keep, source, torch.ones_like(source, dtype=torch.bool), padded=False)
    column = keep.long().cumsum(1) - 1
    if left:
        column = column + (width - lengths)[:, None]
    places = torch.arange(width, device=keep.device)[None]
    valid = places >= (width - lengths)[:, None] if left else places < lengths[:, None]
    numbers = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    # What goes is written to one column more, which is cut off.
    source = torch.zeros(len(keep), width + 1, dtype=torch.int64, device=keep.device)
    source.scatter_(1, torch.where(keep, column, width), numbers)
    return Compaction(keep, source[:, :width], valid, padded=True)


def compact_positions(position_ids: Tensor, drop: Tensor) -> Tensor:
    """Close the gaps that dropped placeholders leave in a caller's own positions, [B, T].

    Positions that restart (several samples packed into a row) restart the counting with them.
    """
    gone = drop.long().cumsum(1)
    restarts = torch.zeros_like(drop)
    restarts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    before = torch.where(restarts, gone - drop.long(), torch.zeros_like(gone)).cummax(1).values
    return position_ids - (gone - drop.long() - before)
