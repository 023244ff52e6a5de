"""Images of source maps in the style of the ToMe paper's figures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ...loading.images import load_image
from .sources import Box, SourceMap

DEFAULT_SIZE = 480
MIN_CELL = 4
# Colour that dropped patches fade into, and that padding around an image has.
ABSENT = (127, 127, 127)
Floats = npt.NDArray[np.float32]


def overlay(
    image: Image.Image,
    source_map: SourceMap,
    *,
    size: int = DEFAULT_SIZE,
    border: int | None = None,
) -> Image.Image:
    """Paint every group of merged patches in its mean colour, outlined in a colour of its own.

    Patches that share fill and outline became one token, even if they do not touch. Patches merged
    with nothing keep their pixels; dropped ones fade to grey.

    Args:
        image: the image that the source map was made from, at any resolution.
        source_map: groups of that image's patches (`source_map`).
        size: length of the longer side in pixels, rounded to whole patches.
        border: width of outlines in pixels, 0 for none; None fits it to the patches.

    Returns:
        An RGB image of the part that the model saw.

    Raises:
        ValueError: `size` is too small to draw every patch, or `border` is too wide.
    """
    # Upright and without transparency, as the source map was made from it.
    image = load_image(image)
    rows, columns = source_map.grid
    across, down = _cell(image, source_map, size)
    cell = min(across, down)
    if cell < MIN_CELL:
        raise ValueError(
            f"size must be large enough for {MIN_CELL} pixels per patch; {size} gives {cell} for "
            f"{rows} x {columns} patches"
        )
    width = max(1, round(cell / 16)) if border is None else border
    if not 0 <= width <= cell // 2:
        raise ValueError(f"border must be in 0..{cell // 2} pixels, got {border}")
    seen = region(image, source_map.box, (columns * across, rows * down))
    # [rows, columns, y, x, rgb]: the pixels of every patch.
    patches = np.asarray(seen, np.float32).reshape(rows, down, columns, across, 3)
    patches = patches.transpose(0, 2, 1, 3, 4).copy()
    _fill(patches, source_map)
    _outline(patches, source_map, width)
    pixels = patches.transpose(0, 2, 1, 3, 4).reshape(rows * down, columns * across, 3)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _cell(image: Image.Image, source_map: SourceMap, size: int) -> tuple[int, int]:
    """Width and height of a patch in pixels; not square where the processor stretches."""
    rows, columns = source_map.grid
    left, upper, right, lower = source_map.box
    width, height = (right - left) * image.width, (lower - upper) * image.height
    scale = size / max(width, height)
    return round(width * scale / columns), round(height * scale / rows)


def region(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """The part of an image that a model sees, resized to `size`, padded outside of the image."""
    image = image.convert("RGB")
    corners = [edge * (image.width, image.height)[i % 2] for i, edge in enumerate(box)]
    inside = all(0 <= edge <= 1 for edge in box)
    if not inside:
        left, upper, right, lower = (round(edge) for edge in corners)
        padded = Image.new("RGB", (right - left, lower - upper), ABSENT)
        padded.paste(image, (-left, -upper))
        return padded.resize(size, Image.Resampling.LANCZOS)
    edges = corners[0], corners[1], corners[2], corners[3]
    return image.resize(size, Image.Resampling.LANCZOS, box=edges)


def _fill(patches: Floats, source_map: SourceMap) -> None:
    """Mean colours into merged patches, grey over dropped ones; in place."""
    if source_map.seen is not None:
        dropped = ~source_map.seen
        patches[dropped] = patches[dropped] * np.float32(0.15) + np.asarray(
            ABSENT, np.float32
        ) * np.float32(0.85)
        return
    groups, sizes = source_map.groups, source_map.sizes
    means = patches.mean((2, 3))
    total = np.zeros((source_map.tokens, 3), np.float32)
    np.add.at(total, groups.ravel(), means.reshape(-1, 3))
    colours = total / np.maximum(sizes, 1)[:, None]
    merged = sizes[groups] > 1
    patches[merged] = colours[groups[merged]][:, None, None, :]


def _outline(patches: Floats, source_map: SourceMap, width: int) -> None:
    """A line along every side where a patch meets another group; in place."""
    if width == 0:
        return
    groups, sizes = source_map.groups, source_map.sizes
    whole = sizes if source_map.seen is None else np.ones_like(sizes)
    colours = _group_colours(whole)[groups]
    if source_map.seen is not None:
        groups = np.where(source_map.seen, groups, -1)
        colours[~source_map.seen] = ABSENT
    framed = np.pad(groups, 1, constant_values=-2)
    sides = (
        (patches[:, :, :width], framed[:-2, 1:-1]),
        (patches[:, :, -width:], framed[2:, 1:-1]),
        (patches[:, :, :, :width], framed[1:-1, :-2]),
        (patches[:, :, :, -width:], framed[1:-1, 2:]),
    )
    for line, neighbour in sides:
        where = groups != neighbour
        line[where] = colours[where][:, None, None, :]


def _group_colours(sizes: npt.NDArray[np.int64]) -> Floats:
    """[tokens, 3]: a hue of its own for every group of several patches, white for single ones."""
    colours = np.full((len(sizes), 3), 255, np.float32)
    for rank, group in enumerate(np.flatnonzero(sizes > 1)):
        # Steps of the golden ratio keep the hues of neighbouring groups far apart.
        hue = colorsys.hsv_to_rgb(rank * 0.618034 % 1, 0.75, 1.0)
        colours[group] = np.asarray(hue) * 255
    return colours


def strip(
    figures: Sequence[tuple[str, Image.Image]], *, height: int = 360, gap: int = 16
) -> Image.Image:
    """Images side by side with captions under them.

    Args:
        figures: (caption, image) pairs; a caption may have several lines.
        height: height of every image in pixels.
        gap: pixels between and around the images.

    Returns:
        An RGB image.

    Raises:
        ValueError: there is no image, or `height` or `gap` is out of range.
    """
    if not figures:
        raise ValueError("strip needs at least one image, got none")
    if height < 1 or gap < 0:
        raise ValueError(f"height must be >= 1 and gap >= 0, got {height} and {gap}")
    font = ImageFont.load_default(max(12, round(height / 20)))
    shown = [_at_height(load_image(image), height) for _, image in figures]
    boxes = [_text_box(caption, font) for caption, _ in figures]
    widths = [max(p.width, box[2]) for p, box in zip(shown, boxes, strict=True)]
    below = max(box[3] for box in boxes)
    size = (sum(widths) + gap * (len(figures) + 1), height + below + round(gap * 2.5))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    for (caption, _), image, width in zip(figures, shown, widths, strict=True):
        centre = left + width / 2
        sheet.paste(image, (round(centre - image.width / 2), gap))
        place = (centre, height + gap * 1.5)
        draw.multiline_text(place, caption, "#222222", font, anchor="ma", align="center")
        left += width + gap
    return sheet


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Images one below the other, on white.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("stack needs at least one image, got none")
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def _at_height(image: Image.Image, height: int) -> Image.Image:
    if image.height == height:
        return image
    width = max(1, round(image.width * height / image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _text_box(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, ...]:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return tuple(round(edge) for edge in draw.multiline_textbbox((0, 0), caption, font))
