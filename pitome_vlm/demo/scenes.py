"""Scene descriptions of the demo: what may be in an image, and where.

Every kind of scene is sampled from a seeded generator. `drawing` makes the pixels, `questions` the
questions, and `dataset` assigns scenes to splits by the hash of their layout. Standard library
only.

Coordinates are pixels of the canonical 192 x 192 image, origin top left.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

CANONICAL_SIZE = 192

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBER = "number"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SIZES = ("tiny", "small", "medium", "large")
BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "noise")
KINDS = ("scattered", "identical", "digits", "tiny", "crowded", "redundant")
MAX_OBJECTS = 9

RADII = {"tiny": (6, 6), "small": (8, 9), "medium": (12, 14), "large": (18, 22)}
_DIGIT_RADII = {"small": (11, 11), "medium": (14, 15)}
_EDGE = 3
_GAP = 4


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene; `digit` is set exactly when `shape` is "number"."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    radius: int
    digit: int | None = None


@dataclass(frozen=True)
class Background:
    """The background: a grey-ish base colour and a low-contrast texture."""

    kind: str
    base: tuple[int, int, int]
    angle: float
    period: int
    strength: float
    grain: float
    noise_seed: int


@dataclass(frozen=True)
class Scene:
    """A whole image as a description; `kind` is one of `KINDS` or of `STRUCTURED_KINDS`."""

    kind: str
    background: Background
    objects: tuple[SceneObject, ...]


def layout_hash(scene: Scene) -> int:
    """A stable 64-bit hash of what stands where, blind to background, order and small shifts.

    Positions count in steps of 4 pixels, so two scenes that differ by less than that have the
    same layout. Python's own `hash` is salted per process and would not do.
    """
    rows = sorted(
        (o.shape, o.colour, o.size, -1 if o.digit is None else o.digit, o.x // 4, o.y // 4)
        for o in scene.objects
    )
    return int.from_bytes(hashlib.sha256(repr(rows).encode()).digest()[:8], "big")


def sample_scene(rng: random.Random, kind: str) -> Scene:
    """Draw one scene of the given kind from a seeded generator."""
    if kind not in _SAMPLERS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    objects = _SAMPLERS[kind](rng)
    if kind == "redundant":
        background = _sample_background(rng, ("plain", "gradient"), textured=False)
    elif kind == "tiny":
        background = _sample_background(rng, ("stripes", "checks", "noise"), textured=True)
    else:
        background = _sample_background(rng, BACKGROUNDS, textured=True)
    return Scene(kind=kind, background=background, objects=tuple(objects))


def _sample_background(rng: random.Random, kinds: tuple[str, ...], textured: bool) -> Background:
    grey = rng.uniform(95, 165)
    base = tuple(round(grey + rng.uniform(-16, 16)) for _ in range(3))
    return Background(
        kind=rng.choice(kinds),
        base=(base[0], base[1], base[2]),
        angle=round(rng.uniform(0, 2 * math.pi), 4),
        period=rng.choice((10, 12, 14, 16, 18, 20)),
        strength=round(rng.uniform(0.5, 1.0), 4),
        grain=round(rng.uniform(2.0, 6.0) if textured else 1.0, 4),
        noise_seed=rng.getrandbits(31),
    )


def _free(candidate: SceneObject, placed: list[SceneObject]) -> bool:
    return all(
        max(abs(candidate.x - other.x), abs(candidate.y - other.y))
        > candidate.radius + other.radius + _GAP
        for other in placed
    )


def place(
    rng: random.Random, template: SceneObject, placed: list[SceneObject], tries: int = 60
) -> bool:
    """Append `template` to `placed` at a random free position; False if none was found."""
    low, high = template.radius + _EDGE, CANONICAL_SIZE - 1 - template.radius - _EDGE
    for _ in range(tries):
        candidate = replace(template, x=rng.randint(low, high), y=rng.randint(low, high))
        if _free(candidate, placed):
            placed.append(candidate)
            return True
    return False


def _thing(rng: random.Random, shape: str, colour: str, size: str) -> SceneObject:
    return SceneObject(shape, colour, size, 0, 0, rng.randint(*RADII[size]))


def _digit(rng: random.Random, colour: str) -> SceneObject:
    size = rng.choice(tuple(_DIGIT_RADII))
    radius = rng.randint(*_DIGIT_RADII[size])
    return SceneObject(NUMBER, colour, size, 0, 0, radius, digit=rng.randint(0, 9))


def _fill(
    rng: random.Random, placed: list[SceneObject], count: int, sizes: tuple[str, ...]
) -> None:
    """Add up to `count` things from a reduced palette, so that counts above one are common."""
    colours = rng.sample(COLOURS, rng.randint(2, 5))
    shapes = rng.sample(SHAPES, rng.randint(2, 5))
    for _ in range(count):
        thing = _thing(rng, rng.choice(shapes), rng.choice(colours), rng.choice(sizes))
        place(rng, thing, placed)


def _scattered(rng: random.Random) -> list[SceneObject]:
    placed: list[SceneObject] = []
    if rng.random() < 0.5:
        place(rng, _digit(rng, rng.choice(COLOURS)), placed)
    _fill(rng, placed, rng.randint(3, 7) - len(placed), ("small", "medium", "large"))
    return placed


def _identical(rng: random.Random) -> list[SceneObject]:
    """A row, stack or pile of equal touching things, and others around it."""
    placed: list[SceneObject] = []
    size = rng.choice(("small", "medium"))
    shape = "square" if rng.random() < 0.7 else rng.choice(("circle", "ring", "cross"))
    block = _thing(rng, shape, rng.choice(COLOURS), size)
    cells = _block_cells(rng, rng.randint(2, 6))
    pitch = 2 * block.radius + 1
    columns, rows = max(c for c, _ in cells), max(r for _, r in cells)
    margin = block.radius + _EDGE
    left = rng.randint(margin, CANONICAL_SIZE - 1 - margin - columns * pitch)
    top = rng.randint(margin, CANONICAL_SIZE - 1 - margin - rows * pitch)
    placed = [replace(block, x=left + c * pitch, y=top + r * pitch) for c, r in cells]
    if rng.random() < 0.3:
        place(rng, _digit(rng, rng.choice(COLOURS)), placed)
    _fill(
        rng, placed, min(rng.randint(1, 3), MAX_OBJECTS - len(placed)), ("small", "medium", "large")
    )
    return placed


def _block_cells(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Grid cells (column, row) of `count` blocks as a row, a stack or a pile on the ground."""
    form = rng.choice(("row", "stack", "pile"))
    if form == "row":
        return [(i, 0) for i in range(count)]
    if form == "stack":
        return [(0, i) for i in range(count)]
    width = rng.randint(2, 3)
    heights = [0] * width
    for _ in range(count):
        heights[rng.randrange(width)] += 1
    heights = [h for h in heights if h]
    tallest = max(heights)
    return [(c, tallest - 1 - level) for c, h in enumerate(heights) for level in range(h)]


def _digits(rng: random.Random) -> list[SceneObject]:
    placed: list[SceneObject] = []
    for colour in rng.sample(COLOURS, rng.randint(1, 4)):
        place(rng, _digit(rng, colour), placed)
    _fill(rng, placed, rng.randint(2, 4), ("small", "medium", "large"))
    return placed


def _tiny(rng: random.Random) -> list[SceneObject]:
    placed: list[SceneObject] = []
    place(rng, _thing(rng, rng.choice(SHAPES), rng.choice(COLOURS), "tiny"), placed)
    if rng.random() < 0.5:
        _fill(rng, placed, 1, ("medium", "large"))
    return placed


def _crowded(rng: random.Random) -> list[SceneObject]:
    placed: list[SceneObject] = []
    if rng.random() < 0.4:
        place(rng, _digit(rng, rng.choice(COLOURS)), placed)
    _fill(rng, placed, rng.randint(8, MAX_OBJECTS) - len(placed), ("small", "small", "medium"))
    return placed


def _redundant(rng: random.Random) -> list[SceneObject]:
    placed: list[SceneObject] = []
    for _ in range(rng.randint(1, 2)):
        thing = _thing(rng, rng.choice(SHAPES), rng.choice(COLOURS), "large")
        place(rng, replace(thing, radius=rng.randint(20, 34)), placed)
    return placed


_SAMPLERS: dict[str, Callable[[random.Random], list[SceneObject]]] = {
    "scattered": _scattered,
    "identical": _identical,
    "digits": _digits,
    "tiny": _tiny,
    "crowded": _crowded,
    "redundant": _redundant,
}
