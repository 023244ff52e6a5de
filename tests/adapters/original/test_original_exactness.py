"""The original llava package: what must not change, and where every word and patch must end up."""

from __future__ import annotations

import copy

import pytest
import torch
from original_llava import (
    IMAGE,
    KINDS,
    PATCHES,
    PINPOINTS,
    ROTARY,
    expected_layout,
    get_anyres_image_grid_shape,
    original_batch,
    original_model,
)

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters import find_adapter
from pitome_vlm.merge import algorithms
from pitome_vlm.wrapping.encode import planned_schedule, visual_token_counts
from pitome_vlm.wrapping.merging import Merging
from pitome_vlm.wrapping.original_inputs import prepare_original
from pitome_vlm.wrapping.wrap import is_wrapped

PLAIN = {"size_bias": False, "positions": "compact"}
# (width, height), extreme shapes and images smaller than a patch among them.
SIZES = [
    *((96, 96), (192, 96), (96, 192), (640, 480), (480, 640), (1000, 30), (30, 1000), (1, 1)),
    *((1, 500), (500, 1), (7, 5), (1024, 1024), (333, 334), (99, 98), (2000, 700), (120, 700)),
    *((3, 700), (192, 191), (64, 65), (1920, 1080)),
]


def spatial_batch(sizes, texts, *, side="right"):
    """One image of several tiles per row, as `process_images` makes them for any resolution."""
    batch = original_batch(images=(1,) * len(sizes), texts=texts, side=side)
    generator = torch.Generator().manual_seed(5)
    grids = [get_anyres_image_grid_shape(size, PINPOINTS, 96) for size in sizes]
    tiles = [1 + columns * rows for columns, rows in grids]
    images = [torch.randn(n, 3, 96, 96, generator=generator) for n in tiles]
    return batch | {"images": images, "image_sizes": sizes}


def spatial_model(kind="llama", **options):
    found = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
    return original_model(kind, **found | options)


def own_preparation(model, batch, labels=None, positions=None):
    """Mask, embeddings, labels, positions of the unwrapped model."""
    _, place, mask, _, embeds, wanted = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"],
        positions,
        batch.get("attention_mask"),
        None,
        labels,
        batch["images"],
        batch.get("image_sizes"),
    )
    return mask, embeds, wanted, place


def snapshot(model):
    """Everything a wrap could leave on a model's modules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")

    def attributes(module):
        # transformers 4.57 leaves the class's own forward on instances; it means nothing.
        own = getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward
        return sorted(name for name in module.__dict__ if not (own and name == "forward"))

    return [
        (name, type(module), attributes(module), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_keep_one_is_bit_identical(kind):
    model, batch = original_model(kind), original_batch()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 3, -100)
    before = model(**batch, labels=labels)
    pitome_vlm.wrap(model, keep=1.0)
    after = model(**batch, labels=labels)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_unwrap_leaves_nothing(kind):
    model, batch = original_model(kind), original_batch()
    logits, keys = model(**batch).logits, list(model.state_dict())
    before, name = snapshot(model), type(model).__name__
    pitome_vlm.wrap(model, keep=0.25)
    assert list(model.state_dict()) == keys
    assert type(model).__name__ == name
    assert model(**batch).logits.shape != logits.shape
    pitome_vlm.unwrap(model)
    assert snapshot(model) == before
    assert torch.equal(model(**batch).logits, logits)


def test_wrapping_twice_is_wrapping_once_and_another_model_is_untouched():
    model, once, other = original_model(), original_model(), original_model()
    batch = original_batch()
    for one in (model, once, other):
        one(**batch)
    plain, logits = snapshot(other), other(**batch).logits
    pitome_vlm.wrap(pitome_vlm.wrap(model, keep=0.5), tokens=30, algorithm="tome")
    pitome_vlm.wrap(once, tokens=30, algorithm="tome")
    assert torch.equal(model(**batch).logits, once(**batch).logits)
    assert snapshot(other) == plain
    assert torch.equal(other(**batch).logits, logits)
    copied = copy.deepcopy(model)
    pitome_vlm.unwrap(model)
    assert torch.equal(copied(**batch).logits, once(**batch).logits)
    with pytest.raises(ValueError, match="layers must be in"):
        pitome_vlm.wrap(model, keep=0.5, layers=[77])
    assert not is_wrapped(model)
    assert snapshot(model) == plain


def identity_prompt(model, batch, labels=None, positions=None):
    """The merging path with nothing to merge."""
    given = batch | {"labels": labels, "position_ids": positions}
    plan = Merging(MergeConfig(keep=1.0, **PLAIN), find_adapter(model)).plan(model, given)
    return prepare_original(plan, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("images", [(1, 2), (0, 1, 3), (2, 0)])
def test_identity_grouping_is_the_package_s_own_preparation(kind, side, images):
    model = original_model(kind, tokenizer_padding_side=side)
    batch = original_batch(images=images, texts=(9, 3, 5)[: len(images)], side=side)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 40, -100)
    positions = torch.arange(labels.shape[1])[None]
    mask, embeds, wanted, place = own_preparation(model, batch, labels, positions)
    found = identity_prompt(model, batch, labels, positions)
    assert torch.equal(found.inputs_embeds, embeds)
    assert torch.equal(found.attention_mask, mask)
    assert torch.equal(found.labels, wanted)
    assert torch.equal(found.position_ids, place)
    assert bool((found.sizes == 1).all())


@pytest.mark.parametrize("sizes", list(zip(SIZES[::2], SIZES[1::2], strict=True)))
def test_identity_grouping_of_tiles_is_the_package_s_own_preparation(sizes):
    model = spatial_model()
    batch = spatial_batch(list(sizes), (4, 7))
    mask, embeds, _, _ = own_preparation(model, batch)
    found = identity_prompt(model, batch)
    assert torch.equal(found.inputs_embeds, embeds)
    assert torch.equal(found.attention_mask, mask)


def tokens_seen(model, batch):
    """Columns that the first layer of the language model is given."""
    seen = []
    layer = next(m for n, m in model.named_modules() if n.endswith("model.layers.0"))
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())[0].shape[1]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("size", SIZES)
def test_merged_tiles_are_columns_of_the_unmerged_prompt_in_their_place(kind, size):
    """Tokens that are kept as they are (no means) must be found where their position says."""
    model = spatial_model(kind)
    batch = spatial_batch([size], (6,))
    _, full, _, _ = own_preparation(model, batch)
    pitome_vlm.wrap(model, keep=0.3, algorithm="random", stage="projector", positions="original")
    compact = pitome_vlm.compact_inputs(model, **batch)
    places = compact["position_ids"][0]
    assert bool((places.diff() > 0).all())
    # Row by row of the projector, hence not bit for bit on every machine.
    torch.testing.assert_close(compact["inputs_embeds"][0], full[0][places.long()])
    assert compact["token_sizes"].sum() == full.shape[1]
    words = places.tolist()
    assert words[:4] == [0, 1, 2, 3]
    assert words[-6:] == list(range(full.shape[1] - 6, full.shape[1]))


@pytest.mark.parametrize("budget", [{"keep": 0.25}, {"tokens": 20}, {"ratio": 0.8}])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_merged_to_the_count_that_describe_says(size, budget):
    model, batch = spatial_model(), spatial_batch([size], (6,))
    words = batch["input_ids"].shape[1] - 1
    unmerged = tokens_seen(model, batch) - words
    pitome_vlm.wrap(model, **budget)
    told = pitome_vlm.describe(model, image_size=size[::-1])
    assert told.tokens_in == unmerged
    assert told.footprint.tiles == len(batch["images"][0])
    assert tokens_seen(model, batch) == words + told.tokens_out
    if "keep" in budget:
        assert told.tokens_out == max(2, int(0.25 * unmerged + 0.5))
    compact = pitome_vlm.compact_inputs(model, **batch)
    assert compact["token_sizes"].sum() == unmerged + words


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("algorithm", ["pitome_plus", "random", "pool"])
def test_every_column_has_its_place_and_its_weight(kind, side, algorithm):
    model = original_model(kind, tokenizer_padding_side=side)
    pitome_vlm.wrap(model, keep=0.25, algorithm=algorithm, positions="mean")
    batch = original_batch(images=(1, 2, 0), texts=(5, 9, 12), side=side)
    compact = pitome_vlm.compact_inputs(model, **batch)
    for row, expected in enumerate(expected_layout(model, batch)):
        shown = compact["attention_mask"][row].bool()
        places = compact["position_ids"][row][shown].tolist()
        assert places == pytest.approx([place for place, _ in expected], abs=1e-3)
        assert compact["token_sizes"][row][shown].tolist() == [size for _, size in expected]


STAGES = [
    (name, stage)
    for name in algorithms.available()
    if name != "none"
    for stage in ("tower", "projector", "both")
]


@pytest.mark.parametrize(("algorithm", "stage"), STAGES)
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
def test_the_language_model_sees_what_describe_says(algorithm, stage, select):
    model = original_model(mm_vision_select_feature=select)
    config = MergeConfig(tokens=20, algorithm=algorithm, stage=stage)
    try:
        expected = planned_schedule(model, config)
    except ValueError:
        with pytest.raises(ValueError, match=r"stage|pool"):
            pitome_vlm.wrap(model, config=config)
        assert not is_wrapped(model)
        return
    assert expected.tokens_in == PATCHES + (select == "cls_patch")
    pitome_vlm.wrap(model, config=config)
    batch = original_batch(images=(2,), texts=(5,))
    told = pitome_vlm.describe(model)
    assert told.tokens_out == expected.tokens_out == 20
    assert visual_token_counts(model, batch["images"]) == [20, 20]
    assert tokens_seen(model, batch) == batch["input_ids"].shape[1] - 2 + 2 * told.tokens_out


def test_order_of_the_algorithm_where_it_is_asked_for():
    model, batch = original_model(), original_batch(images=(1,), texts=(4,))
    config = MergeConfig(keep=0.25, algorithm="pitome", restore_order=False, **PLAIN)
    pitome_vlm.wrap(model, config=config)
    visual = pitome_vlm.encode_images(model, batch["images"])
    embeds = pitome_vlm.compact_inputs(model, **batch)["inputs_embeds"]
    first = batch["input_ids"][0].tolist().index(IMAGE)
    assert not torch.equal(visual.anchors[0], visual.anchors[0].sort().values)
    torch.testing.assert_close(embeds[0, first : first + 36], visual.features[0])


def test_every_image_has_its_own_count_with_keep_auto():
    model = original_model()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "position_embedding"):
                module.position_embedding.weight.zero_()
    batch = original_batch(images=(1, 2), texts=(5, 9))
    flat = torch.zeros(1, 3, 96, 96).add_(0.3)
    batch["images"] = torch.cat([flat, batch["images"][1:]])
    pitome_vlm.wrap(model, keep="auto")
    counts = pitome_vlm.encode_images(model, batch["images"]).counts
    assert len(set(counts)) > 1
    assert visual_token_counts(model, batch["images"]) == counts
    compact = pitome_vlm.compact_inputs(model, **batch)
    words = (batch["attention_mask"].sum(1) - torch.tensor([1, 2])).tolist()
    expected = [words[0] + counts[0], words[1] + counts[1] + counts[2]]
    assert compact["attention_mask"].sum(1).tolist() == expected
    assert bool(model(**batch).logits.isfinite().all())


def test_images_that_cannot_be_laid_out_are_refused():
    model, batch = spatial_model(), spatial_batch([(192, 96)], (6,))
    pitome_vlm.wrap(model, keep=0.25)
    with pytest.raises(
        ValueError, match=r"image_sizes must hold .* each of the 1 images.*got none"
    ):
        model(**batch | {"image_sizes": None})
    with pytest.raises(
        ValueError, match=r"images must be \[images, 3, height, width\].*got \(3, 96"
    ):
        model(**batch | {"images": batch["images"][0][0]})


def test_counts_of_tiles_are_known_before_they_are_encoded():
    model, batch = spatial_model(), spatial_batch([(192, 96), (96, 96)], (6, 4))
    pitome_vlm.wrap(model, keep=0.25)
    footprints = find_adapter(model).footprints(model, batch)["image"]
    assert find_adapter(model).footprints(model, {}) == {}
    sizes = batch["image_sizes"]
    assert footprints == [
        find_adapter(model).footprint(model, image_size=(high, wide)) for wide, high in sizes
    ]
    visual = pitome_vlm.encode_images(model, batch["images"], image_sizes=sizes)
    assert visual.full_counts == [one.full for one in footprints]
