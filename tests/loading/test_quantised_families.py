"""4-bit loading of every family: the language model, not the tower, whatever it is called."""

from __future__ import annotations

import pytest
import torch
from refused_family import else_refused
from tiny_families import FAMILIES
from tiny_qwen import qwen
from tiny_video import video_model
from torch import nn

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.loading.quantization import (
    check_quantised,
    keep_unpackable,
    quantised_modules,
    quantization,
)


def in_4_bits(model, folder):
    model.save_pretrained(folder)
    config = quantization(load_in_4bit=True)
    model = type(model).from_pretrained(folder, quantization_config=config).eval()
    keep_unpackable(model)
    return model


def expected(model):
    """Paths of the linear layers of the language model."""
    (root,) = find_adapter(model).parts(model).language_model
    inside = set(root.modules())
    return {
        name for name, one in model.named_modules() if one in inside and isinstance(one, nn.Linear)
    }


@pytest.mark.parametrize("name", FAMILIES)
@else_refused()
def test_what_is_quantised(name, tmp_path):
    family = FAMILIES[name]
    model = in_4_bits(family.model(), tmp_path)
    check_quantised(model, language_model_only=True)
    assert set(quantised_modules(model)) == expected(model)
    pitome_vlm.wrap(model, keep=0.3)
    with torch.no_grad():
        assert model(**family.batch(images=(1,), texts=(3,))).logits.isfinite().all()


def test_two_towers_stay_as_they_are(tmp_path):
    model = in_4_bits(video_model("video_llava"), tmp_path)
    assert set(quantised_modules(model)) == expected(model)


def test_qwen_s_tower_stays_as_it_is(tmp_path):
    model = in_4_bits(qwen(), tmp_path)
    assert set(quantised_modules(model)) == expected(model)
    blind = model.model.visual.blocks[0].attn
    blind.qkv = next(one for one in model.modules() if type(one).__name__ == "Linear4bit")
    with pytest.raises(RuntimeError, match=r"1 modules of 'visual' were quantised"):
        check_quantised(model, language_model_only=True)
