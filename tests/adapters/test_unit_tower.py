"""Towers that pack units of 2x2 patches, merged inside: Qwen2-VL, 2.5, 3, 3.5 and GLM-4V."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from flash import NAME as FLASH
from flash import install as install_flash
from flash import widths
from peft import LoraConfig, get_peft_model
from refused_family import SERVED
from slow_units import (
    angles_of,
    labels_of,
    places_of,
    slow_tower,
    watched,
    weights_and_values,
)
from tiny_families import FAMILIES
from tiny_qwen import pixels, qwen
from torch.utils.flop_counter import FlopCounterMode

import pitome_vlm
from pitome_vlm import MergeConfig, encode_images
from pitome_vlm.adapters import find_adapter, generic
from pitome_vlm.adapters.unit_parts import unit_towers
from pitome_vlm.measure.flops import tower_flops
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.algorithm import Algorithm
from pitome_vlm.merge.steps import few_layers
from pitome_vlm.wrapping.wrap import merging_of, schedule_of

RAGGED = [(1, 8, 12), (1, 10, 8), (1, 4, 2), (1, 2, 2)]
OTHERS = ("qwen3_vl", "qwen3_5", "glm4v") if SERVED else ()
NAMES = ("qwen2_vl", "qwen2_5_vl", *OTHERS)


def model_of(name):
    return qwen(name) if name.startswith("qwen2") else FAMILIES[name].model()


def images(name, grids, seed=1):
    if name.startswith("qwen2"):
        values = pixels(grids, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(sum(map(math.prod, grids)), 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": values, "image_grid_thw": torch.tensor(grids)}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def tower_of(model):
    return unit_towers(find_adapter(model).parts(model).vision_tower)[0]


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def encoded_pass(model, inputs, algorithm=None, **changes):
    """The pass of an encoding, with another schedule where asked, and what the tower did."""
    base, merging = merging_of(model)
    merge_pass = merging.plan(base, inputs).new_pass()
    if algorithm is not None:
        tome = algorithms.get("tome")
        merge_pass = dataclasses.replace(merge_pass, algorithm=algorithm, finisher=tome)
    if changes:
        schedule = dataclasses.replace(merge_pass.schedule, **changes)
        merge_pass = dataclasses.replace(merge_pass, schedule=schedule)
    with watched(tower_of(model)) as seen, torch.no_grad():
        encoded = merging.adapter.encode(base, inputs, merge_pass)
    return merge_pass, seen, encoded[0].visual


def tower_order(visual, grids):
    """The units in the order of the tower, window by window."""
    if not hasattr(visual, "fullatt_block_indexes"):
        return None
    side, order, start = 2, [], 0
    for frames, rows, columns in grids:
        rows, columns = rows // 2, columns // 2
        for _ in range(frames):
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    for y in range(top, min(rows, top + side)):
                        own = range(left, min(columns, left + side))
                        order += [start + y * columns + x for x in own]
            start += rows * columns
    return torch.tensor(order)


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_is_what_a_slow_tower_computes(name, kind):
    model, grids = model_of(name), RAGGED if kind == "image" else [(3, 8, 12), (2, 4, 6)]
    visual, inputs = tower_of(model), images(name, grids)
    if kind == "video":
        inputs = {
            "pixel_values_videos": inputs["pixel_values"],
            "video_grid_thw": inputs["image_grid_thw"],
        }
    with watched(visual) as plain:
        getattr(model.model, f"get_{kind}_features")(**inputs)
    order = tower_order(visual, grids)
    places = places_of(grids, order)
    for mine, own in zip(angles_of(places, 8), plain["angles"], strict=True):
        torch.testing.assert_close(mine, own, atol=1e-4, rtol=0)
    for options in ({}, {"stage": "tower"}, {"ratio": 0.8}, {"stage": "tower", "layers": (0, 1)}):
        pitome_vlm.wrap(model, **{"keep": None if "ratio" in options else 0.3} | options)
        merge_pass, seen, tokens = encoded_pass(model, inputs)
        assert seen["rows"][-1] < seen["rows"][0]
        plans = {layer: (plan.assign, plan.kept) for layer, plan in merge_pass.plans.items()}
        expected, levels = slow_tower(visual, plain, places, plans)
        if order is not None:
            expected = torch.empty_like(expected).index_copy(0, order, expected)
        assert relative(seen["features"], expected) < 2e-5
        for one, two in zip(seen["levels"], levels, strict=True):
            assert relative(one, two) < 2e-5
        if kind == "image" and options == {"stage": "tower"}:
            # Nothing is left to merge, so that tokens are named as in the tower.
            named = torch.arange(sum(tokens.full_counts))
            for _, kept in plans.values():
                named = named[kept[0]]
            cells = named if order is None else order[named]
            starts = torch.tensor([0, *tokens.full_counts]).cumsum(0)
            found = [one + start for one, start in zip(tokens.anchors, starts, strict=False)]
            assert torch.equal(torch.cat(found), cells.sort().values)
        # Every token is the size-weighted mean of the groups that it was made of.
        own = expected.split([math.prod(grid) // 4 for grid in grids])
        for values, feature, source in zip(own, tokens.features, tokens.source_maps, strict=True):
            means = [values[source == token].mean(0) for token in range(len(feature))]
            assert relative(feature, torch.stack(means)) < 2e-5


@torch.no_grad()
def test_an_image_alone_is_what_it_is_in_a_batch(name):
    model = model_of(name)
    inputs = images(name, RAGGED)
    parts = inputs["pixel_values"].split([math.prod(grid) for grid in RAGGED])
    for stage in ("both", "tower"):
        pitome_vlm.wrap(model, keep=0.3, stage=stage)
        together = encode_images(model, **inputs)
        assert together.counts == [max(1, math.floor(0.3 * n + 0.5)) for n in together.full_counts]
        for index, (grid, values) in enumerate(zip(RAGGED, parts, strict=True)):
            alone = encode_images(model, values, image_grid_thw=torch.tensor([grid]))
            assert torch.equal(alone.source_maps[0], together.source_maps[index])
            torch.testing.assert_close(
                alone.features[0], together.features[index], atol=2e-5, rtol=1e-4
            )


@torch.no_grad()
def test_merging_nothing_in_merging_blocks_is_the_tower(name):
    model, inputs = model_of(name), images(name, RAGGED)
    with watched(tower_of(model)) as plain:
        model.model.get_image_features(**inputs)
    typical = find_adapter(model).tower_shape(model).n_tokens
    nothing = {"tower": ((0, typical), (1, typical)), "projector": (), "typical": True}
    pitome_vlm.wrap(model, keep=1.0)
    merge_pass, seen, _ = encoded_pass(model, inputs, **nothing)
    assert sorted(merge_pass.plans) == [0, 1]
    assert relative(seen["features"], plain["features"]) < 1e-6


@torch.no_grad()
def test_equal_units_merge_without_loss(name):
    """Pairs of equal neighbours, with positions switched off, at half of the tokens."""
    model = model_of(name)
    visual = tower_of(model)
    visual.rotary_pos_emb.inv_freq.zero_()
    for part in ("pos_embed", "embeddings"):
        if hasattr(visual, part):
            for weight in getattr(visual, part).parameters():
                weight.zero_()
    grid = (1, 8, 8)
    inputs = images(name, [grid])
    units = inputs["pixel_values"].view(4, 2, 2, 4, -1)
    inputs["pixel_values"] = units[:, :, :1].expand_as(units).reshape(64, -1)
    with watched(visual) as plain:
        model.model.get_image_features(**inputs)
    pairs = {"keep": 0.5, "algorithm": "tome", "stage": "tower", "layers": (0,)}
    for proportional in (True, False):
        pitome_vlm.wrap(model, **pairs, proportional_attention=proportional)
        _, seen, _ = encoded_pass(model, inputs)
        assert seen["rows"][-1] == 32
        assert relative(seen["features"], plain["features"]) < 1e-5


@torch.no_grad()
def test_repeated_units_weigh_what_they_stand_for(name):
    """Where only some units are repeated, log(size) is what keeps the answer."""
    model = model_of(name)
    visual = tower_of(model)
    visual.rotary_pos_emb.inv_freq.zero_()
    for part in ("pos_embed", "embeddings"):
        if hasattr(visual, part):
            for weight in getattr(visual, part).parameters():
                weight.zero_()
    inputs = images(name, [(1, 4, 4)])
    values = inputs["pixel_values"].view(4, 4, -1)
    values[1] = values[0]
    with watched(visual) as plain:
        model.model.get_image_features(**inputs)
    found, three_of_four = [], {"keep": 0.75, "algorithm": "tome", "stage": "tower", "layers": (0,)}
    for proportional in (True, False):
        pitome_vlm.wrap(model, **three_of_four, proportional_attention=proportional)
        _, seen, _ = encoded_pass(model, inputs)
        assert seen["rows"][-1] == 12
        found.append(relative(seen["features"], plain["features"]))
    assert found[0] < 1e-5 < 1e-3 < found[1]


def loss_of(model, inputs):
    tokens = encode_images(model, **inputs)
    return torch.cat(tokens.features).float().square().mean()


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    loss_of(model, inputs).backward()
    named = tower_of(model).named_parameters()
    return {name: one.grad.clone() for name, one in named if one.grad is not None}


def test_gradients_with_and_without_checkpointing(name):
    model, inputs = model_of(name), images(name, RAGGED)
    pitome_vlm.wrap(model, keep=0.3, layers=(0, 1)).train()
    plain = gradients(model, inputs)
    assert all(plain[f"blocks.{layer}.attn.qkv.weight"].any() for layer in (0, 1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, inputs)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_kernels_agree(name, monkeypatch):
    """Eager, sdpa and flash, whose rows are all images in one call."""
    model, inputs = model_of(name), images(name, RAGGED)
    pitome_vlm.wrap(model, keep=0.3, layers=(0, 1))
    tower, found = tower_of(model), {}
    for kernel in ("eager", "sdpa"):
        tower.config._attn_implementation_internal = kernel
        found[kernel] = torch.cat(encode_images(model, **inputs).features)
    install_flash(monkeypatch)
    tower.config._attn_implementation_internal = FLASH
    found["flash"] = torch.cat(encode_images(model, **inputs).features)
    # With channels for log(size) where something is merged.
    assert set(widths) == {8, 16}
    for kernel in ("sdpa", "flash"):
        torch.testing.assert_close(found[kernel], found["eager"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision(name):
    model, inputs = model_of(name), images(name, RAGGED)
    pitome_vlm.wrap(model, keep=0.3)
    exact = encode_images(model, **inputs)
    half = encode_images(model.to(torch.bfloat16), **inputs)
    assert half.features[0].dtype == torch.bfloat16
    assert half.counts == exact.counts
    assert all(one.isfinite().all() for one in half.features)


@torch.no_grad()
def test_every_algorithm_and_option(name):
    model, inputs = model_of(name), images(name, RAGGED)
    full = [math.prod(grid) // 4 for grid in RAGGED]
    options = [{"algorithm": one} for one in algorithms.available() if one != "none"]
    options += [{"placement": "after_layer"}, {"metric": "hidden"}, {"weighted": False}]
    options += [{"restore_order": False}, {"proportional_attention": False}, {"stage": "projector"}]
    for own in options:
        pitome_vlm.wrap(model, keep=0.3, **own)
        tokens = encode_images(model, **inputs)
        assert tokens.counts == [max(1, math.floor(0.3 * n + 0.5)) for n in full], own
        assert all(one.isfinite().all() for one in tokens.features), own
        assert [float(one.sum()) for one in tokens.sizes()] == full, own
    pitome_vlm.wrap(model, keep="auto")
    assert len(encode_images(model, **inputs).counts) == len(full)


@torch.no_grad()
def test_the_attention_that_units_get(name):
    """By the dense matrix of an image: the mean over heads and queries, the sum over a unit."""
    model, grid = model_of(name), (1, 8, 8)
    inputs, visual = images(name, [grid]), tower_of(model)
    with watched(visual) as plain:
        model.model.get_image_features(**inputs)
    places = places_of([grid], tower_order(visual, [grid]))
    asked = []

    def spy(keys, n_out, *, ctx):
        asked.append(ctx.required_attention())
        return algorithms.get("tome").plan(keys, n_out, ctx=ctx)

    ranked = Algorithm("spy", spy, "test", needs_attention=True)
    for layer, block in enumerate(visual.blocks):
        asked.clear()
        pitome_vlm.wrap(model, keep=0.75, stage="tower", layers=(layer,))
        merge_pass, _, _ = encoded_pass(model, inputs, algorithm=ranked)
        assert list(merge_pass.plans) == [layer]
        kind = labels_of(plain["ends"][layer])
        state = plain["inputs"][layer], places, kind, torch.arange(16), torch.ones(16)
        weights, _ = weights_and_values(block, *state)
        segments = torch.bincount(kind)[kind]
        expected = (weights.mean(0).sum(0) / segments).view(-1, 4).sum(1)
        found = torch.cat([one.flatten() for one in asked])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_visionzip_and_diffrate_merge(name):
    """One step is in the last block, as in other towers; several are in few of them."""
    model, inputs = model_of(name), images(name, RAGGED)
    layers = len(tower_of(model).blocks)
    for algorithm, expected in (("visionzip", [layers - 1]), ("diffrate", [*few_layers(layers)])):
        pitome_vlm.wrap(model, keep=0.3, algorithm=algorithm)
        assert list(encoded_pass(model, inputs)[0].plans) == expected


def test_copies_and_pickles_merge_as_the_model(name):
    model, inputs = model_of(name), images(name, RAGGED)
    classes = [type(module) for module in model.modules()]
    pitome_vlm.wrap(model, keep=0.3)
    expected = torch.cat(encode_images(model, **inputs).features)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(torch.cat(encode_images(other, **inputs).features), expected)
    pitome_vlm.unwrap(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(key.startswith("_pitome") for one in model.modules() for key in one.__dict__)


def test_lora_in_the_tower_is_used_and_trained(name):
    model, inputs = model_of(name), images(name, RAGGED)
    pitome_vlm.wrap(model, keep=0.3)
    expected = torch.cat(encode_images(model, **inputs).features)
    config = LoraConfig(target_modules=r".*blocks.*\.(qkv|proj)", init_lora_weights=True)
    tuned = get_peft_model(model, config)
    assert torch.equal(torch.cat(encode_images(tuned, **inputs).features), expected)
    loss_of(tuned, inputs).backward()
    named = {key: one for key, one in tuned.named_parameters() if "lora_B" in key}
    assert all(one.grad is not None and one.grad.any() for one in named.values())
    with torch.no_grad():
        for one in named.values():
            one.normal_(0, 0.1)
    assert not torch.equal(torch.cat(encode_images(tuned, **inputs).features), expected)


@pytest.mark.parametrize("placement", ["after_attention", "after_layer"])
def test_flops_are_what_is_computed(name, placement, monkeypatch):
    # What comes after the tower is counted elsewhere.
    monkeypatch.setattr(generic, "merge_grids", stop)
    model = model_of(name)
    model.set_attn_implementation("eager")
    every = (
        {"keep": 1.0},
        {"keep": 0.25, "stage": "tower"},
        {"keep": 0.5, "layers": (0, 1)},
        {"keep": 0.01, "layers": (0, 1)},  # A unit is left of every window.
        {"keep": 0.5, "algorithm": "diffrate"},  # Ranks by attention between all patches.
        {"keep": 0.5, "algorithm": "vispruner"},
    )
    # Of full windows, and with a row and a column of windows that are cut.
    for grid, some in (((1, 16, 16), every), ((1, 10, 14), every[1::2])):
        inputs, adapter = images(name, [grid]), find_adapter(model)
        footprint = adapter.footprints(model, inputs)["image"][0]
        for options in some:
            config = MergeConfig(**{"algorithm": "tome"} | options, placement=placement)
            pitome_vlm.wrap(model, config=config)
            base, merging = merging_of(model)
            plan = merging.plan(base, inputs)
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad(), pytest.raises(StopIteration):
                merging.adapter.encode(base, inputs, plan.new_pass())
            (found,), _, _ = tower_flops(base, plan.schedule, config, footprint)
            assert found == counter.get_total_flops(), (grid, options)
    told = str(pitome_vlm.describe(model))
    assert "tokens by tower layer" in told


def stop(*call):
    raise StopIteration


def test_few_layers_merge_where_none_are_named(name):
    assert few_layers(32) == (7, 15)
    assert few_layers(27) == (5, 12)
    assert few_layers(2) == few_layers(1) == (0,)
    model = model_of(name)
    schedule = schedule_of(pitome_vlm.wrap(model, keep=0.25))
    layers = len(tower_of(model).blocks)
    assert [layer for layer, _ in schedule.tower] == [*few_layers(layers)]
    assert schedule.tokens_out == math.floor(schedule.tokens_in / 4 + 0.5)


def test_a_tower_of_other_parts_is_left_alone(name):
    model = model_of(name)
    for block in tower_of(model).blocks:
        block.attn.key_value = block.attn.__dict__["_modules"].pop("qkv")
    assert find_adapter(model).tower_shape(model).projector_only
    pitome_vlm.wrap(model, keep=0.25)
    with pytest.raises(ValueError, match="stage='tower' merges inside the vision tower, which"):
        pitome_vlm.wrap(model, keep=0.25, stage="tower")
