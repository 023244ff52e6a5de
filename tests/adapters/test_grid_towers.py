"""Merging inside towers that give all of their patches back, on tiny random models of each family.

A check loops over all families and names those that fail.
"""

from __future__ import annotations

import copy
import dataclasses

import flash
import pytest
import torch
from refused_family import SERVED, else_refused, refused
from tiny_families import FAMILIES
from tiny_family import SPECIAL, drawn
from torch.utils.flop_counter import FlopCounterMode

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.adapters.families import FAMILIES as RECORDS
from pitome_vlm.adapters.family import vit_tokens
from pitome_vlm.measure.accounting import costs
from pitome_vlm.merge import algorithms
from pitome_vlm.wrapping.wrap import merging_of

GRID = [name for one in RECORDS if one.tower == "grid" for name in one.model_types]
GRID = [name for name in [*GRID, "llava, pixtral"] if name in FAMILIES]
GREEDY = {"max_new_tokens": 3, "do_sample": False}
INSIDE = {"stage": "tower", "layers": (0, 2)}
PARTS = 4


def model_of(name, layers=4, **changes):
    """A model of a family with a tower of several layers."""
    family = FAMILIES[name]
    config = family.build().config
    config.vision_config.num_hidden_layers = layers
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = drawn(type(family.build())(config), family.spread)
    model.config.vision_config._attn_implementation = "sdpa"
    return model


def every_tower(check):
    """A test in several parts; where the families are not served, that they are refused."""

    @pytest.mark.parametrize("part", range(PARTS))
    def test(part):
        failed = {}
        for name in GRID[part::PARTS]:
            try:
                with torch.set_grad_enabled("gradient" in check.__name__):
                    check(name) if SERVED else refused(FAMILIES[name])
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())

    return test


def pixels_of(model, batch):
    names = {name for own in find_adapter(model).family.inputs.values() for name in own}
    return {name: value for name, value in batch.items() if name in names}


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def read_through(model, inputs, *counts, **options):
    """Features of all tokens after a tower that merges to shares of its patches."""
    pitome_vlm.wrap(model, keep=1.0, **INSIDE, **options)
    base, merging = merging_of(model)
    merge_pass = merging.plan(base, inputs).new_pass()
    n = merge_pass.schedule.n_tokens
    after = tuple(zip(INSIDE["layers"], (int(n * share) for share in counts), strict=False))
    schedule = dataclasses.replace(merge_pass.schedule, tower=after, projector=(n,))
    merge_pass = dataclasses.replace(merge_pass, schedule=schedule)
    (found,) = merging.adapter.encode(base, inputs, merge_pass)
    pitome_vlm.unwrap(model)
    return torch.cat(found.visual.features)


def own_features(model, inputs):
    found = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    parts = [found] if isinstance(found, torch.Tensor) else list(found)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def without_places(model):
    """The same model, whose patches are told apart by their pixels alone."""
    tower = find_adapter(model).parts(model).vision_tower
    for name, weight in [*tower.named_parameters(), *tower.named_buffers()]:
        if "position_embedding" in name or "inv_freq" in name:
            weight.zero_()
    return model


def of_two_patches(inputs):
    """The same pixels, with one patch over the left half of every image and another over the rest.

    Patches are 4 or 8 pixels wide.
    """
    values, generator = inputs["pixel_values"], torch.Generator().manual_seed(3)
    if "image_grid_thw" in inputs:
        left, right = torch.rand(2, *values.shape[1:], generator=generator)
        half = (torch.arange(len(values)) % 5 < 2)[:, None, None, None]
        return inputs | {"pixel_values": torch.where(half, left, right)}
    if values.dim() == 3:
        left, right = torch.rand(2, values.shape[-1], generator=generator)
        half = (torch.arange(values.shape[1]) % 5 < 2)[:, None]
        same = torch.where(half, left, right).expand_as(values)
        if "image_position_ids" in inputs:
            shown = (inputs["image_position_ids"] >= 0).all(-1)
        else:
            shown = torch.arange(values.shape[1]) < inputs["spatial_shapes"].prod(-1)[:, None]
        return inputs | {"pixel_values": torch.where(shown[..., None], same, 0.0)}
    left, right = torch.randn(2, 3, 8, 8, generator=generator)[..., :4, :4].repeat(1, 1, 2, 2)
    high, wide = (side // 8 for side in values.shape[-2:])
    same = torch.cat([left.repeat(1, high, wide // 2), right.repeat(1, high, wide - wide // 2)], -1)
    holds = (values != 0).flatten(-3).any(-1)[..., None, None, None]
    return inputs | {"pixel_values": torch.where(holds, same, values)}


def test_the_records_are_those_of_the_list():
    expected = {"internvl", "gemma3", "paligemma", "idefics3", "smolvlm", "aya_vision", "ovis2"}
    expected |= {
        "cohere2_vision",
        "deepseek_vl",
        "paddleocr_vl",
        "mistral3",
        "lighton_ocr",
        "lfm2_vl",
    }
    expected |= {"llava", "gemma4"}
    assert {name for one in RECORDS if one.tower == "grid" for name in one.model_types} == expected


@every_tower
def test_merging_nothing_in_merging_layers_is_the_tower(name):
    """To the last digits of float64; sdpa's float32 sums in blocks that depend on the padding."""
    model = model_of(name)
    inputs = pixels_of(model, FAMILIES[name].batch())
    bounds = {("eager", torch.float32): 1e-6, ("sdpa", torch.float32): 2e-6}
    # Ovis 2 rounds to float32 before it looks words up, PaddleOCR before it turns keys.
    rounded = name in ("ovis2", "paddleocr_vl")
    bounds["sdpa", torch.float64] = 1e-6 if rounded else 1e-12
    for (attention, dtype), bound in bounds.items():
        model.to(dtype).set_attn_implementation(attention)
        inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        expected = own_features(model, inputs)
        assert relative(read_through(model, inputs, 1.0, 1.0), expected) < bound, attention


@every_tower
def test_keeping_everything_is_bit_identical(name):
    model, batch = model_of(name), FAMILIES[name].batch()
    logits, answer = model(**batch).logits, model.generate(**batch, **GREEDY)
    classes = [type(module) for module in model.modules()]
    pitome_vlm.wrap(model, keep=1.0, **INSIDE)
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**batch, **GREEDY), answer)
    pitome_vlm.wrap(model, keep=0.25, **INSIDE)
    merged = model(**batch).logits
    assert pitome_vlm.describe(model).tower_steps
    pitome_vlm.wrap(model, keep=0.25, stage="projector")
    assert not pitome_vlm.describe(model).tower_steps
    assert not torch.equal(merged, model(**batch).logits)
    pitome_vlm.unwrap(model)
    assert torch.equal(model(**batch).logits, logits)
    assert [type(module) for module in model.modules()] == classes


@every_tower
def test_repeated_patches_are_merged_without_loss(name):
    model = without_places(model_of(name))
    inputs = of_two_patches(pixels_of(model, FAMILIES[name].batch()))
    expected = own_features(model, inputs)
    assert len(torch.unique(expected.round(decimals=3), dim=0)) > 1
    options = {"algorithm": "pitome_plus"}
    assert relative(read_through(model, inputs, 0.6, 0.4, **options), expected) < 1e-5
    if name != "ovis2":  # Its features are one of a few words.
        unweighted = read_through(model, inputs, 0.6, 0.4, **options, proportional_attention=False)
        assert relative(unweighted, expected) > 1e-4


@every_tower
def test_an_image_alone_is_the_image_in_a_batch(name):
    model, family = pitome_vlm.wrap(model_of(name), keep=0.3, **INSIDE), FAMILIES[name]
    together = pitome_vlm.encode_images(model, **pixels_of(model, family.batch()))
    alone = [
        pitome_vlm.encode_images(model, **pixels_of(model, family.collate([[one]])))
        for row in family.shown()
        for one in row
    ]
    maps = [source for visual in alone for source in visual.source_maps]
    assert all(map(torch.equal, maps, together.source_maps))
    features = torch.cat([one for visual in alone for one in visual.features])
    assert relative(torch.cat(together.features), features) < 1e-5
    tokens = [n for row in family.tokens() for image in row for n in image]
    assert all(abs(n - 0.3 * full) < 1 for n, full in zip(together.counts, tokens, strict=True))


@every_tower
def test_gradients_reach_the_tower_with_checkpointing_too(name):
    found = []
    batch = FAMILIES[name].batch()
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] >= SPECIAL)
    labels = batch["input_ids"].masked_fill(hidden, -100)
    for again in (False, True):
        model = pitome_vlm.wrap(model_of(name), keep=0.3, **INSIDE).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch | {"labels": labels}).loss.backward()
        tower = find_adapter(model).parts(model).vision_tower
        found.append([p.grad for p in tower.parameters() if p.grad is not None])
    assert any(grad.any() for grad in found[0])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice, atol=1e-7, rtol=1e-5)


@every_tower
def test_the_costs_are_what_is_computed(name):
    if name in ("lfm2_vl", "ovis2", "gemma4"):
        return  # They fill images up, and look features up in a table.
    family, model = FAMILIES[name], model_of(name)
    model.set_attn_implementation("eager")
    batch = family.batch(images=(1,), texts=(3,))
    inputs = pixels_of(model, batch)
    for stage in ("both", "tower", "projector", "ranked"):
        own = {"algorithm": "diffrate"} if stage == "ranked" else {"stage": stage}
        pitome_vlm.wrap(model, keep=0.25, **own)
        with FlopCounterMode(display=False) as counter:
            visual = pitome_vlm.encode_images(model, **inputs)
        count = costs(model, image_size=_size(model, inputs))
        said = (count.tower_flops + count.projector_flops) * len(visual.counts)
        assert said == pytest.approx(counter.get_total_flops(), rel=0.01), stage
    assert "visual tokens" in str(pitome_vlm.describe(model))


def _size(model, inputs):
    if "image_grid_thw" in inputs:
        return tuple(4 * side for side in inputs["image_grid_thw"][0, 1:].tolist())
    if "image_sizes" not in inputs:
        return None
    return tuple(inputs["image_sizes"][0].tolist())


@else_refused("idefics3", "gemma3", "mistral3")
def test_what_merges_in_the_tower_is_called_patches():
    for name, patches, what in (("idefics3", 64, " of a tile"), ("gemma3", 256, "")):
        model = model_of(name)
        assert vit_tokens(model.config) == patches
        told = pitome_vlm.describe(pitome_vlm.wrap(model, keep=0.25, **INSIDE))
        first, second = told.tower_steps
        assert first[1] == patches > first[2] == second[1] > second[2] > told.tokens_out
        steps = ", ".join(
            f"{layer}: {before} -> {after}" for layer, before, after in (first, second)
        )
        assert f"\npatches{what} by tower layer: {steps}\n" in str(told)
    model = pitome_vlm.wrap(model_of("mistral3"), keep=0.25, **INSIDE)
    told = pitome_vlm.describe(model, image_size=(64, 96))
    assert told.tower_steps[0][1] == 4 * told.tokens_in
    assert "\npatches by tower layer" in str(told)


class MeanOfFour(torch.nn.Module):
    """A projector for any number of feature layers, which that of this release does not take."""

    def forward(self, features, image_sizes):
        found, start = [], 0
        for high, wide in (image_sizes // 4).tolist():
            grid = features[start : start + high * wide].view(high // 2, 2, wide // 2, 2, -1)
            found.append(grid.mean((1, 3)).flatten(0, 1))
            start += high * wide
        return torch.cat(found)


@else_refused("mistral3")
@torch.no_grad()
def test_every_state_that_is_read_has_all_patches():
    for layers in ([-1, 1, 2], [3, 2]):
        model = model_of("mistral3", vision_feature_layer=layers)
        model.model.multi_modal_projector = MeanOfFour()
        inputs = pixels_of(model, FAMILIES["mistral3"].batch())
        assert relative(read_through(model, inputs, 1.0, 1.0), own_features(model, inputs)) < 1e-6
        seen = []
        hook = model.model.multi_modal_projector.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
        own_features(model, inputs)
        read_through(model, inputs, 0.5, 0.25)
        hook.remove()
        own, merged = (one.reshape(-1, one.shape[-1]) for one in seen)
        assert merged.shape == own.shape
        width = model.config.vision_config.hidden_size
        for depth, state in zip(layers, merged.split(width, -1), strict=True):
            share = 0.5 if depth in (1, 2) else 0.25
            kinds = len(torch.unique(state, dim=0))
            assert kinds == pytest.approx(share * len(state), rel=0.1), depth
        used = max(depth if depth > 0 else 5 + depth for depth in layers)
        assert find_adapter(model).tower_shape(model).used_layers == used


def slow_rotary(x, places, theta, scale):
    """[N, D] at rows and columns [N, 2]."""
    dim = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dim, 2).double() / dim)
    angles = torch.cat(
        [places[:, :1] * frequencies[0::2], places[:, 1:] * frequencies[1::2]], -1
    ).repeat(1, 2)
    half = torch.cat([-x[:, dim // 2 :], x[:, : dim // 2]], -1)
    return (x * angles.cos() + half * angles.sin()) * scale


def slow_layer(layer, hidden, places, sizes, plan):
    """A layer of Pixtral, head by head, with the groups of a plan."""
    attention = layer.attention
    normed = layer.attention_norm(hidden)
    parts = [getattr(attention, f"{name}_proj")(normed) for name in "qkv"]
    heads = []
    for q, k, v in zip(*(part.chunk(attention.num_heads, -1) for part in parts), strict=True):
        q = slow_rotary(q, places, 1e4, attention.head_dim**-0.5)
        logits = q @ slow_rotary(k, places, 1e4, 1.0).T + sizes.log()
        heads.append(logits.softmax(-1) @ v)
    hidden = hidden + attention.o_proj(torch.cat(heads, -1))
    if plan is not None:
        groups = [(plan == group).nonzero()[:, 0] for group in range(int(plan.max()) + 1)]
        weights = [sizes[own] / sizes[own].sum() for own in groups]
        hidden, places = (
            torch.stack(
                [(x[own] * w[:, None]).sum(0) for own, w in zip(groups, weights, strict=True)]
            )
            for x in (hidden, places)
        )
        sizes = torch.stack([sizes[own].sum() for own in groups])
    return hidden + layer.feed_forward(layer.ffn_norm(hidden)), places, sizes


@else_refused("mistral3")
@torch.no_grad()
def test_pixtral_is_a_slow_tower_with_mean_places():
    model, family = model_of("mistral3").double(), FAMILIES["mistral3"]
    model.model.vision_tower.patch_positional_embedding.double()
    inputs = pixels_of(model, family.batch(images=(1,), texts=(3,)))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    tower, plans, seen = model.model.vision_tower, [], []
    make = algorithms.get("tome").plan

    def remember(keys, n_out, *, ctx):
        plans.append(make(keys, n_out, ctx=ctx))
        return plans[-1]

    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    with pytest.MonkeyPatch.context() as patch:
        changed = dataclasses.replace(algorithms.get("tome"), plan=remember)
        patch.setattr(algorithms, "get", lambda _: changed)
        read_through(model, inputs, 0.6, 0.4, algorithm="tome")
    hook.remove()
    high, wide = (side // 4 for side in inputs["image_sizes"][0].tolist())
    places = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).double()
    hidden = tower.ln_pre(tower.patch_conv(inputs["pixel_values"])[0].flatten(1).T)
    sizes, source = torch.ones(len(hidden)).double(), torch.arange(len(hidden))
    assert len(plans) == 2
    merges = {0: plans[0].assign[0], 2: plans[1].assign[0]}
    for index, layer in enumerate(tower.transformer.layers):
        plan = merges.get(index)
        hidden, places, sizes = slow_layer(layer, hidden, places, sizes, plan)
        source = source if plan is None else plan[source]
    assert sizes.max() > 2
    # The tower's own angles are float32.
    torch.testing.assert_close(seen[0], hidden[source], atol=1e-5, rtol=1e-5)


@else_refused("gemma3", "mistral3", "lfm2_vl", "internvl")
@torch.no_grad()
def test_flash_kernels_read_sizes_from_channels(monkeypatch):
    flash.install(monkeypatch)
    for name in ("gemma3", "mistral3", "lfm2_vl", "internvl"):
        model = pitome_vlm.wrap(model_of(name), keep=0.3, **INSIDE)
        inputs = pixels_of(model, FAMILIES[name].batch())
        expected = torch.cat(pitome_vlm.encode_images(model, **inputs).features)
        tower = find_adapter(model).parts(model).vision_tower
        for module in tower.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = flash.NAME
        flash.widths.clear()
        found = torch.cat(pitome_vlm.encode_images(model, **inputs).features)
        assert set(flash.widths) == {8, 16}, name
        assert relative(found, expected) < 1e-5, name


@pytest.mark.parametrize("name", ["gemma3", "internvl", "mistral3", "lfm2_vl"])
@else_refused()
@torch.no_grad()
def test_every_algorithm(name):
    model, batch = model_of(name), FAMILIES[name].batch()
    for algorithm in algorithms.available():
        own = algorithms.get(algorithm)
        if algorithm == "none" or own.needs_grid:
            continue
        pitome_vlm.wrap(model, keep=0.3, algorithm=algorithm, stage="tower")
        assert pitome_vlm.describe(model).tower_steps
        assert model(**batch).logits.isfinite().all(), algorithm


@else_refused("gemma3", "internvl", "mistral3", "lfm2_vl")
@torch.no_grad()
def test_counts_of_its_own_and_half_precision():
    for name in ("gemma3", "internvl", "mistral3", "lfm2_vl"):
        model, batch = model_of(name), FAMILIES[name].batch()
        pitome_vlm.wrap(model, keep="auto", stage="both")
        cache = pitome_vlm.ImageCache()
        first = model(**batch, image_cache=cache).logits
        assert torch.equal(model(**batch, image_cache=cache).logits, first)
        assert cache.hits == 1
        half = copy.deepcopy(model).bfloat16()
        inputs = {
            key: value.bfloat16() if value.is_floating_point() else value
            for key, value in batch.items()
        }
        assert half(**inputs).logits.isfinite().all(), name


@else_refused("idefics3", "smolvlm")
@torch.no_grad()
def test_a_mask_over_a_part_of_a_tile_is_refused():
    for name in ("idefics3", "smolvlm"):
        model, batch = model_of(name), FAMILIES[name].batch()
        batch["pixel_attention_mask"][0, 0, 40:] = 0
        pitome_vlm.wrap(model, keep=0.3, stage="both")
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"hides a part of a tile.*stage=\"projector\""):
                call(**batch)
        pitome_vlm.wrap(model, keep=0.3, stage="projector")(**batch)


@else_refused("internvl")
@torch.no_grad()
def test_layers_that_nobody_reads_are_not_run():
    model, batch = model_of("internvl", vision_feature_layer=-2), FAMILIES["internvl"].batch()
    expected, ran = model(**batch).logits, []
    model.model.vision_tower.encoder.layer[-1].mlp.register_forward_hook(lambda *_: ran.append(1))
    pitome_vlm.wrap(model, keep=1.0, skip_unused_layers=True)
    assert torch.equal(model(**batch).logits, expected)
    pitome_vlm.wrap(model, keep=0.3)
    assert model(**batch).logits.isfinite().all()
    assert not ran
    # What a call reads decides.
    model(**batch, vision_feature_layer=-1)
    assert ran


@else_refused("paligemma")
@torch.no_grad()
def test_a_table_of_rotary_places_leaves_the_tower_alone():
    """Older releases of Pixtral look angles up, of which there are none between two places."""
    model = model_of("mistral3")
    rotary = model.model.vision_tower.patch_positional_embedding
    rotary.inv_freq = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"stage='tower' merges inside the vision tower, which"):
        pitome_vlm.wrap(model, keep=0.3, stage="tower")
    assert not pitome_vlm.describe(pitome_vlm.wrap(model, keep=0.3)).tower_steps
