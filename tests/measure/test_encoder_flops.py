"""What `describe` says of encoders: counted FLOPs, the paper's figures, other image sizes."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_encoders import PATCHES, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pitome_vlm
from pitome_vlm.adapters.encoders import find_encoder
from pitome_vlm.measure.accounting import costs

# GFLOPs (multiply-adds) that the paper's tables 1 and 5 give for unmerged encoders, with shapes.
PAPER = {
    "DeiT-T": (1.2, hf.DeiTConfig, hf.DeiTModel, (192, 12, 3, 16)),
    "DeiT-S": (4.6, hf.DeiTConfig, hf.DeiTModel, (384, 12, 6, 16)),
    "MAE-L": (61.6, hf.ViTConfig, hf.ViTModel, (1024, 24, 16, 16)),
    "MAE-H": (167.4, hf.ViTConfig, hf.ViTModel, (1280, 32, 16, 14)),
    "CLIP-L": (80.85, hf.CLIPVisionConfig, hf.CLIPVisionModel, (1024, 24, 16, 14)),
}
# Not in its tables: 12 N C^2 + 2 N^2 C per layer.
FORMULA = {
    "DeiT-B": (17.54, hf.DeiTConfig, hf.DeiTModel, (768, 12, 12, 16)),
    "CLIP-B": (17.45, hf.CLIPVisionConfig, hf.CLIPVisionModel, (768, 12, 12, 16)),
}


def shaped(config, kind, shape):
    width, layers, heads, patch = shape
    with torch.device("meta"):
        return kind(
            config(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                patch_size=patch,
                image_size=224,
            )
        )


def gmacs(model, **options):
    pitome_vlm.wrap(model, **options)
    return sum(pitome_vlm.describe(model).after.layer_flops) / 2e9


def test_the_papers_bases():
    for name, (stated, *rest) in (PAPER | FORMULA).items():
        found = gmacs(shaped(*rest), keep=1.0)
        assert abs(found / stated - 1) < 0.03, (name, found)


def test_the_papers_ratios():
    deit, clip = (shaped(*PAPER[name][1:]) for name in ("DeiT-S", "CLIP-L"))
    # Table 5, r = .925.
    assert abs(gmacs(deit, ratio=0.925, algorithm="pitome") / 2.9 - 1) < 0.03
    assert 0.41 < 1 - gmacs(clip, ratio=0.95, algorithm="pitome") / 80.85 < 0.43


# One for each kind of layer and of head.
COUNTED = ("clip vision", "siglip vision", "vit", "deit", "mae", "dinov2 registers", "dinov3")


@pytest.mark.parametrize("names", [COUNTED[:3], COUNTED[3:5], COUNTED[5:], ("blip", "blip2")])
def test_flops_are_those_that_torch_counts(names):
    cases = (
        {"ratio": 0.9, "algorithm": "pitome"},
        {"keep": 0.4},
        {"keep": 0.5, "algorithm": "visionzip", "layers": (1,), "placement": "after_layer"},
    )
    for name in names:
        model = TINY[name].model()
        encoder, pixels = find_encoder(model), TINY[name].inputs(1)["pixel_values"]
        for options in cases:
            pitome_vlm.wrap(model, **options)
            # Of the fused kernels on a CPU torch counts nothing.
            counted = FlopCounterMode(display=False)
            with counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                encoder(pixels)
            stated = pitome_vlm.describe(model)
            share = counted.get_total_flops() / stated.after.total_flops
            assert abs(share - 1) < 0.01, (name, options)
            assert stated.after.total_flops < stated.before.total_flops


def test_what_is_said():
    model = TINY["dinov2"].model()
    plan = pitome_vlm.describe(model)
    assert not plan.wrapped
    assert plan.config.keep == 0.25
    pitome_vlm.wrap(model, ratio=0.9, algorithm="tome")
    found = pitome_vlm.describe(model)
    assert found.wrapped
    assert (found.tokens_in, found.tokens_out) == (PATCHES + 1, 26)
    assert found.tower_steps == ((0, 36, 33), (1, 33, 30), (2, 30, 27), (3, 27, 25))
    assert "tome ratio=0.9: 37 -> 26 tokens per image of 48 x 48 pixels" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    assert "<table" in found._repr_html_()
    assert found.to_dict()["flops"]["with"] == found.after.total_flops
    larger = pitome_vlm.describe(model, image_size=(96, 64))
    assert larger.tokens_in == 12 * 8 + 1
    assert larger.after.total_flops > found.after.total_flops


def test_what_is_about_prompts_is_refused():
    model = TINY["clip"].model()
    with pytest.raises(TypeError, match="prefills nothing"):
        costs(model)
    pitome_vlm.wrap(model, ratio=0.9)
    with pytest.raises(ValueError, match="no prompt to shorten"):
        pitome_vlm.compact_inputs(model, **TINY["clip"].inputs())
