"""How many tokens an image of a size has: told before anything runs, and written by processors."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from checkpoint_families import TORCHVISION
from PIL import Image
from refused_family import else_refused
from tiny_families import FAMILIES
from tiny_processors import (
    MARK,
    NEEDS_TORCHVISION,
    SIZES,
    TABLE,
    UNLIMITED,
    announced,
    stand_in,
    written,
)
from tiny_qwen import qwen

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.loading.image_processors import blank_inputs
from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.bench import Case, inputs_for
from pitome_vlm.measure.sizes import pieces_of
from pitome_vlm.measure.visualize import source_maps

KNOWN = [name for name in TABLE if TORCHVISION or name not in NEEDS_TORCHVISION]
TILES = ("internvl", "idefics3", "gemma3", "ovis2", "minicpmv4_6")


def tiny(name):
    return qwen() if name == "qwen2_5_vl" else FAMILIES[name].model()


def told(model, size, processor=None):
    """Tokens of every tile; "refused" for a size that cannot be resized."""
    with contextlib.suppress(ValueError):
        pieces = pieces_of(model, image_size=size, image_processor=processor)
        return [piece.full for piece in pieces]
    return "refused"


def seen(processor, size):
    try:
        return written(processor, size).count(MARK)
    except (ValueError, ZeroDivisionError):
        return "refused"


@pytest.mark.parametrize("name", KNOWN)
@else_refused()
def test_what_is_told_is_what_the_processor_writes(name):
    model, processor = tiny(name), stand_in(name)
    for size in SIZES:
        found = told(model, size, processor)
        # Without its processor's class the image processor gets the same options.
        assert told(model, size, processor.image_processor) == found or name == "gemma3"
        if found == "refused":
            assert seen(processor, size) == found, size
            continue
        assert sum(found) == seen(processor, size), size
        tokens, tiles = announced(name, processor, size)
        assert tokens in (None, sum(found)), size
        assert tiles in (None, len(found)), size


@pytest.mark.parametrize("name", [name for name in KNOWN if name in UNLIMITED])
@else_refused()
def test_the_formula_is_the_processor_s_where_nothing_is_resized(name):
    patch = {"patch_size": 14} if name == "qwen2_5_vl" else {}
    model, processor = tiny(name), stand_in(name, **UNLIMITED[name], **patch)
    for height, width in SIZES:
        # Some enlarge what is smaller than one token.
        size = max(height, 28), max(width, 28)
        found = told(model, size, processor)
        assert found == told(model, size) or found == "refused", size


@pytest.mark.parametrize("name", TILES)
@else_refused()
def test_tiles_of_an_image_are_described(name):
    model, processor = tiny(name), stand_in(name)
    size = (250, 130)
    pieces = pieces_of(model, image_size=size, image_processor=processor)
    assert len(pieces) > 1
    described = pitome_vlm.describe(model, image_size=size, image_processor=processor)
    assert described.tokens_in == sum(piece.full for piece in pieces)
    pitome_vlm.wrap(model, keep=0.25)
    inputs = inputs_for(model, Case(2, 8, images=2, image_size=size, image_processor=processor))
    with torch.no_grad():
        compact = pitome_vlm.compact_inputs(model, **inputs)
    shown = int((compact["input_ids"] == model.config.image_token_id).sum())
    assert shown == 4 * described.tokens_out
    assert described.after.visual_tokens == described.tokens_out
    text = str(described)
    assert f"merged on its own: {len(pieces)}\n" in text
    assert f"{described.tokens_in} -> {described.tokens_out} visual tokens per image" in text
    assert "visual tokens per image" in text
    assert "resizing" not in text


@else_refused("internvl")
def test_costs_are_those_of_all_tiles():
    model, processor = tiny("internvl"), stand_in("internvl")
    one = costs(model)
    whole = costs(model, image_size=(250, 130), image_processor=processor)
    tiles = whole.visual_tokens // one.visual_tokens
    assert tiles > 1
    assert whole.tower_flops == tiles * one.tower_flops
    assert whole.projector_flops == tiles * one.projector_flops
    assert whole.kv_bytes_per_image == tiles * one.kv_bytes_per_image
    assert whole.layer_flops == tuple(tiles * layer for layer in one.layer_flops)


@else_refused("qwen3_vl")
def test_limits_of_a_processor_hold():
    """96 x 96 pixels at most, so that a photo has as many tokens as the processor leaves of it."""
    model, processor = tiny("qwen3_vl"), stand_in("qwen3_vl")
    whole = pitome_vlm.describe(model, image_size=(1200, 900))
    fitted = pitome_vlm.describe(model, image_size=(1200, 900), image_processor=processor)
    assert "the size is that after the processor's resizing" in str(whole).replace("\n", " ")
    assert "resizing" not in str(fitted)
    assert fitted.tokens_in <= 144 < whole.tokens_in


@else_refused("qwen3_vl")
def test_sizes_that_no_image_has():
    processor = stand_in("qwen3_vl")
    with pytest.raises(ValueError, match=r"100,000,000 of them, at most 40,000,000 are read"):
        blank_inputs(processor, "qwen3_vl", (10_000, 10_000))
    with pytest.raises(ValueError, match=r"refuses an image of 9 x 8000 pixels: .*aspect ratio"):
        blank_inputs(processor, "qwen3_vl", (8000, 9))


@else_refused("internvl", "qwen3_vl", "molmo2")
def test_what_is_drawn():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (250, 130, 3), np.uint8))
    model = pitome_vlm.wrap(tiny("qwen3_vl"), keep=0.25)
    (whole,) = source_maps(model, stand_in("qwen3_vl"), photo)
    rows, columns = whole.groups.grid
    pieces = pieces_of(model, image_size=(250, 130), image_processor=stand_in("qwen3_vl"))
    assert rows > columns
    assert rows * columns == pieces[0].full
    assert whole.image.size == photo.size
    model = pitome_vlm.wrap(tiny("internvl"), keep=0.25, algorithm="random")
    tiles = source_maps(model, stand_in("internvl"), photo)
    assert len(tiles) == len(told(model, (250, 130), stand_in("internvl")))
    for tile in tiles:
        assert tile.groups.seen.sum() == tile.groups.tokens == 4
        assert sorted(tile.groups.groups[tile.groups.seen]) == [0, 1, 2, 3]
    # The last tile is the whole image: normalisation is undone.
    small = np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(np.asarray(tiles[-1].image, np.float32) - small).mean() < 3
    with pytest.raises(ValueError, match="form no grid"):
        find_adapter(tiny("molmo2")).image_planes(tiny("molmo2"), {})


@else_refused("deepseek_vl", "paligemma")
def test_padding_is_drawn_and_an_image_that_is_seen_whole_stays_sharp():
    colours = np.linspace(0, 255, 130, dtype=np.uint8)[None, :, None]
    photo = Image.fromarray(np.broadcast_to(colours, (60, 130, 3)).copy())
    drawn = {}
    for name in ("deepseek_vl", "paligemma"):
        model = pitome_vlm.wrap(tiny(name), keep=0.25)
        (part,) = source_maps(model, stand_in(name), photo)
        drawn[name] = np.asarray(part.image)
    assert np.array_equal(drawn["paligemma"], np.asarray(photo))
    seen = drawn["deepseek_vl"].astype(int)
    assert seen.shape == (32, 32, 3)
    # 15 rows in the middle hold the image, the others its processor's one colour.
    assert (np.ptp(seen, axis=1).max(-1) > 200).sum() == 15
    assert (seen[0] == seen[0, 0]).all()


@else_refused("kimi_k25", "qwen3_vl")
def test_frames_that_share_their_tokens():
    """Kimi pools four frames, Qwen makes patches of two."""
    for name, frames, grids in (("kimi_k25", 6, 2), ("qwen3_vl", 6, 3), ("gemma4", 6, 6)):
        (video,) = pieces_of(tiny(name), image_size=(96, 48), frames=frames)
        (image,) = pieces_of(tiny(name), image_size=(96, 48))
        assert (video.frames, video.full) == (grids, grids * image.full), name
