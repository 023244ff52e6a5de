"""Which layers of every family get an adapter."""

from __future__ import annotations

import re

import pytest
from refused_family import else_refused
from tiny_families import FAMILIES
from torch import nn

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.training.lora import target_modules


def hit(model, parts):
    pattern = target_modules(model, parts)
    return {name: one for name, one in model.named_modules() if re.fullmatch(pattern, name)}


def linear(*roots):
    return {one for root in roots for one in root.modules() if isinstance(one, nn.Linear)}


@pytest.mark.parametrize("name", FAMILIES)
@else_refused()
def test_layers_of_a_part_and_no_others(name):
    model, batch = FAMILIES[name](images=(1,), texts=(3,))
    parts = find_adapter(model).parts(model)
    words = hit(model, ("language_model",))
    assert set(words.values()) == linear(*parts.language_model)
    seen = hit(model, ("vision_tower",))
    assert set(seen.values()) <= linear(parts.vision_tower)
    assert len(seen) >= 6
    # What does not reach the features would be trained for nothing.
    pitome_vlm.wrap(model, keep=0.5)
    model(**batch).logits.square().mean().backward()
    idle = [key for key, one in seen.items() if one.weight.grad is None]
    assert not idle, idle
