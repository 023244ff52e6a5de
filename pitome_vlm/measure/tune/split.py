"""A seeded split of questions into a part to search on and a part to check on.

Knows: which questions share a picture. Does not know: questions, pictures or models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 2
FEW = 20


@dataclass(frozen=True)
class Parts:
    """Which rows are searched on, which are checked on; no picture is in both.

    Attributes:
        search: row numbers, ascending.
        check: row numbers, ascending.
        groups: for every row the group of pictures it belongs to; rows that share a picture share
            a group.
    """

    search: tuple[int, ...]
    check: tuple[int, ...]
    groups: tuple[int, ...]

    def images(self, rows: Sequence[int]) -> int:
        """Groups of pictures among some rows."""
        return len({self.groups[row] for row in rows})


def image_groups(pictures: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """The group of every row: rows that share a picture, directly or through others."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for names in pictures:
        for name in names:
            parent[root(name)] = root(names[0])
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(root(names[0]), len(numbers)) for names in pictures)


def split_by_image(
    pictures: Sequence[Sequence[str]], *, seed: int = 0, check_share: float = 0.5
) -> Parts:
    """Split rows so that no picture is in both parts.

    Args:
        pictures: for every row the digests of its pictures.
        seed: of the shuffling.
        check_share: share of the groups of pictures that goes to the check part, in (0, 1).

    Raises:
        ValueError: too few pictures, or a share out of range.
    """
    if not 0 < check_share < 1:
        raise ValueError(f"check_share must be in (0, 1), got {check_share}")
    groups = image_groups(pictures)
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
