"""The attention that tokens are ranked by, and where algorithms that need it can be used."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import duplicated_image, tiny_batch, tiny_model

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters import merged_layer
from pitome_vlm.adapters.merged_layer import attention_received
from pitome_vlm.measure.visualize import source_map
from pitome_vlm.merge.algorithm import Algorithm
from pitome_vlm.merge.merge_pass import MergePass
from pitome_vlm.merge.plan import MergePlan
from pitome_vlm.wrapping.encode import planned_schedule
from pitome_vlm.wrapping.wrap import merging_of

RANKED = {"algorithm": "diffrate"}


def seen_attention(model, pixels, layer):
    """What an algorithm that merges neighbours is shown in a layer: [B, N] float32."""
    seen = {}

    def merge_neighbours(keys, n_out, *, ctx):
        seen[ctx.layer] = ctx.required_attention()
        cells = torch.arange(keys.shape[1]) * n_out // keys.shape[1]
        return MergePlan.from_assignment(cells.expand(keys.shape[:2]), n_out)

    base, merging = merging_of(model)
    spy = Algorithm("spy", merge_neighbours, "test", pairwise=False, needs_attention=True)
    merge_pass = MergePass(
        config=merging.config,
        schedule=merging.plan(base).schedule,
        algorithm=spy,
        grid=merging.adapter.tower_shape(base).grid,
    )
    merging.adapter.encode(base, {"pixel_values": pixels}, merge_pass)
    return seen[layer]


@pytest.mark.parametrize(
    ("kind", "attention", "layer"),
    [
        *(("clip", "eager", 0), ("clip", "sdpa", 3), ("clip_full", "eager", 3)),
        *(("siglip", "sdpa", 0), ("siglip", "eager", 3), ("siglip_default", "sdpa", 3)),
    ],
)
def test_is_the_models_own_attention(shared, kind, attention, layer):
    pixels = tiny_batch(kind, (2,), (3,))["pixel_values"]
    tower = shared(tiny_model, kind, attention="eager").model.vision_tower
    with torch.no_grad():
        own = tower(pixels, output_attentions=True).attentions[layer].mean(1)
    row = own[:, 0] if kind.startswith("clip") else own.mean(1)
    leading = 0 if kind == "siglip" else 1
    model = pitome_vlm.wrap(
        shared(tiny_model, kind, attention=attention), tokens=100, layers=(layer,), **RANKED
    )
    ours = seen_attention(model, pixels, layer)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, row[:, leading:], atol=1e-5, rtol=0)
    assert ours.std() > 1e-4  # the oracle can tell tokens apart


def test_long_images_are_ranked_in_pieces(monkeypatch):
    """The attention of 16,000 patches of a Qwen tower would take a gigabyte for every head."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 2, 50, 8, generator=generator) for _ in range(2))
    bias = torch.rand(3, 1, 1, 50, generator=generator)
    whole = attention_received(query, key, bias, 0.3, False)
    monkeypatch.setattr(merged_layer, "WHOLE_UP_TO", 40)
    monkeypatch.setattr(merged_layer, "PIECE", 7 * 50)
    most, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda own, dim: most.append(own.numel()) or softmax(own, dim)
    )
    torch.testing.assert_close(attention_received(query, key, bias, 0.3, False), whole)
    assert max(most) == 7 * 50


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_merged_token_gets_what_its_members_got(shared, kind):
    model = shared(tiny_model, kind)
    pixels = duplicated_image(model)  # neighbours 2i and 2i + 1 are equal
    whole = seen_attention(pitome_vlm.wrap(model, ratio=0.5, layers=(3,), **RANKED), pixels, 3)
    pitome_vlm.wrap(model, ratio=0.5, layers=(1, 3), **RANKED)
    merged = seen_attention(model, pixels, 3)
    torch.testing.assert_close(merged, whole.view(1, 72, 2).sum(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["diffrate", "visionzip", "vispruner", "scope", "holov"])
@pytest.mark.parametrize("stage", ["projector", "both"])
def test_outside_the_tower_it_is_refused_by_name(shared, algorithm, stage):
    model = shared(tiny_model)
    with pytest.raises(ValueError, match=f"algorithm '{algorithm}'.*stage must be 'tower'"):
        pitome_vlm.wrap(model, keep=0.5, algorithm=algorithm, stage=stage)


class Pixels:
    """An image processor that returns one prepared image."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __call__(self, images, return_tensors):
        return {"pixel_values": self.pixels}


@pytest.mark.parametrize("kind", ["clip", "clip_full", "siglip"])
def test_source_maps_show_what_was_dropped(shared, kind):
    model, image = shared(tiny_model, kind), Image.new("RGB", (96, 96))
    processor = Pixels(tiny_batch(kind, (1,), (3,))["pixel_values"])
    whole = planned_schedule(model, MergeConfig(keep=1.0)).tokens_in

    def seen(**options):
        pitome_vlm.wrap(model, tokens=40, **options)
        found = source_map(model, processor, image)
        assert found.tokens == 40
        return found

    one = seen(algorithm="diffrate", layers=(2,))
    assert one.seen.sum() == 144 - (whole - 40) // 2
    assert seen(algorithm="divprune").seen.sum() == 40 - (whole - 144)
    # Dropped in any of several layers, as a patch or as a part of a group, is dropped.
    layers = seen(algorithm="diffrate")
    assert 40 <= layers.seen.sum() + (whole - 144) < 144
    assert seen(algorithm="visionzip").seen is None
