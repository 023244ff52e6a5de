"""Tiny models with random weights of many families, by model type, with batches.

`FAMILIES["internvl"]()` is a model and a batch in the format of the family's processor.
Families that the installed transformers does not have are left out.
"""

from __future__ import annotations

from tiny_families_packed import PACKED
from tiny_families_padded import PADDED, VARIANTS
from tiny_families_tiles import TILES
from transformers import CONFIG_MAPPING


def known(families):
    return {name: one for name, one in families.items() if name.split(",")[0] in CONFIG_MAPPING}


GROUPS = {"tiles": known(TILES), "packed": known(PACKED), "padded": known(PADDED | VARIANTS)}
FAMILIES = known(TILES | PACKED | PADDED)
