"""Structured scenes: towers of touching blocks, tables, lines of digits, texture, maps.

Where merging is hardest to get right: many equal things next to each other, whose number and place
matter. Never used in training. The objects, sizes and words are those of the other scenes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from .scenes import (
    CANONICAL_SIZE,
    COLOURS,
    MAX_OBJECTS,
    NUMBER,
    RADII,
    SHAPES,
    Background,
    Scene,
    SceneObject,
    place,
)

STRUCTURED_KINDS = ("towers", "table", "lines", "texture", "map")
_BACKGROUNDS = {
    "towers": ("plain", "gradient", "stripes"),
    "table": ("ruled",),
    "lines": ("plain", "gradient"),
    "texture": ("motif",),
    "map": ("regions",),
}
_MARGIN = 4


def sample_structured(rng: random.Random, kind: str) -> Scene:
    """Draw one structured scene of the given kind from a seeded generator.

    Raises:
        ValueError: `kind` is not one of `STRUCTURED_KINDS`.
    """
    if kind not in STRUCTURED_KINDS:
        raise ValueError(f"kind must be one of {', '.join(STRUCTURED_KINDS)}, got {kind!r}")
    objects, period = _SAMPLERS[kind](rng)
    grey = rng.uniform(95, 165)
    base = tuple(round(grey + rng.uniform(-16, 16)) for _ in range(3))
    background = Background(
        kind=rng.choice(_BACKGROUNDS[kind]),
        base=(base[0], base[1], base[2]),
        angle=round(rng.uniform(0, 2 * math.pi), 4),
        period=period,
        strength=round(rng.uniform(0.6, 1.0), 4),
        grain=round(rng.uniform(1.0, 4.0), 4),
        noise_seed=rng.getrandbits(31),
    )
    return Scene(kind, background, tuple(objects))


Sampled = tuple[list[SceneObject], int]
"""Objects and the period of the background in pixels."""


def _towers(rng: random.Random) -> Sampled:
    """Two to four towers of touching squares on one ground; neighbouring towers touch as well."""
    radius = rng.randint(8, 12)
    size = "small" if radius < 10 else "medium"
    columns, palette = rng.randint(2, 4), rng.sample(COLOURS, rng.randint(1, 2))
    heights = [1] * columns
    for _ in range(rng.randint(columns, MAX_OBJECTS - 1) - columns):
        heights[rng.randrange(columns)] += 1
    pitch = 2 * radius + 1
    heights = [min(height, (CANONICAL_SIZE - 2 * _MARGIN) // pitch) for height in heights]
    left = rng.randint(radius + _MARGIN, CANONICAL_SIZE - radius - _MARGIN - columns * pitch)
    tallest = (max(heights) - 1) * pitch
    ground = rng.randint(radius + _MARGIN + tallest, CANONICAL_SIZE - 1 - radius - _MARGIN)
    objects = []
    for column, height in enumerate(heights):
        colour = rng.choice(palette)
        for level in range(height):
            x, y = left + column * pitch, ground - level * pitch
            objects.append(SceneObject("square", colour, size, x, y, radius))
    _add(rng, objects, 1)
    return objects, rng.choice((10, 14, 18))


def _table(rng: random.Random) -> Sampled:
    """Cells of a ruled grid, each empty or with one digit or shape in its middle."""
    pitch = rng.choice((38, 48))
    cells = [(c, r) for r in range(CANONICAL_SIZE // pitch) for c in range(CANONICAL_SIZE // pitch)]
    filled = rng.sample(cells, rng.randint(4, MAX_OBJECTS))
    colours, shapes = rng.sample(COLOURS, 4), rng.sample(SHAPES, 2)
    return _in_cells(rng, filled, pitch, colours, shapes), pitch


def _in_cells(
    rng: random.Random,
    cells: Iterable[tuple[int, int]],
    pitch: int,
    colours: list[str],
    shapes: list[str],
) -> list[SceneObject]:
    objects, unread = [], list(colours)
    for column, row in cells:
        x, y = column * pitch + pitch // 2, row * pitch + pitch // 2
        if unread and rng.random() < 0.4:
            # One digit of each colour, so that a question can name it.
            objects.append(_digit(rng, unread.pop(), x, y))
        else:
            radius = rng.randint(*RADII["small"])
            objects.append(
                SceneObject(rng.choice(shapes), rng.choice(colours), "small", x, y, radius)
            )
    return objects


def _lines(rng: random.Random) -> Sampled:
    """Lines of digits, close to each other as text is; every digit has a colour of its own."""
    colours = rng.sample(COLOURS, rng.randint(5, len(COLOURS)))
    per_line, lead = rng.randint(3, 4), rng.randint(30, 36)
    left, top = rng.randint(20, 70), rng.randint(24, 80)
    return [
        _digit(rng, colour, left + 22 * (i % per_line), top + lead * (i // per_line))
        for i, colour in enumerate(colours)
    ], 14


def _digit(rng: random.Random, colour: str, x: int, y: int) -> SceneObject:
    return SceneObject(NUMBER, colour, "small", x, y, 11, digit=rng.randint(0, 9))


def _texture(rng: random.Random) -> Sampled:
    """Things on a repeated motif."""
    objects: list[SceneObject] = []
    _add(rng, objects, rng.randint(3, 6))
    return objects, rng.choice((12, 16, 20, 24))


def _map(rng: random.Random) -> Sampled:
    """Small signs of few kinds on regions of different shades."""
    objects: list[SceneObject] = []
    colours, shapes = rng.sample(COLOURS, 3), rng.sample(SHAPES, 2)
    for _ in range(rng.randint(4, 8)):
        radius = rng.randint(*RADII["small"])
        sign = SceneObject(rng.choice(shapes), rng.choice(colours), "small", 0, 0, radius)
        place(rng, sign, objects)
    return objects, rng.randint(5, 9)


def _add(rng: random.Random, objects: list[SceneObject], count: int) -> None:
    for _ in range(min(count, MAX_OBJECTS - len(objects))):
        size = rng.choice(("small", "medium"))
        template = SceneObject(rng.choice(SHAPES), rng.choice(COLOURS), size, 0, 0, 0)
        place(rng, replace(template, radius=rng.randint(*RADII[size])), objects)


_SAMPLERS: dict[str, Callable[[random.Random], Sampled]] = {
    "towers": _towers,
    "table": _table,
    "lines": _lines,
    "texture": _texture,
    "map": _map,
}
