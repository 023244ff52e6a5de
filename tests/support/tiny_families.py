"""Tiny models with random weights of many families, by model type, with batches.

`FAMILIES["internvl"]()` is a model and a batch in the format of the family's processor.
Families that the installed transformers does not have are left out, and those that it takes no
features of where it does of others.
"""

from __future__ import annotations

from tiny_families_packed import PACKED
from tiny_families_padded import PADDED, VARIANTS
from tiny_families_tiles import TILES
from transformers import CONFIG_MAPPING

from pitome_vlm.releases import RELEASE, features_from


def is_served(model_type):
    others = features_from("internvl") <= RELEASE
    return model_type in CONFIG_MAPPING and not (others and features_from(model_type) > RELEASE)


def known(families):
    return {name: one for name, one in families.items() if is_served(name.split(",")[0])}


GROUPS = {"tiles": known(TILES), "packed": known(PACKED), "padded": known(PADDED | VARIANTS)}
FAMILIES = known(TILES | PACKED | PADDED)
