"""A seeded split of questions into a part to search on and a part to check on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...common import check_range

# A part must have at least so many images; with fewer than `FEW` its intervals are wide.
FEWEST = 2
FEW = 20


@dataclass(frozen=True)
class Parts:
    """Ascending numbers of the rows to search on and to check on, and the group of every row."""

    search: tuple[int, ...]
    check: tuple[int, ...]
    groups: tuple[int, ...]

    def images(self, rows: Sequence[int]) -> int:
        """The number of groups of images among some rows."""
        return len({self.groups[row] for row in rows})


def image_groups(digests: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """The group of every row, numbered from 0: rows linked by common images share a group."""
    numbers: dict[str, int] = {}
    pairs = [
        (row, numbers.setdefault(digest, len(numbers)))
        for row, found in enumerate(digests)
        for digest in found
    ]
    rows, images = np.array(pairs).T
    size = len(digests) + len(numbers)
    links = coo_array((np.ones(len(pairs)), (rows, images + len(digests))), shape=(size, size))
    _, labels = connected_components(links, directed=False)
    return tuple(int(label) for label in labels[: len(digests)])


def split_by_image(
    digests: Sequence[Sequence[str]], *, seed: int = 0, check_share: float = 0.5
) -> Parts:
    """Split rows so that no image is in both parts.

    Args:
        digests: for every row the digests of its images, at least one.
        seed: random seed of the split.
        check_share: share of the groups of images that goes to the check part, in (0, 1).

    Raises:
        TypeError: `check_share` is no number.
        ValueError: too few images, or `check_share` out of range.
    """
    check_range("check_share", check_share, 0, 1, open_ends=True)
    groups = image_groups(digests)
    count = len(set(groups))
    if count < 2 * FEWEST:
        raise ValueError(
            f"at least {2 * FEWEST} different images are needed ({FEWEST} to search on, {FEWEST} "
            f"to check on), got {count}; rows that share an image stay together. With fewer than "
            f"{2 * FEW} images the intervals are wide"
        )
    order = list(range(count))
    random.Random(seed).shuffle(order)
    size = min(count - FEWEST, max(FEWEST, round(check_share * count)))
    held_out = set(order[:size])
    rows = range(len(groups))
    return Parts(
        tuple(row for row in rows if groups[row] not in held_out),
        tuple(row for row in rows if groups[row] in held_out),
        groups,
    )
