"""Qwen2-VL and Qwen2.5-VL: merged after the tower, places in time, rows and columns kept."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_qwen import IMAGE, PATCH, pixels, qwen
from tiny_qwen import qwen_batch as batch_of
from transformers import Qwen2_5_VLForConditionalGeneration

import pitome_vlm
from pitome_vlm import MergeConfig, encode_images, encode_videos
from pitome_vlm.merge import algorithms
from pitome_vlm.wrapping.wrap import merging_of

GREEDY = {"max_new_tokens": 4, "do_sample": False}
KINDS = ("qwen2_5_vl", "qwen2_vl")
# (frames, rows, columns) of patches; twice what is left after the patch merger.
SMALL, WIDE, TALL = (1, 8, 8), (1, 4, 16), (1, 12, 6)


ROWS = ((SMALL,), (WIDE, TALL))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_bit_identical_and_unwrapping_leaves_nothing(shared, kind, side):
    plain = shared(qwen, kind)
    batch = batch_of(plain, ROWS, side=side)
    wrapped = pitome_vlm.wrap(copy.deepcopy(plain), keep=1.0)
    with torch.no_grad():
        expected = plain(**batch).logits
        assert torch.equal(expected, wrapped(**batch).logits)
        if side == "left":
            one, two = (m.generate(**batch, **GREEDY) for m in (plain, wrapped))
            assert torch.equal(one, two)
        pitome_vlm.wrap(wrapped, keep=0.3)
        assert not torch.equal(expected[:, -1], wrapped(**batch).logits[:, -1])
        pitome_vlm.unwrap(wrapped)
        assert torch.equal(expected, wrapped(**batch).logits)
    assert [type(m) for m in plain.modules()] == [type(m) for m in wrapped.modules()]


def test_identity_grouping_is_the_unmerged_model(shared, kind):
    """All tokens through the merged path: embeddings, places and sizes are the model's own."""
    plain = shared(qwen, kind)
    batch = batch_of(plain, ROWS)
    wrapped = pitome_vlm.wrap(copy.deepcopy(plain), keep=1.0)
    vision = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        found = plain.model.get_image_features(**vision)
        visual = encode_images(wrapped, **vision)
        compact = pitome_vlm.compact_inputs(wrapped, **batch)
        logits = plain(**{k: v for k, v in compact.items() if k != "token_sizes"}).logits
        expected = plain(**batch).logits
    for one, two in zip(getattr(found, "pooler_output", found), visual.features, strict=True):
        assert torch.equal(one, two)
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[attended], expected[attended], atol=1e-5, rtol=1e-4)


# One cell, one row, one column, squares, ordinary and extreme sides.
GRIDS = [
    *[(1, 2, 2), (1, 2, 4), (1, 4, 2), (1, 2, 40), (1, 40, 2), (1, 2, 60), (1, 60, 2)],
    *[(1, 4, 4), (1, 6, 6), SMALL, (1, 10, 10), (1, 14, 14), (1, 20, 20), WIDE, TALL],
    *[(1, 8, 10), (1, 10, 8), (1, 18, 12), (1, 12, 22), (1, 6, 30), (1, 30, 6), (1, 16, 24)],
]


def test_the_language_model_sees_what_was_promised(shared, kind):
    model = pitome_vlm.wrap(shared(qwen, kind), keep=0.25)
    assert len(GRIDS) >= 20
    for grid in GRIDS:
        check_promise(model, grid)


def check_promise(model, grid):
    batch = batch_of(model, ((grid,),))
    full = math.prod(grid) // 4
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    model(**batch)
    hook.remove()
    told = pitome_vlm.describe(model, image_size=(grid[1] * PATCH, grid[2] * PATCH))
    assert told.tokens_in == full
    assert told.tokens_out == max(1, math.floor(0.25 * full + 0.5))
    assert lengths == [batch["input_ids"].shape[1] - full + told.tokens_out]
    assert "visual tokens per image" in str(told)
    # The tower takes the image as it is and runs all its layers.
    assert "not run" not in str(told)
    assert "tile" not in str(told)


@pytest.mark.parametrize("positions", ["mean", "median", "original"])
def test_places_are_those_of_the_group_and_of_the_unreduced_text(shared, kind, positions):
    model = pitome_vlm.wrap(shared(qwen, kind), keep=0.25, positions=positions)
    base, merging = merging_of(model)
    batch = batch_of(model, ROWS)
    places = merging.adapter.prompt_places(base, batch, batch["attention_mask"])
    compact = pitome_vlm.compact_inputs(model, **batch)
    visual = encode_images(model, batch["pixel_values"], image_grid_thw=batch["image_grid_thw"])
    ids, found = batch["input_ids"], compact["position_ids"].permute(1, 2, 0)
    start = 0
    for row in range(2):
        text = places[row][(ids[row] != IMAGE) & (batch["attention_mask"][row] != 0)]
        own = places[row][ids[row] == IMAGE]
        kept = found[row][compact["attention_mask"][row] != 0]
        expected = []
        for source, anchor in list(zip(visual.source_maps, visual.anchors, strict=True))[
            start : start + len(ROWS[row])
        ]:
            part, own = own[: len(source)], own[len(source) :]
            for token in range(len(anchor)):
                group = part[source == token]
                expected.append(
                    {
                        "mean": group.mean(0),
                        "median": group.median(0).values,
                        "original": part[anchor[token]],
                    }[positions]
                )
        start += len(ROWS[row])
        got = kept.tolist()
        for place in [*text.tolist(), *(one.tolist() for one in expected)]:
            match = next(
                one
                for one in got
                if all(abs(a - b) < 1e-4 for a, b in zip(one, place, strict=True))
            )
            got.remove(match)
        assert not got


@pytest.mark.parametrize("beams", [1, 2])
def test_greedy_with_a_cache_equals_recomputing_everything(shared, kind, beams):
    model = pitome_vlm.wrap(shared(qwen, kind), keep=0.3)
    batch = batch_of(model, ROWS)
    out = model.generate(**batch, **GREEDY, num_beams=beams)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    if beams > 1:
        alone = batch_of(model, ((SMALL,),))
        alone["pixel_values"] = batch["pixel_values"][: math.prod(SMALL)]
        pad = (batch["attention_mask"][0] == 0).sum()
        alone["input_ids"] = batch["input_ids"][:1, pad:]
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in batch:
                alone[name] = batch[name][:1, pad:]
        single = model.generate(**alone, **GREEDY, num_beams=beams)
        assert torch.equal(single[0, -4:], out[0, -4:])
        return
    ids = batch["input_ids"]
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            more = ids.shape[1] - batch["input_ids"].shape[1]
            longer = {
                name: torch.cat([batch[name], batch[name].new_full((2, more), fill)], 1)
                for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0))
                if name in batch
            }
            step = model(**batch | {"input_ids": ids} | longer).logits[:, -1:]
            ids = torch.cat([ids, step.argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_rows_answer_as_they_do_alone_on_either_side(shared, kind):
    model = pitome_vlm.wrap(shared(qwen, kind), keep=0.3)
    with torch.no_grad():
        left = model(**batch_of(model, ROWS, side="left")).logits[:, -1]
        batch = batch_of(model, ROWS, side="right")
        right = model(**batch).logits
        lengths = pitome_vlm.compact_inputs(model, **batch)["attention_mask"].sum(1)
    for row in range(2):
        torch.testing.assert_close(
            right[row, int(lengths[row]) - 1], left[row], atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("name", [n for n in algorithms.available() if n != "none"])
def test_every_algorithm_that_fits_hits_the_count(shared, name):
    model = shared(qwen)
    config = MergeConfig(keep=0.3, algorithm=name)
    pitome_vlm.wrap(model, config=config)
    grids = [SMALL, WIDE, TALL]
    visual = encode_images(model, pixels(grids), image_grid_thw=torch.tensor(grids))
    full = [math.prod(grid) // 4 for grid in grids]
    assert visual.counts == [math.floor(0.3 * n + 0.5) for n in full]
    for sizes, source, anchors, n in zip(
        visual.sizes(), visual.source_maps, visual.anchors, full, strict=True
    ):
        assert float(sizes.sum()) == n
        assert torch.equal(source[anchors], torch.arange(len(anchors)))


def test_videos_are_merged_frame_by_frame_or_in_windows(shared, kind):
    model = shared(qwen, kind)
    grid = (4, 8, 8)
    batch = batch_of(model, ((grid,),), kind="video")
    for options in ({}, {"temporal": True, "temporal_window": 2}):
        pitome_vlm.wrap(model, keep=0.25, **options)
        visual = encode_videos(
            model, batch["pixel_values_videos"], video_grid_thw=batch["video_grid_thw"]
        )
        assert visual.counts == [16]
        together = options.get("temporal_window", 1)
        frames = visual.source_maps[0].view(4 // together, -1)
        groups = [set(one.tolist()) for one in frames]
        assert len(set.union(*groups)) == sum(map(len, groups)) == 16
        out = model.generate(**batch, **GREEDY)
        assert out.shape[1] == batch["input_ids"].shape[1] + 4
        assert pitome_vlm.describe(model, frames=8).footprint.frames == 4


def test_another_question_about_a_cached_image_costs_no_tower(kind):
    model, cache, calls = pitome_vlm.wrap(qwen(kind), keep=0.25), pitome_vlm.ImageCache(), []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    for texts in ((5,), (9,)):
        batch = batch_of(model, ROWS[:1], texts)
        expected = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY, image_cache=cache), expected)
    assert (cache.hits, cache.misses, len(calls)) == (1, 1, 3)


def test_gradients_and_labels(shared, kind):
    model = pitome_vlm.wrap(shared(qwen, kind), keep=0.3).train()
    batch = batch_of(model, ROWS)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    model(**batch, labels=labels).loss.backward()
    assert float(model.model.visual.blocks[0].attn.qkv.weight.grad.abs().max()) > 0


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"keep": 0.5, "stage": "tower", "layers": (3,)}, r"layers must be in 0..2"),
            ({"keep": 0.5, "stage": "tower", "algorithm": "pool"}, "needs whole grids"),
            ({"keep": 0.5, "algorithm": "visionzip", "stage": "projector"}, "ranks tokens by"),
            ({"keep": 0.5, "size_bias": False, "positions": "compact"}, "positions='compact'"),
        ],
    )
    def test_options_that_do_not_fit(self, shared, options, said):
        model = shared(qwen)
        with pytest.raises(ValueError, match=said):
            pitome_vlm.wrap(model, **options)
        assert type(model) is Qwen2_5_VLForConditionalGeneration

    def test_missing_grids(self, shared):
        model = pitome_vlm.wrap(shared(qwen), keep=0.5)
        with pytest.raises(ValueError, match="image_grid_thw is missing"):
            encode_images(model, pixels([SMALL]))

    def test_embeddings_alone(self, shared):
        model = pitome_vlm.wrap(shared(qwen), keep=0.5)
        batch = batch_of(model, ROWS)
        ids = batch.pop("input_ids")
        with pytest.raises(ValueError, match="input_ids are needed"):
            model(**batch, inputs_embeds=model.get_input_embeddings()(ids))
