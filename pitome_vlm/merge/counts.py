"""How many tokens an image of a given size has, before and after merging.

A budget is stated for one tile, or as a fraction; here it becomes an exact count for an image of
several tiles. How a model lays an image out is said by its adapter (`Adapter.footprint`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .schedule import Schedule
from .steps import Budget


@dataclass(frozen=True)
class Footprint:
    """One image (or video) of a prompt in numbers.

    Attributes:
        full: tokens without merging, the placeholders that the processor writes for it.
        tiles: inputs that the vision tower is run on for it (tiles, frames).
        newlines: of `full`, separators that are no patches.
        frames: of a video; 0 for an image.
        rows: of the grid of an image or frame; 0 where it is no grid, or not known.
    """

    full: int
    tiles: int = 1
    newlines: int = 0
    frames: int = 0
    rows: int = dataclasses.field(default=0, compare=False)

    def windows(self, frames_together: int = 1) -> list[int]:
        """Frames of every window of a video; an image is one window."""
        starts = range(0, self.frames, frames_together)
        return [min(frames_together, self.frames - start) for start in starts] or [1]

    def smallest(self, frames_together: int = 1) -> int:
        """The fewest tokens it can be merged to: a patch and, where there are any, a separator.

        Of a video a patch of every window, because windows are merged on their own.
        """
        return min(self.full, len(self.windows(frames_together)) + (self.newlines > 0))


@dataclass(frozen=True)
class TokenCount:
    """Tokens of one image without and with merging.

    Attributes:
        full: without.
        out: with; the most, where every image has a count of its own.
        fewest: with; None where `out` is exact.
    """

    full: int
    out: int
    fewest: int | None = None

    @property
    def is_identity(self) -> bool:
        """Whether nothing is merged."""
        return self.fewest is None and self.full == self.out

    @property
    def shown(self) -> str:
        """The merged count for people: "36", or "9 to 72" where every image has its own."""
        return str(self.out) if self.fewest is None else f"{self.fewest} to {self.out}"


def scaled(count: int, part: int, whole: int) -> int:
    """`count` x `part` / `whole` to the nearest whole number, halves up."""
    return (2 * count * part + whole) // (2 * whole)


def count_tokens(
    schedule: Schedule,
    budget: Budget,
    footprint: Footprint,
    fewest: Budget | None = None,
    frames_together: int = 1,
) -> TokenCount:
    """Tokens of one image under a budget, exact and known before anything runs.

    `keep` is a fraction of the image's own count. `tokens` and `ratio` are about one tile: the
    fraction they leave of a tile is left of the whole image.

    Args:
        schedule: of one tile.
        budget: what the schedule was laid out for; the largest where every image has its own.
        footprint: the image.
        fewest: the smallest budget where every image has its own.
        frames_together: frames of a video that are merged with each other.
    """
    if footprint == Footprint(schedule.tokens_in):
        least = None if schedule.fewest is None else schedule.ladder[-1] + schedule.leading_kept
        return TokenCount(schedule.tokens_in, schedule.tokens_out, least)
    smallest = footprint.smallest(frames_together)
    out = max(smallest, _left(schedule, budget, footprint))
    least = None
    if fewest is not None:
        least = min(out, max(smallest, _left(schedule, fewest, footprint)))
    return TokenCount(footprint.full, out, least)


def _left(schedule: Schedule, budget: Budget, footprint: Footprint) -> int:
    if budget.keep is not None:
        left = budget.target(footprint.full)
        assert left is not None
        return left
    return scaled(footprint.full, schedule.tokens_out, schedule.tokens_in)


def newline_share(footprint: Footprint, total: int) -> int:
    """How many of `total` tokens are separators: their share of the unmerged image.

    At least one where the image has any, and never so many that patches get none or more than
    there are.

    Args:
        footprint: the image.
        total: `footprint.smallest()` .. `footprint.full`.
    """
    if footprint.newlines == 0:
        return 0
    patches = footprint.full - footprint.newlines
    share = scaled(total, footprint.newlines, footprint.full)
    most = min(footprint.newlines, total - 1)
    return min(most, max(1, share, total - patches))


def shared_out(total: int, lengths: list[int]) -> list[int]:
    """`total` in proportion to `lengths`, at least one each and never more than a length.

    Raises:
        ValueError: less than one each.
    """
    if total < len(lengths):
        raise ValueError(
            f"the budget leaves {total} tokens for {len(lengths)} parts (grids of an image, "
            "windows of a video) that are merged on their own and need one each; give a larger "
            "budget"
        )
    left, whole, shares = total, sum(lengths), []
    for index, length in enumerate(lengths):
        later = lengths[index + 1 :]
        share = scaled(left, length, whole)
        shares.append(min(length, left - len(later), max(1, share, left - sum(later))))
        left, whole = left - shares[-1], whole - length
    return shares
