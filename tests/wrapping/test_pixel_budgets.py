"""adapt="pixels": an image gets the tokens of a fixed budget, which is read off its pixels."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from tiny_anyres import anyres_model, anyres_pixels
from tiny_qwen import qwen
from tiny_video import video_model, video_pixels

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.merge.pixels import distinct_share, keep_of, kept_fractions
from pitome_vlm.wrapping.encode import visual_token_counts

RANGE = (0.1, 0.6)


def slow_share(pixels, grid):
    """The same by looping over patches, on grey levels of 0 to 255."""
    low, top = float(pixels.min()), float(pixels.max())
    levels = ((pixels - low) * (255 / max(top - low, 1e-12))).round()
    rows, columns = grid
    high, wide = pixels.shape[-2] // rows, pixels.shape[-1] // columns
    found = []
    for frame in levels:
        for r in range(rows):
            for c in range(columns):
                around = []
                for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                    if 0 <= y < rows and 0 <= x < columns:
                        own, other = (
                            frame[:, a * high : (a + 1) * high, b * wide : (b + 1) * wide]
                            for a, b in ((r, c), (y, x))
                        )
                        around.append(float((own - other).abs().mean()))
                found.append(sum(one <= 5 for one in around) < 2)
    return sum(found) / len(found)


def image(share, *, seed=0, side=96, patch=8):
    """[3, side, side]: noise in about `share` of the rows of patches, blank otherwise."""
    pixels = torch.ones(3, side, side)
    rows = round(share * side / patch) * patch
    generator = torch.Generator().manual_seed(seed)
    pixels[:, :rows] = torch.randn(3, rows, side, generator=generator)
    return pixels


def test_share_of_patches_that_are_like_less_than_two_neighbours():
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(12.0).repeat_interleave(8) * 0.02
    cases = [image(0.5), image(0.0), image(1.0), steps.expand(3, 96, 96)]
    cases += [torch.randn(3, 96, 96, generator=generator) * 0.05 + image(0.3)]
    for pixels in cases:
        found = distinct_share(pixels[None], (12, 12))
        assert found == pytest.approx(slow_share(pixels[None], (12, 12)))
        # However the processor scaled it, also where patches do not divide it.
        assert distinct_share(pixels[None] * 0.25 - 3, (12, 12)) == found
    assert distinct_share(image(0.5)[None], (12, 12)) == 0.5
    assert distinct_share(torch.stack([image(0.0), image(1.0)]), (12, 12)) == 0.5
    assert distinct_share(torch.randn(1, 3, 100, 99), (12, 12)) == 1.0


def test_shares_become_one_of_a_few_fractions():
    fractions = kept_fractions(RANGE)
    assert (fractions[0], fractions[-1], len(fractions)) == (*RANGE, 13)
    assert kept_fractions((0.25, 0.25)) == [0.25]
    for share, expected in ((0.0, 0.1), (0.61, 0.6), (1.0, 0.6)):
        assert keep_of(image(share)[None], (12, 12), RANGE) == pytest.approx(expected)
    for share in (0.2, 0.3, 0.4):
        real = distinct_share(image(share)[None], (12, 12))
        # A token for every patch that says something, and for sixteen of the others.
        wanted = real + (1 - real) / 16
        found = keep_of(image(share)[None], (12, 12), RANGE)
        assert wanted <= found < wanted * (6 ** (1 / 12)) * 1.001


def check_like_fixed(model, vision, keeps, kind="image", **options):
    """Tokens of every image are those of a fixed budget, whatever it is encoded with."""
    config = MergeConfig(keep="auto", adapt="pixels", keep_range=RANGE, **options)
    pitome_vlm.wrap(model, config=config)
    encode = pitome_vlm.encode_images if kind == "image" else pitome_vlm.encode_videos
    with torch.no_grad():
        found = encode(model, **vision)
        assert len(set(keeps)) > 1
        for keep in set(keeps):
            pitome_vlm.wrap(model, config=config.replace(keep=keep))
            fixed = encode(model, **vision)
            for index, own in enumerate(keeps):
                if own == keep:
                    torch.testing.assert_close(found.features[index], fixed.features[index])
                    assert torch.equal(found.source_maps[index], fixed.source_maps[index])
    pitome_vlm.wrap(model, config=config)
    return found


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip_default"])
def test_images_of_one_size(kind):
    model = tiny_model(kind)
    side = model.config.vision_config.image_size
    pixels = torch.stack([image(share, side=side) for share in (0.2, 1.0, 0.0, 0.25, 0.2)])
    grid = (side // 8, side // 8)
    keeps = [keep_of(one[None], grid, RANGE) for one in pixels]
    found = check_like_fixed(model, {"pixel_values": pixels}, keeps)
    assert visual_token_counts(model, pixels) == found.counts


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_images_in_tiles_by_their_overview(kind):
    model, sizes = anyres_model(kind), [(100, 180), (60, 60), (150, 60), (90, 90)]
    vision = anyres_pixels(model, sizes)
    for index, share in enumerate((0.2, 1.0, 0.2, 0.0)):
        vision["pixel_values"][index, 0] = image(share, side=64)
    keeps = [keep_of(own[:1], (8, 8), RANGE) for own in vision["pixel_values"]]
    found = check_like_fixed(model, vision, keeps)
    counts = visual_token_counts(model, **vision)
    assert counts == found.counts
    if kind == "onevision":
        # Two prompts of one and three images, the latter of one tile each.
        several = vision | {"batch_num_images": torch.tensor([1, 3])}
        check_like_fixed(model, several, keeps)


def test_videos_by_all_of_their_frames():
    model, pixels = video_model("onevision"), video_pixels(2, 3)
    pixels[1, 1:] = 0.5
    keeps = [keep_of(one, (8, 8), RANGE) for one in pixels]
    check_like_fixed(model, {"pixel_values_videos": pixels}, keeps, kind="video")


def test_answers_and_one_step_algorithms():
    """Answers of a batch of images of several budgets are those of each image alone."""
    model = tiny_model("clip")
    side = model.config.vision_config.image_size
    pixels = torch.stack([image(share, side=side) for share in (0.2, 1.0)])
    full = (side // 8) ** 2
    token = model.config.image_token_index
    ids = torch.tensor([[1, 5, *[token] * full, 7, 8]] * 2)
    for algorithm in ("pitome_plus", "divprune"):
        pitome_vlm.wrap(model, keep="auto", adapt="pixels", algorithm=algorithm)
        call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        both = model.generate(input_ids=ids, pixel_values=pixels, **call)
        call["attention_mask"] = call["attention_mask"][:1]
        for row in range(2):
            alone = model.generate(input_ids=ids[:1], pixel_values=pixels[row : row + 1], **call)
            assert torch.equal(alone[0], both[row])


def test_families_without_such_pixels_are_refused_and_left_alone():
    model = qwen()
    before = type(model)
    with pytest.raises(ValueError, match=r"adapt='pixels' is not available for Qwen2"):
        pitome_vlm.wrap(model, keep="auto", adapt="pixels")
    assert type(model) is before
    with pytest.raises(ValueError, match="adapt must be one of features, pixels, got 'size'"):
        MergeConfig(keep="auto", adapt="size")
