"""From a scene description to pixels.

Backgrounds and objects are drawn with Pillow and numpy, at the canonical size or larger for
display.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pitome_vlm.demo.scenes import CANONICAL_SIZE, NUMBER, Background, Scene, SceneObject

MAX_SIZE = 4096

_RGB = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (238, 218, 50),
    "purple": (150, 60, 190),
    "orange": (244, 138, 28),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
_OUTLINE_SHADE = 0.55

Points = list[tuple[float, float]]
FloatArray = npt.NDArray[np.float32]


def draw_scene(scene: Scene, size: int = CANONICAL_SIZE) -> Image.Image:
    """Render a scene as a square RGB image; the same scene gives the same pixels."""
    if not CANONICAL_SIZE // 4 <= size <= MAX_SIZE:
        raise ValueError(f"size must be in {CANONICAL_SIZE // 4}..{MAX_SIZE}, got {size}")
    image = _draw_background(scene.background)
    if size != CANONICAL_SIZE:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        fill = _RGB[thing.colour]
        shaded = (int(fill[0] * _OUTLINE_SHADE), int(fill[1] * _OUTLINE_SHADE))
        outline = (*shaded, int(fill[2] * _OUTLINE_SHADE))
        if thing.colour == "black":
            outline = (70, 70, 70)
        _draw_object(draw, thing, size / CANONICAL_SIZE, fill, outline)
    return image


def object_map(scene: Scene) -> npt.NDArray[np.uint8]:
    """For each canonical pixel 0 for background, or 1 + the index of the object seen there."""
    canvas = Image.new("L", (CANONICAL_SIZE, CANONICAL_SIZE))
    draw = ImageDraw.Draw(canvas)
    for index, thing in enumerate(scene.objects, start=1):
        _draw_object(draw, thing, 1.0, index, index)
    return np.asarray(canvas, dtype=np.uint8)


@functools.cache
def _grid() -> tuple[FloatArray, FloatArray]:
    rows, columns = np.mgrid[0:CANONICAL_SIZE, 0:CANONICAL_SIZE].astype(np.float32)
    return rows, columns


def _texture(background: Background, noise: np.random.RandomState) -> FloatArray:
    rows, columns = _grid()
    slope = columns * math.cos(background.angle) + rows * math.sin(background.angle)
    texture: npt.NDArray[np.floating[Any]]
    if background.kind == "gradient":
        span = float(slope.max() - slope.min())
        texture = ((slope - slope.min()) / span - 0.5) * (70.0 * background.strength)
    elif background.kind == "stripes":
        wave = np.sin(slope * (2 * math.pi / background.period))
        texture = wave * (17.0 * background.strength)
    elif background.kind == "checks":
        parity = (columns // background.period + rows // background.period) % 2
        texture = (parity * 2 - 1) * (14.0 * background.strength)
    elif background.kind == "noise":
        coarse = noise.randint(0, 256, (24, 24)).astype(np.uint8)
        cloud = Image.fromarray(coarse).resize(
            (CANONICAL_SIZE, CANONICAL_SIZE), Image.Resampling.BICUBIC
        )
        texture = (np.asarray(cloud, np.float32) / 255 - 0.5) * (60.0 * background.strength)
    elif background.kind in _STRUCTURED:
        texture = _STRUCTURED[background.kind](background, noise)
    else:
        texture = np.zeros_like(rows)
    return texture.astype(np.float32)


def _ruled(background: Background, _noise: np.random.RandomState) -> FloatArray:
    """Dark lines between the cells of a table."""
    rows, columns = _grid()
    line = (columns % background.period < 2) | (rows % background.period < 2)
    return np.where(line, np.float32(-70), np.float32(0))


def _motif(background: Background, noise: np.random.RandomState) -> FloatArray:
    """One small random pattern, again and again."""
    period = background.period
    motif = noise.normal(0, 22 * background.strength, (period // 4, period // 4))
    tile = np.kron(motif, np.ones((4, 4)))
    repeats = -(-CANONICAL_SIZE // period)
    return np.tile(tile, (repeats, repeats))[:CANONICAL_SIZE, :CANONICAL_SIZE].astype(np.float32)


def _regions(background: Background, noise: np.random.RandomState) -> FloatArray:
    """Flat regions of different shades; a pixel belongs to the nearest of `period` centres."""
    rows, columns = _grid()
    centres = noise.uniform(0, CANONICAL_SIZE, (background.period, 2))
    shades = noise.uniform(-32, 32, background.period) * background.strength
    distances = [(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres]
    nearest: FloatArray = shades[np.argmin(distances, axis=0)].astype(np.float32)
    return nearest


_STRUCTURED = {"ruled": _ruled, "motif": _motif, "regions": _regions}


def _draw_background(background: Background) -> Image.Image:
    noise = np.random.RandomState(background.noise_seed)
    texture = _texture(background, noise)
    grain = noise.randint(-100, 101, texture.shape).astype(np.float32) * (
        background.grain * math.sqrt(3) / 100
    )
    shade = texture + grain
    base = np.asarray(background.base, np.float32)
    pixels = np.clip(base + shade[:, :, None], 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _draw_object(
    draw: ImageDraw.ImageDraw,
    thing: SceneObject,
    scale: float,
    fill: int | tuple[int, int, int],
    outline: int | tuple[int, int, int],
) -> None:
    x, y, r = (thing.x + 0.5) * scale - 0.5, (thing.y + 0.5) * scale - 0.5, thing.radius * scale
    line = max(1, round(scale * (2 if thing.radius > 10 else 1)))
    box = (x - r, y - r, x + r, y + r)
    if thing.shape == NUMBER:
        weight = max(1, round(scale))
        draw.text(
            (x, y),
            str(thing.digit),
            fill=fill,
            font=_font(round(2.5 * r)),
            anchor="mm",
            stroke_width=weight,
            stroke_fill=fill,
        )
    elif thing.shape == "circle":
        draw.ellipse(box, fill=fill, outline=outline, width=line)
    elif thing.shape == "square":
        draw.rectangle(box, fill=fill, outline=outline, width=line)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, round(r * 0.4)))
    else:
        draw.polygon(_outline_points(thing.shape, x, y, r), fill=fill, outline=outline, width=1)


def _outline_points(shape: str, x: float, y: float, r: float) -> Points:
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "star":
        points: Points = []
        for corner in range(10):
            reach = r * (1.1 if corner % 2 == 0 else 0.46)
            angle = math.pi * corner / 5
            points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
        return points
    if shape == "cross":
        t = r * 0.36
        return [
            (x - t, y - r),
            (x + t, y - r),
            (x + t, y - t),
            (x + r, y - t),
            (x + r, y + t),
            (x + t, y + t),
            (x + t, y + r),
            (x - t, y + r),
            (x - t, y + t),
            (x - r, y + t),
            (x - r, y - t),
            (x - t, y - t),
        ]
    raise ValueError(f"shape {shape!r} has no outline")
