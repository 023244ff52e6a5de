"""Vision towers: found by structure, counted exactly, refused by name where they cannot merge."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny import IMAGE
from tiny_anyres import PINS
from transformers import (
    Aimv2VisionConfig,
    BeitConfig,
    ChineseCLIPVisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MLCDVisionConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.adapters.tower import encoding
from pitome_vlm.wrapping.encode import encode_images
from pitome_vlm.wrapping.wrap import is_wrapped, merging_of

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
INSIDE = {
    "clip": CLIPVisionConfig(**SIZE, projection_dim=16),
    "siglip": SiglipVisionConfig(**SIZE),
    "chinese_clip": ChineseCLIPVisionConfig(**SIZE, projection_dim=16),
    "aimv2": Aimv2VisionConfig(**SIZE),
    "dinov2": Dinov2Config(**SIZE, layerscale_value=0.5),
    "dinov2_registers": Dinov2WithRegistersConfig(**SIZE, layerscale_value=0.5),
}
# Transformers 4.57 cannot give the hidden states of this tower.
if "kwargs" in inspect.signature(InternVLVisionModel.forward).parameters:
    INSIDE["internvl"] = InternVLVisionConfig(
        **SIZE, use_qk_norm=True, norm_type="rms_norm", layer_scale_init_value=0.5
    )
CLASSLESS = ("siglip", "aimv2")
AFTER = {
    "vit": ViTConfig(**SIZE),
    "beit": BeitConfig(**SIZE),
    # Rotary positions in its attention, otherwise built like CLIP.
    "mlcd": MLCDVisionConfig(**SIZE),
}
NEITHER = {
    # Packed patches of any image: LLaVA's classes cannot call it. Checkpoints of SigLIP2 for
    # one image size are siglip_vision_model.
    "siglip2": Siglip2VisionConfig(
        **{name: value for name, value in SIZE.items() if name != "image_size"}, num_patches=64
    ),
}


def model_on(vision, strategy="default", kind="llava", **options):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    options |= {"vision_config": vision, "text_config": text, "image_token_index": IMAGE}
    options["vision_feature_select_strategy"] = strategy
    if kind == "next":
        config = LlavaNextConfig(**options, image_grid_pinpoints=PINS)
        return LlavaNextForConditionalGeneration(config).eval()
    return LlavaForConditionalGeneration(LlavaConfig(**options)).eval()


def plain_counts(model, **vision):
    with torch.no_grad():
        out = model.model.get_image_features(**vision)
    return [len(one) for one in getattr(out, "pooler_output", out)]


@pytest.mark.parametrize("name", [*INSIDE, *AFTER])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_every_tower_merges_after_it_to_the_promised_count(name, strategy):
    model = model_on((INSIDE | AFTER)[name], strategy)
    pixels = torch.randn(2, 3, 64, 64)
    full = plain_counts(model, pixel_values=pixels)
    state = torch.random.get_rng_state()
    pitome_vlm.wrap(model, keep=0.25, stage="projector")
    described = pitome_vlm.describe(model)
    assert torch.equal(state, torch.random.get_rng_state())
    visual = encode_images(model, pixels)
    assert [described.tokens_in] * 2 == full == visual.full_counts
    assert visual.counts == [described.tokens_out] * 2


@pytest.mark.parametrize("name", [name for name in INSIDE if name.startswith("dinov2")])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_merging_inside_dino_keeps_class_token_and_registers(name, strategy):
    """With registers four more tokens reach the language model, which no merge may touch."""
    model, pixels = model_on(INSIDE[name], strategy), torch.randn(2, 3, 64, 64)
    (full, _) = plain_counts(model, pixel_values=pixels)
    with torch.no_grad():
        plain = model.model.get_image_features(pixel_values=pixels)
        whole = encode_images(pitome_vlm.wrap(model, keep=1.0, stage="tower"), pixels)
        merged = encode_images(pitome_vlm.wrap(model, keep=0.25, stage="tower"), pixels)
    for one, other in zip(getattr(plain, "pooler_output", plain), whole.features, strict=True):
        assert torch.equal(one, other)
    assert merged.full_counts == [full] * 2
    assert merged.counts == [pitome_vlm.describe(model).tokens_out] * 2
    kept = full - 64
    for source in merged.source_maps:
        sizes = source.bincount(minlength=merged.counts[0])
        assert source[:kept].tolist() == list(range(kept))
        assert (sizes[:kept] == 1).all()
        assert sizes.sum() == full


@pytest.mark.parametrize("name", AFTER)
def test_an_unknown_tower_is_refused_inside_with_what_was_looked_for(name):
    model = model_on(AFTER[name])
    with pytest.raises(TypeError, match=r"layer_norm1.*q_proj.*InternVL.*projector"):
        pitome_vlm.wrap(model, keep=0.25, stage="tower")
    assert not is_wrapped(model)


@pytest.mark.parametrize("name", NEITHER)
def test_a_tower_without_a_promised_count_is_refused_by_name(name):
    model = model_on(NEITHER[name], "full")
    with pytest.raises(TypeError, match=r"vision tower is not supported.*no count can be promised"):
        pitome_vlm.wrap(model, keep=0.25, stage="projector")
    assert not is_wrapped(model)


@pytest.mark.parametrize(
    ("name", "attention"),
    # Transformers 4.57 has no other implementation for Chinese CLIP.
    [
        *[
            (name, kind)
            for name in ("clip", "siglip", "aimv2", "dinov2")
            for kind in ("sdpa", "eager")
        ],
        *[("internvl", kind) for kind in ("sdpa", "eager") if "internvl" in INSIDE],
        ("chinese_clip", "eager"),
        ("dinov2_registers", "sdpa"),
    ],
)
def test_a_layer_that_merges_nothing_computes_what_its_class_does(name, attention):
    """The layers are rebuilt by hand, so every tower that is let in has to agree with itself."""
    model = model_on(INSIDE[name], "full" if name in CLASSLESS else "default")
    model.model.vision_tower.set_attn_implementation(attention)
    pitome_vlm.wrap(model, keep=0.5, stage="tower")
    base, merging = merging_of(model)
    tower, pixels = base.model.vision_tower, torch.randn(2, 3, 64, 64)
    merge_pass = merging.plan(base).new_pass()
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
        n = expected[0].shape[1]
        # Every token is of size one, which makes every layer go the long way.
        idle = merge_pass.fresh()
        idle.sizes[-1] = torch.ones(2, n)
        idle._after.clear()
        with encoding(tower, idle):
            found = tower(pixels, output_hidden_states=True).hidden_states
    used = merge_pass.schedule.used_layers
    for one, two in zip(expected[: used + 1], found[: used + 1], strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)
    assert used > 1


@pytest.mark.parametrize(("name", "strategy"), [("vit", "default"), ("aimv2", "full")])
def test_tiles_merge_after_an_unknown_tower(name, strategy):
    model = model_on((INSIDE | AFTER)[name], strategy, kind="next")
    sizes = torch.tensor([[100, 180], [1, 50]])
    tiles = [5, 3]
    pixels = torch.randn(2, max(tiles), 3, 64, 64)
    full = plain_counts(model, pixel_values=pixels, image_sizes=sizes)
    pitome_vlm.wrap(model, keep=0.25, stage="projector")
    visual = encode_images(model, pixels, image_sizes=sizes)
    assert visual.full_counts == full
    adapter = find_adapter(model)
    assert [adapter.footprint(model, image_size=tuple(s)).full for s in sizes.tolist()] == full
    assert visual.counts == [max(2, int(n * 0.25 + 0.5)) for n in full]


@pytest.mark.parametrize("layers", [[-2, 1], [1, 2, 3]])
@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("kind", ["llava", "next"])
def test_lists_of_feature_layers(name, layers, kind):
    strategy = "default" if name == "clip" else "full"
    model = model_on(INSIDE[name], strategy, kind=kind, vision_feature_layer=layers)
    vision = {"pixel_values": torch.randn(1, 3, 64, 64)}
    if kind == "next":
        vision = {
            "pixel_values": torch.randn(1, 3, 3, 64, 64),
            "image_sizes": torch.tensor([[60, 120]]),
        }
    (full,) = plain_counts(model, **vision)
    for stage in ("tower", "projector", "both"):
        visual = encode_images(pitome_vlm.wrap(model, keep=0.3, stage=stage), **vision)
        assert visual.full_counts == [full]
        assert visual.counts == [int(full * 0.3 + 0.5)]
