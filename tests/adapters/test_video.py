"""Videos: frames are merged on their own or window by window, and every count is promised."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tiny import IMAGE
from tiny_anyres import SIDE, SIZES, VIDEO, anyres_batch, anyres_pixels, unmerged
from tiny_video import VIDEO_KINDS, unmerged_videos, video_batch, video_model, video_pixels

import pitome_vlm
from pitome_vlm import MergeConfig, encode_videos
from pitome_vlm.merge import algorithms
from pitome_vlm.wrapping.encode import planned_count

GREEDY = {"max_new_tokens": 4, "do_sample": False}
ONE_OF_EACH = ("onevision", "next_video", "video_llava")


def seen_by_language_model(model, batch):
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return lengths[0]


@pytest.mark.parametrize("kind", VIDEO_KINDS)
def test_the_language_model_sees_what_was_promised(shared, kind):
    model = shared(video_model, kind)
    windows = {"keep": 0.1, "temporal": True}
    for frames, options in (
        *((1, {"keep": 0.25}), (1, {"tokens": 9}), (2, windows)),
        *((8, {"keep": 0.25}), (8, {"tokens": 9}), (32, windows)),
    ):
        pitome_vlm.unwrap(model)
        batch = video_batch(model, video_pixels(1, frames))
        full = int((batch["input_ids"] == VIDEO).sum())
        pitome_vlm.wrap(model, **options)
        told = pitome_vlm.describe(model, frames=frames)
        assert told.tokens_in == full
        if "keep" in options:
            assert told.tokens_out == math.floor(options["keep"] * full + 0.5)
        assert f"video of {frames} frame" in str(told)
        seen = seen_by_language_model(model, batch)
        assert seen == batch["input_ids"].shape[1] - full + told.tokens_out


def test_images_of_a_video_model_keep_their_promise_at_every_size(shared):
    model = pitome_vlm.wrap(shared(video_model, "next_video"), keep=0.25)
    assert len(SIZES) >= 20
    for size in SIZES:
        batch = anyres_batch(model, rows=((size,),), texts=(4,))
        full = int((batch["input_ids"] == IMAGE).sum())
        told = pitome_vlm.describe(model, image_size=size)
        assert told.tokens_in == full, size
        seen = seen_by_language_model(model, batch)
        assert seen == batch["input_ids"].shape[1] - full + told.tokens_out, size


@pytest.mark.parametrize("kind", VIDEO_KINDS)
def test_identity_grouping_reproduces_the_features(shared, kind):
    model = shared(video_model, kind)
    pixels = video_pixels(2, 3)
    expected = unmerged_videos(model, pixels)
    for options in ({}, {"temporal": True}):
        pitome_vlm.wrap(model, keep=1.0, **options)
        with torch.no_grad():
            visual = encode_videos(model, pixels)
        for one, found, source in zip(expected, visual.features, visual.source_maps, strict=True):
            assert torch.equal(one, found)
            assert source.tolist() == list(range(len(one)))


@pytest.mark.parametrize(
    ("kind", "side"), [*((kind, "left") for kind in ONE_OF_EACH), ("onevision", "right")]
)
def test_keep_one_is_bit_identical_and_unwrapping_leaves_nothing(shared, kind, side):
    plain = shared(video_model, kind)
    batch = video_batch(plain, video_pixels(2, 3), side=side)
    wrapped = pitome_vlm.wrap(copy.deepcopy(plain), keep=1.0)
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, wrapped(**batch).logits)
        if side == "left":
            assert torch.equal(
                plain.generate(**batch, **GREEDY), wrapped.generate(**batch, **GREEDY)
            )
        pitome_vlm.wrap(wrapped, keep=0.3)
        assert not torch.equal(plain(**batch).logits[:, -1], wrapped(**batch).logits[:, -1])
        pitome_vlm.unwrap(wrapped)
        assert torch.equal(plain(**batch).logits, wrapped(**batch).logits)
    assert [type(m) for m in plain.modules()] == [type(m) for m in wrapped.modules()]


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_what_comes_out_of_a_window_depends_on_its_own_frames_alone(shared, kind, together):
    model = shared(video_model, kind)
    options = {"temporal": True, "temporal_window": together} if together > 1 else {}
    pitome_vlm.wrap(model, keep=0.3, **options)
    pixels = video_pixels(1, 7)
    with torch.no_grad():
        before = encode_videos(model, pixels)
        for changed in (0, 3, 6):
            other = pixels.clone()
            other[0, changed] = torch.randn_like(other[0, changed])
            after = encode_videos(model, other)
            window = changed // together
            cells = len(before.source_maps[0]) // 7  # per frame; the newline comes last
            for frame in range(7):
                own = slice(frame * cells, (frame + 1) * cells)
                same = torch.equal(
                    before.features[0][before.source_maps[0][own]],
                    after.features[0][after.source_maps[0][own]],
                )
                if frame // together != window:
                    assert same, (frame, changed)
                if frame == changed:
                    assert not same, changed


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_windows_never_share_a_token_and_get_their_share(shared, kind):
    model = pitome_vlm.wrap(shared(video_model, kind), keep=0.2, temporal=True, temporal_window=3)
    with torch.no_grad():
        visual = encode_videos(model, video_pixels(1, 7))
    source, cells = visual.source_maps[0], len(visual.source_maps[0]) // 7
    windows = [set(source[start * cells : (start + 3) * cells].tolist()) for start in (0, 3, 6)]
    windows[2] = set(source[6 * cells : 7 * cells].tolist())
    assert not windows[0] & windows[1]
    assert not windows[1] & windows[2]
    assert abs(len(windows[0]) - len(windows[1])) <= 1
    assert abs(len(windows[0]) - 3 * len(windows[2])) <= 3


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_identical_frames_cost_what_one_frame_costs(shared, kind):
    """Four frames that are one: a quarter of the tokens says all there is to say."""
    model = shared(video_model, kind)
    frame = video_pixels(1, 1)
    pixels = frame.expand(-1, 4, -1, -1, -1).contiguous()
    full = len(unmerged_videos(model, pixels)[0])
    alone = unmerged_videos(model, frame)[0]
    newlines = int(kind == "onevision")
    keep = ((full - newlines) / 4 + newlines) / full
    pitome_vlm.wrap(model, keep=keep, stage="projector", temporal=True, temporal_window=4)
    with torch.no_grad():
        visual = encode_videos(model, pixels)
    assert visual.counts == [len(alone)]
    sizes = visual.sizes()[0]
    assert sizes.tolist() == [4.0] * (len(alone) - newlines) + [1.0] * newlines
    # A token stands at its group's first cell, hence in the first frame, in raster order.
    torch.testing.assert_close(visual.features[0], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_auto_saves_in_proportion_where_frames_repeat(shared, kind):
    model = shared(video_model, kind)
    still = video_pixels(1, 1).expand(-1, 8, -1, -1, -1).contiguous()
    moving = video_pixels(1, 8)
    options = {"keep": "auto", "quality": 0.95, "keep_range": (1 / 64, 1.0)}
    counts = {}
    for window in (2, 8):
        pitome_vlm.wrap(model, **options, temporal=True, temporal_window=window)
        with torch.no_grad():
            counts[window] = encode_videos(model, still).counts[0]
            assert encode_videos(model, moving).counts[0] > counts[window]
    pitome_vlm.wrap(model, **options)
    with torch.no_grad():
        apart = encode_videos(model, still).counts[0]
    assert counts[2] <= 0.6 * apart
    assert counts[8] <= 0.6 * 0.5 * counts[2]


FITTING = [
    (name, stage)
    for name in algorithms.available()
    for stage in ("tower", "projector", "both")
    if name != "none"
    and not (algorithms.get(name).needs_attention and stage != "tower")
    and not (algorithms.get(name).needs_grid and stage != "projector")
    and not (algorithms.get(name).one_step and stage == "both")
]

CASES = list(zip(itertools.cycle(["onevision", "next_video"]), FITTING))


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_every_algorithm_hits_the_count_and_books_every_cell(shared, kind, case):
    name, stage = case
    model = shared(video_model, kind)
    pixels = video_pixels(2, 3)
    full = len(unmerged_videos(model, pixels)[0])
    for temporal in (False, True):
        pitome_vlm.wrap(model, keep=0.3, algorithm=name, stage=stage, temporal=temporal)
        with torch.no_grad():
            visual = encode_videos(model, pixels)
        assert visual.full_counts == [full] * 2
        assert visual.counts == [math.floor(0.3 * full + 0.5)] * 2
        for sizes, anchors, source in zip(
            visual.sizes(), visual.anchors, visual.source_maps, strict=True
        ):
            assert float(sizes.sum()) == full
            assert (sizes >= 1).all()
            assert torch.equal(source[anchors], torch.arange(len(anchors)))


@pytest.mark.parametrize("options", [{"keep": 0.3}, {"keep": 0.3, "temporal": True}])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_batch_equals_one_by_one(shared, kind, options):
    model = pitome_vlm.wrap(shared(video_model, kind), **options)
    pixels = video_pixels(3, 4)
    with torch.no_grad():
        together = encode_videos(model, pixels)
        for index in range(3):
            alone = encode_videos(model, pixels[index : index + 1])
            assert torch.equal(alone.source_maps[0], together.source_maps[index])
            torch.testing.assert_close(
                alone.features[0], together.features[index], atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_greedy_with_a_cache_equals_recomputing_everything(shared, kind):
    model = pitome_vlm.wrap(shared(video_model, kind), keep=0.3, temporal=True, temporal_window=2)
    batch = video_batch(model, video_pixels(2, 3))
    out = model.generate(**batch, **GREEDY)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            step = model(**batch | {"input_ids": ids, "attention_mask": mask}).logits[:, -1:]
            ids = torch.cat([ids, step.argmax(-1)], 1)
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(out, ids)
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), out)


def one_image(model, kind):
    """An image for the model, and how many placeholders it has."""
    if kind == "video_llava":
        name = "pixel_values"
        if "pixel_values_images" in model.model.forward.__code__.co_varnames:
            name = "pixel_values_images"
        generator = torch.Generator().manual_seed(5)
        return {name: torch.randn(1, 3, 64, 64, generator=generator)}, SIDE * SIDE
    vision = anyres_pixels(model, [(100, 180)])
    return vision, len(unmerged(model, vision)[0])


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_images_and_videos_share_a_prompt(shared, kind):
    plain = shared(video_model, kind)
    image = one_image(plain, kind)
    batch = video_batch(plain, video_pixels(2, 3), image=image)
    model = pitome_vlm.wrap(copy.deepcopy(plain), keep=0.3)
    visible = int((batch["input_ids"] == IMAGE).sum()), int((batch["input_ids"] == VIDEO).sum())
    out = model(**batch)
    kept = [
        planned_count(model, MergeConfig(keep=0.3), image_size=(100, 180))[1].out,
        planned_count(model, MergeConfig(keep=0.3), frames=3)[1].out,
    ]
    assert visible == (image[1], 2 * planned_count(model, MergeConfig(keep=0.3), frames=3)[1].full)
    row = batch["attention_mask"].sum(1)
    shorter = row - torch.tensor([visible[0] + visible[1] // 2, visible[1] // 2])
    expected = shorter + torch.tensor([sum(kept), kept[1]])
    assert out.logits.shape[1] == int(expected.max())
    # The second row has no image and answers as it does alone.
    alone = {
        "input_ids": batch["input_ids"][1:],
        "attention_mask": batch["attention_mask"][1:],
        "pixel_values_videos": batch["pixel_values_videos"][1:],
    }
    torch.testing.assert_close(
        model(**alone).logits[0, -1], out.logits[1, -1], atol=1e-4, rtol=1e-3
    )
    assert torch.equal(
        model.generate(**alone, **GREEDY)[0, -4:], model.generate(**batch, **GREEDY)[1, -4:]
    )


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_gradients_reach_the_tower(shared, kind):
    model = pitome_vlm.wrap(shared(video_model, kind), keep=0.3, temporal=True).train()
    batch = video_batch(model, video_pixels(1, 2))
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == VIDEO, -100)
    model(**batch, labels=labels).loss.backward()
    tower = getattr(model.model, "video_tower", None) or model.model.vision_tower
    wanted = next(p for n, p in tower.named_parameters() if "layers.0" in n and p.dim() > 1)
    assert wanted.grad is not None
    assert float(wanted.grad.abs().max()) > 0


def test_a_budget_below_one_token_a_window_gives_every_window_one(shared):
    model = pitome_vlm.wrap(shared(video_model, "next_video"), keep=0.001)
    assert pitome_vlm.describe(model, frames=32).tokens_out == 32
    pitome_vlm.wrap(model, keep=0.001, temporal=True)
    assert pitome_vlm.describe(model, frames=32).tokens_out == 4
    with torch.no_grad():
        assert encode_videos(model, video_pixels(1, 32)).counts == [4]


class TestErrors:
    def test_a_model_without_videos(self):
        from tiny import tiny_model

        model = pitome_vlm.wrap(tiny_model(), keep=0.5)
        with pytest.raises(ValueError, match="takes no videos"):
            pitome_vlm.describe(model, frames=4)
        with pytest.raises(ValueError, match="takes no videos"):
            encode_videos(model, video_pixels())

    def test_pixels_of_other_axes(self, shared):
        model = pitome_vlm.wrap(shared(video_model), keep=0.5)
        with pytest.raises(ValueError, match=r"pixel_values_videos must be a tensor \[videos"):
            encode_videos(model, video_pixels()[0])

    def test_windows(self):
        with pytest.raises(ValueError, match="temporal_window"):
            MergeConfig(keep=0.5, temporal_window=1)
        with pytest.raises(TypeError, match="temporal must be True or False"):
            MergeConfig(keep=0.5, temporal=2)

    def test_images_given_twice(self, shared):
        model = pitome_vlm.wrap(shared(video_model, "video_llava"), keep=0.5)
        pixels = torch.zeros(1, 3, 64, 64)
        with pytest.raises(ValueError, match="pass the images once"):
            pitome_vlm.encode_images(model, pixels, pixel_values_images=pixels)
