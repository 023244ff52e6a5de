"""Images of any size: what comes out of tower, projector and packing, and how much of it."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tiny import IMAGE
from tiny_anyres import (
    ANYRES_KINDS,
    PINS,
    SIDE,
    SIZES,
    TILE,
    anyres_batch,
    anyres_model,
    anyres_pixels,
    tile_counts,
    unmerged,
)

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters import find_adapter
from pitome_vlm.merge import algorithms
from pitome_vlm.wrapping.encode import encode_images, planned_count, visual_token_counts
from pitome_vlm.wrapping.wrap import merging_of, schedule_of

THREE = [(100, 180), (150, 60), (90, 90)]


def seen_by_language_model(model, batch):
    """Columns that the language model was really given."""
    lengths = []

    def look(module, args, kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return lengths[0]


@pytest.mark.parametrize(("start", "keep"), [(0, 0.25), (1, 0.03)])
@pytest.mark.parametrize("kind", ["next", "onevision", "onevision_resampled"])
def test_the_language_model_sees_what_was_promised_for_every_size(shared, kind, start, keep):
    model = pitome_vlm.wrap(shared(anyres_model, kind, layers=3), keep=keep)
    assert len(SIZES) >= 20
    for size in SIZES[start::2]:
        batch = anyres_batch(model, rows=((size,),), texts=(4,))
        full = int((batch["input_ids"] == IMAGE).sum())
        described = pitome_vlm.describe(model, image_size=size)
        assert described.tokens_in == full, size
        newlines = described.footprint.newlines
        expected = max(math.floor(keep * full + 0.5), 2 if newlines else 1)
        assert described.tokens_out == expected, size
        seen = seen_by_language_model(model, batch)
        assert seen == batch["input_ids"].shape[1] - full + expected, size


@pytest.mark.parametrize("kind", ANYRES_KINDS)
def test_identity_grouping_reproduces_the_features(shared, kind):
    """Through spreading, packing and regrouping, with nothing merged: not one bit differs."""
    model = pitome_vlm.wrap(shared(anyres_model, kind), keep=1.0)
    vision = anyres_pixels(model, list(SIZES))
    with torch.no_grad():
        ours = encode_images(model, **vision)
    for expected, found, anchors, source in zip(
        unmerged(model, vision), ours.features, ours.anchors, ours.source_maps, strict=True
    ):
        assert torch.equal(expected, found)
        assert anchors.tolist() == source.tolist() == list(range(len(expected)))


@pytest.mark.parametrize(
    ("kind", "side"),
    [*((kind, "left") for kind in ANYRES_KINDS), ("next", "right"), ("onevision", "right")],
)
def test_keep_one_is_bit_identical(shared, kind, side):
    plain = shared(anyres_model, kind)
    batch = anyres_batch(plain, side=side)
    wrapped = pitome_vlm.wrap(copy.deepcopy(plain), keep=1.0)
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, wrapped(**batch).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    if side == "left":
        for beams in (1, 3):
            one, two = (m.generate(**batch, **options, num_beams=beams) for m in (plain, wrapped))
            assert torch.equal(one, two)
    with torch.no_grad():
        pitome_vlm.wrap(wrapped, keep=0.3)
        assert not torch.equal(plain(**batch).logits[:, -1], wrapped(**batch).logits[:, -1])
        assert torch.equal(plain(**batch).logits, pitome_vlm.unwrap(wrapped)(**batch).logits)


def fitting(name, stage):
    """Whether an algorithm can work at a stage on tiles."""
    algorithm = algorithms.get(name)
    if algorithm.needs_attention:
        return stage == "tower"
    if algorithm.needs_grid:
        return stage == "projector"
    return not (algorithm.one_step and stage == "both")


FITTING = [
    (name, stage)
    for name in algorithms.available()
    for stage in ("tower", "projector", "both")
    if name != "none" and fitting(name, stage)
]
CASES = list(zip(itertools.cycle(["next", "onevision_resampled"]), FITTING))


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_every_algorithm_hits_the_count_and_books_every_cell(shared, kind, case):
    name, stage = case
    model = shared(anyres_model, kind)
    vision = anyres_pixels(model, [*THREE, (1, 500), (50, 1)])
    full = [len(one) for one in unmerged(model, vision)]
    for budget in ({"keep": 0.3}, {"tokens": 7}, {"keep": 1e-4}, {"ratio": 0.9}):
        if budget == {"ratio": 0.9} and (stage == "both" or algorithms.get(name).one_step):
            continue
        pitome_vlm.wrap(model, algorithm=name, stage=stage, **budget)
        with torch.no_grad():
            visual = encode_images(model, **vision)
        schedule = schedule_of(model)
        share = budget.get("keep", schedule.tokens_out / schedule.tokens_in)
        assert visual.full_counts == full
        # A patch and a separator at least; one image is a tile wide and has none.
        least = [2, 2, 2, 1, 2]
        wanted = [math.floor(share * n + 0.5) for n in full]
        assert visual.counts == [max(pair) for pair in zip(least, wanted, strict=True)]
        for sizes, anchors, source, n in zip(
            visual.sizes(), visual.anchors, visual.source_maps, full, strict=True
        ):
            assert float(sizes.sum()) == n
            assert (sizes >= 1).all()
            assert anchors.tolist() == sorted(set(anchors.tolist()))
            # Every token is named after one of its own cells.
            assert torch.equal(source[anchors], torch.arange(len(anchors)))


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_newlines_are_thinned_evenly_and_never_merged_with_patches(shared, kind):
    model = pitome_vlm.wrap(shared(anyres_model, kind), keep=0.2)
    footprint, count = planned_count(model, MergeConfig(keep=0.2), image_size=(128, 128))
    assert footprint.newlines == 2 * SIDE
    vision = anyres_pixels(model, [(128, 128)])
    with torch.no_grad():
        visual = encode_images(model, **vision)
        cells = unmerged(model, vision)[0]
    is_newline = (cells == model.model.image_newline).all(-1)
    source, sizes = visual.source_maps[0], visual.sizes()[0]
    lines = source[is_newline].unique()
    assert len(lines) == math.floor(count.out * footprint.newlines / footprint.full + 0.5)
    assert not set(lines.tolist()) & set(source[~is_newline].tolist())
    assert int(sizes[lines].sum()) == footprint.newlines
    assert int(sizes[lines].max() - sizes[lines].min()) <= 1
    newline = model.model.image_newline.expand(len(lines), -1)
    assert torch.equal(visual.features[0][lines], newline)


def reference_cells(size, resampled):
    """(tile, patch) of every cell of a packed image, -1 for newlines, by loops over pixels."""
    fits = {}
    for height, width in PINS:
        scale = min(width / size[1], height / size[0])
        inside = int(size[1] * scale) * int(size[0] * scale)
        effective = min(inside, size[0] * size[1])
        key = (effective, -(height * width - effective))
        if key not in fits:
            fits[key] = (height, width)
    height, width = fits[max(fits)]
    high, wide = height // TILE, width // TILE
    rows, columns = high * SIDE, wide * SIDE
    if size[1] / size[0] > columns / rows:
        gone = (rows - int(round(size[0] * columns / size[1], 7))) // 2
        top, left = gone, 0
    else:
        gone = (columns - int(round(size[1] * rows / size[0], 7))) // 2
        top, left = 0, gone
    kept = [list(range(left, columns - left)) for _ in range(rows - 2 * top)]
    found = list(range(SIDE * SIDE))
    n_rows, n_columns = len(kept), len(kept[0]) if kept else 0
    ratio = math.sqrt(n_rows * n_columns / (SIDE * SIDE)) if resampled else 0
    out_rows, out_columns = n_rows, n_columns
    if ratio > 1.1:
        out_rows, out_columns = int(n_rows // ratio), int(n_columns // ratio)
    for y in range(out_rows):
        for x in range(out_columns):
            # Bilinear without aligned corners: the point of the source that is looked at.
            at_y = max(0.0, (y + 0.5) * n_rows / out_rows - 0.5)
            at_x = max(0.0, (x + 0.5) * n_columns / out_columns - 0.5)
            gy, gx = top + at_y, left + at_x
            found.append((gy, gx, wide))
        found.append(-1)
    return found


@pytest.mark.parametrize("size", [*THREE, (128, 128), (200, 7), (333, 100)])
@pytest.mark.parametrize("kind", ["next", "onevision_resampled"])
def test_the_layout_that_is_learnt_is_the_one_of_the_formulas(shared, kind, size):
    """An independent walk over rows and columns finds every cell where the probe found it."""
    model = shared(anyres_model, kind)
    pitome_vlm.wrap(model, keep=0.5, stage="projector", algorithm="random")
    from pitome_vlm.adapters import hf_anyres
    from pitome_vlm.merge.tiles import PackedItem, learn_layouts

    adapter = find_adapter(model)
    footprint = adapter.footprint(model, image_size=size)
    canvases = hf_anyres.canvases_of(model, size, footprint.tiles, (SIDE, SIDE))

    def pack(tiles, newline):
        return hf_anyres.pack_tiles(model, tiles, [size], newline, {})

    (layout,) = learn_layouts(
        [PackedItem(footprint, canvases)], pack, SIDE * SIDE, torch.device("cpu")
    )
    expected = reference_cells(size, resampled=kind == "onevision_resampled")
    assert len(layout.cells) == len(expected) == footprint.full
    for found, wanted in zip(layout.cells.tolist(), expected, strict=True):
        if not isinstance(wanted, tuple):
            assert found == wanted
            continue
        gy, gx, wide = wanted
        tile, patch = divmod(found, SIDE * SIDE)
        row, column = divmod(tile - 1, wide)
        y, x = row * SIDE + patch // SIDE, column * SIDE + patch % SIDE
        assert abs(y - gy) <= 0.5 + 1e-4
        assert abs(x - gx) <= 0.5 + 1e-4


@pytest.mark.parametrize("kind", ["next", "onevision_resampled"])
def test_a_token_is_the_mean_of_its_cells(shared, kind):
    """Against the definition: what the tower kept, spread, packed, and averaged group by group."""
    model = pitome_vlm.wrap(shared(anyres_model, kind), keep=0.4, stage="tower", algorithm="tome")
    base, merging = merging_of(model)
    vision = anyres_pixels(model, [(128, 128)])
    merge_pass = merging.plan(base).new_pass()
    with torch.no_grad():
        (encoded,) = merging.adapter.encode(base, vision, merge_pass)
        visual = encoded.visual
        tiles = vision["pixel_values"][0]
        assign, _ = merge_pass.tower_map(len(tiles), tiles.device)
        # The groups' values tile by tile, from a second run with the same decisions.
        again = merging.plan(base).new_pass()
        from pitome_vlm.adapters.features import feature_choice, read_features

        features = read_features(
            base.model.vision_tower, tiles, again, feature_choice(base.config, {})
        )
        projected = base.model.multi_modal_projector(features)
        spread = torch.stack([one[own] for one, own in zip(projected, assign, strict=True)])
        options = (
            {"vision_feature_select_strategy": "default"}
            if kind == "next"
            else {"vision_aspect_ratio": "anyres_max_1"}
        )
        packed, _ = base.model.pack_image_features(
            [spread], vision["image_sizes"], image_newline=base.model.image_newline, **options
        )
    source = visual.source_maps[0]
    for token in range(visual.counts[0]):
        mean = packed[0][source == token].mean(0)
        torch.testing.assert_close(visual.features[0][token], mean, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["next", "onevision_resampled"])
@pytest.mark.parametrize("options", [{"keep": 0.3}, {"keep": "auto"}, {"tokens": 9}])
def test_a_batch_of_different_sizes_equals_one_by_one(shared, kind, options):
    model = pitome_vlm.wrap(shared(anyres_model, kind), **options)
    sizes = [*THREE, (90, 90), (1, 500)]
    vision = anyres_pixels(model, sizes)
    with torch.no_grad():
        together = encode_images(model, **vision)
        for index, size in enumerate(sizes):
            tiles = tile_counts(model, [size])[0]
            alone = encode_images(
                model,
                pixel_values=vision["pixel_values"][index : index + 1, :tiles],
                image_sizes=torch.tensor([size]),
            )
            assert torch.equal(alone.source_maps[0], together.source_maps[index])
            torch.testing.assert_close(
                alone.features[0], together.features[index], atol=1e-5, rtol=1e-4
            )


def test_tiles_in_one_row_are_taken_as_well(shared):
    model = pitome_vlm.wrap(shared(anyres_model), keep=0.3)
    with torch.no_grad():
        stacked = encode_images(model, **anyres_pixels(model, THREE))
        flat = encode_images(model, **anyres_pixels(model, THREE, flat=True))
    for one, two in zip(stacked.features, flat.features, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_keep_auto_gives_every_image_its_own_count(shared, kind):
    model = pitome_vlm.wrap(shared(anyres_model, kind), keep="auto", quality=0.9)
    vision = anyres_pixels(model, THREE)
    vision["pixel_values"][1] = 0.5  # one colour: nothing tells its patches apart
    counts = visual_token_counts(model, **vision)
    for size, count in zip(THREE, counts, strict=True):
        promised = pitome_vlm.describe(model, image_size=size).count
        assert promised.fewest <= count <= promised.out
    assert counts[1] < counts[0]


def test_onevision_gives_images_of_one_prompt_a_tile_each(shared):
    model = shared(anyres_model, "onevision")
    alone = [True, False, False]
    vision = anyres_pixels(model, THREE, alone=alone)
    vision["batch_num_images"] = torch.tensor([1, 2])
    full = [len(one) for one in unmerged(model, vision)]
    assert full[1:] == [SIDE * SIDE + 1] * 2
    pitome_vlm.wrap(model, keep=0.25)
    visual = encode_images(model, **vision)
    assert visual.full_counts == full
    assert visual.counts == [math.floor(n / 4 + 0.5) for n in full]
    words = [[1, *[IMAGE] * full[0], 5, 6], [1, *[IMAGE] * full[1], 7, *[IMAGE] * full[2], 8]]
    width = max(map(len, words))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in words])
    out = model(input_ids=ids, attention_mask=(ids != 0).long(), **vision)
    assert out.logits.shape[1] == max(3 + visual.counts[0], 3 + sum(visual.counts[1:]))


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_a_call_may_ask_for_other_feature_layers(shared, kind):
    model = shared(anyres_model, kind)
    vision = anyres_pixels(model, [(90, 90)])
    with torch.no_grad():
        expected = model.model.get_image_features(**vision, vision_feature_layer=2)
        pitome_vlm.wrap(model, keep=1.0)
        found = encode_images(model, **vision, vision_feature_layer=2)
    assert torch.equal(getattr(expected, "pooler_output", expected)[0], found.features[0])


def test_gradients_reach_tower_projector_and_newline(shared):
    model = pitome_vlm.wrap(shared(anyres_model, "onevision_resampled"), keep=0.3).train()
    batch = anyres_batch(model)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    model(**batch, labels=labels).loss.backward()
    core = model.model
    wanted = {
        "tower": next(p for n, p in core.vision_tower.named_parameters() if "layers.0" in n),
        "projector": core.multi_modal_projector.linear_1.weight,
        "newline": core.image_newline,
    }
    for name, parameter in wanted.items():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    model = pitome_vlm.wrap(anyres_model("onevision_resampled").to(dtype), keep=0.3)
    vision = anyres_pixels(model, THREE)
    with torch.no_grad():
        visual = encode_images(model, vision["pixel_values"].to(dtype), image_sizes=THREE)
    assert {one.dtype for one in visual.features} == {dtype}


class TestErrors:
    @pytest.fixture
    def model(self, shared):
        return pitome_vlm.wrap(shared(anyres_model), keep=0.25)

    def test_missing_sizes(self, model):
        batch = anyres_batch(model)
        del batch["image_sizes"]
        with pytest.raises(ValueError, match="image_sizes are missing"):
            model(**batch)

    def test_sizes_of_other_images(self, model):
        batch = anyres_batch(model)
        batch["image_sizes"] = torch.tensor([[128, 128]] * 2)
        with pytest.raises(ValueError, match=r"3 images of up to 5 tiles.*2 images of up to 5"):
            model(**batch)

    def test_too_few_tiles(self, model):
        vision = anyres_pixels(model, THREE, flat=True)
        with pytest.raises(ValueError, match=r"hold 13 tiles.*make 14"):
            encode_images(model, vision["pixel_values"][1:], image_sizes=vision["image_sizes"])

    def test_impossible_size(self, model):
        vision = anyres_pixels(model, THREE)
        vision["image_sizes"][1] = 0
        with pytest.raises(ValueError, match="at least 1 x 1, got 0 x 0"):
            encode_images(model, **vision)

    def test_wrong_number_of_placeholders(self, model):
        batch = anyres_batch(model, rows=((THREE[0],),), texts=(4,))
        batch["input_ids"][0, 6] = 5
        with pytest.raises(ValueError, match=r"image placeholders for 1 image, but \d+ .*or \d+"):
            model(**batch)

    def test_a_strategy_that_leaves_no_grid(self):
        model = anyres_model()
        model.config.vision_feature_select_strategy = "full"
        with pytest.raises(ValueError, match="65 visual tokens where its grid"):
            pitome_vlm.wrap(model, keep=0.5)

    def test_pooling_inside_the_tower(self, shared):
        with pytest.raises(ValueError, match="stage must be 'projector'"):
            pitome_vlm.wrap(shared(anyres_model), keep=0.5, algorithm="pool", stage="tower")

    def test_more_tokens_than_a_tile_has(self, shared):
        with pytest.raises(ValueError, match=r"1\.\.64"):
            pitome_vlm.wrap(shared(anyres_model), tokens=65)
