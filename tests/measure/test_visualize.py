"""Source maps and images of them."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from transformers import CLIPImageProcessor, LlavaImageProcessor

import pitome_vlm
from pitome_vlm.loading import load_image
from pitome_vlm.measure.visualize import (
    Cell,
    Figure,
    SourceMap,
    Table,
    html_report,
    overlay,
    seen_region,
    source_map,
    strip,
)
from pitome_vlm.measure.visualize.drawing import region

SIDE = 96


def processor(**options):
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(**({"size": size, "do_center_crop": False} | options))


def photo(width: int = 160, height: int = 100, seed: int = 0) -> Image.Image:
    """Smooth, different everywhere, so that a shifted crop is noticed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def blocks(groups, colours, cell: int = 20) -> tuple[Image.Image, SourceMap]:
    """An image of one plain colour per patch, and a source map for it."""
    pixels = np.array(colours, np.uint8).repeat(cell, 0).repeat(cell, 1)
    groups = np.array(groups)
    return Image.fromarray(pixels), SourceMap(groups, int(groups.max()) + 1)


@pytest.mark.parametrize("algorithm", ["pitome", "tome", "random", "pool"])
@pytest.mark.parametrize(("kind", "cls"), [("clip", 0), ("clip_full", 1), ("siglip", 0)])
def test_source_map_is_the_partition_that_the_model_uses(kind, cls, algorithm):
    model = pitome_vlm.wrap(tiny_model(kind), tokens=36 + cls, algorithm=algorithm)
    image = photo(SIDE, SIDE)
    found = source_map(model, processor(), image)
    pixels = processor()(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        visual = pitome_vlm.encode_images(model, pixels)
    assert found.grid == (12, 12)
    assert found.tokens == visual.counts[0] == 36 + cls
    assert found.groups.ravel().tolist() == visual.source_maps[0][cls:].tolist()
    sizes = visual.sizes()[0] - (torch.arange(found.tokens) < cls).float()
    assert found.sizes.tolist() == sizes.tolist()
    assert found.sizes.sum() == 144
    assert set(found.groups.ravel()) == set(range(cls, found.tokens))


def test_the_image_is_seen_as_every_command_sees_it():
    """Turned as its EXIF says and on white, in the map and in what is drawn of it."""
    model, tall = pitome_vlm.wrap(tiny_model(), keep=0.25), photo(SIDE, SIDE // 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    lying = tall.convert("RGBA")
    lying.putalpha(photo(SIDE, SIDE // 2, seed=1).convert("L"))
    lying.save(file, "PNG", exif=exif)
    given, read = Image.open(file), load_image(file.getvalue())
    assert read.size == (SIDE // 2, SIDE)
    found, expected = (source_map(model, processor(), one) for one in (given, read))
    assert np.array_equal(found.groups, expected.groups)
    drawn, wanted = (overlay(one, expected, size=240) for one in (given, read))
    assert drawn.tobytes() == wanted.tobytes()
    shown, wanted = (strip([("a", one)]) for one in (given, read))
    assert shown.tobytes() == wanted.tobytes()


def test_rows_and_columns_are_not_swapped():
    model = pitome_vlm.wrap(tiny_model(), tokens=36, algorithm="pool")
    groups = source_map(model, processor(), photo()).groups
    rows, columns = np.indices((12, 12)) // 2
    assert (groups == rows * 6 + columns).all()


def test_keep_1_gives_every_patch_its_own_token():
    model = pitome_vlm.wrap(tiny_model(), keep=1.0)
    found = source_map(model, processor(), photo())
    assert (found.groups.ravel() == np.arange(144)).all()
    assert found.seen is None


@pytest.mark.parametrize("kind", ["clip", "clip_full", "siglip"])
@pytest.mark.parametrize("stage", ["tower", "projector"])
def test_random_marks_the_patches_that_survive(kind, stage):
    model = pitome_vlm.wrap(tiny_model(kind), keep=0.25, algorithm="random", stage=stage)
    found = source_map(model, processor(), photo())
    cls = kind == "clip_full"
    assert found.seen is not None
    assert found.seen.sum() == found.tokens - cls
    # One survivor per token.
    assert sorted(found.groups[found.seen]) == list(range(cls, found.tokens))


@pytest.mark.parametrize("kind", ["clip", "clip_full"])
def test_survivors_are_those_whose_features_come_through(kind):
    model, image = tiny_model(kind), photo(SIDE, SIDE)
    pixels = processor()(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        whole = pitome_vlm.encode_images(pitome_vlm.wrap(model, keep=1.0), pixels).features[0]
        pitome_vlm.wrap(model, keep=0.25, algorithm="random")
        merged = pitome_vlm.encode_images(model, pixels).features[0]
    found = source_map(model, processor(), image)
    cls = len(whole) - 144
    for patch in np.flatnonzero(found.seen):
        token = found.groups.ravel()[patch]
        torch.testing.assert_close(merged[token], whole[cls + patch])


def test_a_full_processor_serves_as_well_and_nothing_is_changed():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = photo()
    pixels = np.asarray(image).copy()

    class Processor:
        image_processor = processor()

    full, bare = (source_map(model, p, image) for p in (Processor(), processor()))
    assert (full.groups == bare.groups).all()
    assert (np.asarray(image) == pixels).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tokens_without_a_grid_are_refused():
    model = pitome_vlm.wrap(tiny_model("siglip_default"), keep=0.25)
    with pytest.raises(ValueError, match="143 visual tokens of this model form no grid"):
        source_map(model, processor(), photo())


def test_an_unwrapped_model_is_refused():
    with pytest.raises(ValueError, match="not wrapped"):
        source_map(tiny_model(), processor(), photo())


def test_several_tiles_are_refused():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)

    def tiles(images, return_tensors):
        return {"pixel_values": torch.zeros(1, 4, 3, SIDE, SIDE)}

    with pytest.raises(ValueError, match=r"one tile, got pixel values of shape \(1, 4"):
        source_map(model, tiles, photo())


@pytest.mark.parametrize("size", [(160, 100), (90, 211), (97, 96), (96, 96)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: processor(),
        lambda: processor(size={"shortest_edge": SIDE}, do_center_crop=True, crop_size=SIDE),
        lambda: processor(
            size={"height": 128, "width": 112},
            do_center_crop=True,
            crop_size={"height": SIDE, "width": SIDE},
        ),
        lambda: LlavaImageProcessor(
            do_pad=True, size={"height": SIDE, "width": SIDE}, do_center_crop=False
        ),
    ],
    ids=["stretch", "centre crop", "resize and crop", "pad"],
)
def test_seen_region_is_what_the_processor_hands_over(make, size):
    image, image_processor = photo(*size), make()
    pixels = image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (image_processor.image_mean, image_processor.image_std)
    )
    handed = ((pixels * std + mean) * 255).permute(1, 2, 0).numpy()
    box = seen_region(image_processor, image.size)
    left, upper, right, lower = box
    # Only inside of the image: padding is up to the processor.
    down, across = np.mgrid[0.5:SIDE, 0.5:SIDE] / SIDE
    x, y = left + across * (right - left), upper + down * (lower - upper)
    inside = (x > 0.03) & (x < 0.97) & (y > 0.03) & (y < 0.97)
    ours = np.asarray(region(image, box, (SIDE, SIDE)), np.float32)
    assert inside.mean() > 0.3
    assert np.abs(ours - handed)[inside].mean() < 4
    # To the pixel of the tower: in an image whose colours are places.
    rows, columns = np.mgrid[: size[1], : size[0]]
    colours = np.stack([255 * columns / size[0], 255 * rows / size[1], 0 * rows], -1)
    places = Image.fromarray(colours.round().astype(np.uint8))
    pixels = image_processor(images=places, return_tensors="pt")["pixel_values"][0]
    wanted = ((pixels * std + mean) * 255).permute(1, 2, 0).numpy()[..., :2]
    found = np.asarray(region(places, box, (SIDE, SIDE)), np.float32)[..., :2]
    moved = (found - wanted)[inside].mean(0) / 255 * SIDE / (right - left, lower - upper)
    assert np.abs(moved).max() < 0.1
    shifted = tuple(edge + 0.1 for edge in box)
    wrong = np.asarray(region(image, shifted, (SIDE, SIDE)), np.float32)
    assert np.abs(wrong - handed)[inside].mean() > 8


def test_overlay_fills_groups_with_their_mean_and_leaves_single_patches():
    red, blue, green, grey = (200, 0, 0), (0, 0, 100), (0, 255, 0), (9, 9, 9)
    image, groups = blocks([[0, 0], [1, 2]], [[red, blue], [green, grey]])
    drawn = np.asarray(overlay(image, groups, size=40, border=0))
    assert drawn.shape == (40, 40, 3)
    assert (drawn[:20] == (100, 0, 50)).all()
    assert (drawn[20:, :20] == green).all()
    assert (drawn[20:, 20:] == grey).all()


def test_a_group_has_one_colour_where_its_patches_do_not_touch():
    image, groups = blocks([[0, 1, 0]], [[(90, 0, 0), (0, 255, 0), (30, 0, 0)]])
    drawn = np.asarray(overlay(image, groups, size=60, border=2))
    assert (drawn[10, 10] == (60, 0, 0)).all()
    assert (drawn[10, 50] == (60, 0, 0)).all()
    assert (drawn[0, 0] == drawn[0, 59]).all()  # the same outline
    assert not (drawn[0, 0] == drawn[0, 30]).all()


@pytest.mark.parametrize("seed", range(5))
def test_outlines_run_between_groups_only(seed):
    grid = np.random.default_rng(seed).integers(0, 3, (5, 4))
    image, groups = blocks(
        np.unique(grid, return_inverse=True)[1].reshape(5, 4), [[(50,) * 3] * 4] * 5
    )
    drawn = np.asarray(overlay(image, groups, size=50, border=1)).astype(int)
    lines = (drawn != 50).any(-1)
    expected = np.zeros((50, 40), bool)
    framed = np.pad(groups.groups, 1, constant_values=-1)
    for row, column in np.ndindex(5, 4):
        y, x, own = row * 10, column * 10, framed[row + 1, column + 1]
        expected[y, x : x + 10] |= framed[row, column + 1] != own
        expected[y + 9, x : x + 10] |= framed[row + 2, column + 1] != own
        expected[y : y + 10, x] |= framed[row + 1, column] != own
        expected[y : y + 10, x + 9] |= framed[row + 1, column + 2] != own
    assert (lines == expected).all()


def test_two_groups_have_two_colours():
    image, groups = blocks([[0, 0], [1, 1]], [[(50, 50, 50)] * 2] * 2)
    drawn = np.asarray(overlay(image, groups, size=40, border=1))
    assert not (drawn[19, 5] == drawn[20, 5]).all()


def test_dropped_patches_fade():
    image, groups = blocks([[0, 0], [1, 1]], [[(255, 0, 0)] * 2] * 2)
    seen = np.array([[True, False], [False, True]])
    drawn = overlay(image, SourceMap(groups.groups, 2, seen), size=40, border=0)
    colours = np.asarray(drawn)[[10, 10, 30, 30], [10, 30, 10, 30]].astype(int)
    saturation = colours.max(1) - colours.min(1)
    assert (saturation[[0, 3]] == 255).all()
    assert (saturation[[1, 2]] < 60).all()


def test_overlay_keeps_the_shape_of_the_region_that_was_seen():
    groups = np.arange(144).reshape(12, 12)
    wide = photo(200, 100)
    assert overlay(wide, SourceMap(groups, 144), size=480).size == (480, 240)
    box = seen_region(
        processor(size={"shortest_edge": SIDE}, do_center_crop=True, crop_size=SIDE), wide.size
    )
    assert box == pytest.approx((0.25, 0, 0.75, 1))
    assert overlay(wide, SourceMap(groups, 144, box=box), size=480).size == (480, 480)


def test_overlay_without_merging_is_the_image():
    image = photo(96, 96)
    groups = SourceMap(np.arange(144).reshape(12, 12), 144)
    assert (np.asarray(overlay(image, groups, size=96, border=0)) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 20}, "size must be"),
        ({"border": 21}, "border must be in 0..20"),
        ({"border": -1}, "border"),
    ],
)
def test_overlay_refuses_what_cannot_be_seen(options, message):
    groups = SourceMap(np.arange(144).reshape(12, 12), 144)
    with pytest.raises(ValueError, match=message):
        overlay(photo(96, 96), groups, **options)


@pytest.mark.parametrize(
    ("groups", "tokens", "seen", "message"),
    [
        (np.arange(4), 4, None, "groups must be"),
        (np.array([[0, 4]]), 4, None, r"tokens 0\.\.3, got 0\.\.4"),
        (np.array([[-1, 0]]), 4, None, "groups must name"),
        (np.array([[0, 1]]), 2, np.array([True]), "seen must have the shape"),
    ],
)
def test_a_source_map_that_is_none_is_refused(groups, tokens, seen, message):
    with pytest.raises(ValueError, match=message):
        SourceMap(groups, tokens, seen)


def test_strip_puts_images_side_by_side_with_captions():
    red, blue = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (200, 100), "blue")
    sheet = np.asarray(strip([("a", red), ("two\nlines", blue)], height=100, gap=10))
    assert (sheet == (255, 0, 0)).all(-1).sum() == 100 * 100
    assert (sheet == (0, 0, 255)).all(-1).sum() == 200 * 100
    assert sheet.shape[1] == 100 + 200 + 3 * 10
    below = sheet[112:].astype(int)
    assert (below[:, :115] < 100).any()
    assert (below[:, 115:] < 100).any()


def test_strip_leaves_room_for_a_long_caption():
    small = Image.new("RGB", (10, 10), "red")
    long = strip([("a caption much wider than its image", small)], height=40, gap=4)
    assert long.width > 150


def test_strip_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        strip([])


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def report(**changes) -> str:
    image = photo(40, 30)
    table = Table(
        "Numbers", ["method", "right"], [["none", Cell("red", True)], ["x", Cell("up", False)]]
    )
    return html_report(
        "Title", **({"figures": [Figure(image, "cap", "note")], "tables": [table]} | changes)
    )


def test_report_needs_no_other_file():
    text = report()
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert all(a.get("src", "data:").startswith("data:") for _, a in page.tags)
    assert not any("href" in a for _, a in page.tags)
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    assert "prefers-color-scheme: dark" in text


def test_report_holds_the_images_themselves():
    (image,) = Page(report()).all("img")
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(io.BytesIO(data))) == np.asarray(photo(40, 30))).all()
    assert image["alt"] == "cap"


def test_report_escapes_what_it_is_given():
    nasty = "<script>alert(1)</script>&\"'"
    table = Table(nasty, [nasty], [[nasty], [Cell(nasty, True)]], note=nasty)
    figure = Figure(photo(8, 8), nasty, nasty)
    page = Page(html_report(nasty, lead=nasty, figures=[figure], tables=[table], footer=nasty))
    assert not page.all("script")
    assert page.all("img")[0]["alt"] == nasty
    assert "".join(page.text).count("<script>alert(1)</script>") == 11


def test_right_and_wrong_are_told_apart_without_colour():
    text = "".join(Page(report()).text)
    assert "✓ red" in text
    assert "✗ up" in text


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="'Numbers' must have 2 cells, got 1"):
        Table("Numbers", ["a", "b"], [["only one"]])
