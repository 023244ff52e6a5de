"""Tiny models with random weights of many families, by model type, with batches.

`FAMILIES["internvl"]()` is a model and a batch in the format of the family's processor.
"""

from __future__ import annotations

from tiny_families_packed import PACKED
from tiny_families_padded import PADDED, VARIANTS
from tiny_families_tiles import TILES

GROUPS = {"tiles": TILES, "packed": PACKED, "padded": PADDED | VARIANTS}
FAMILIES = TILES | PACKED | PADDED
