"""Scenes for a LLaVA on the real tower: emoji and a written digit, on plain grounds and on photos.

A scene is a function of its split and number, as in `pitome_vlm.demo.dataset`. Names, images and
digits come out of packages (`tower_data.py`). Splits do not share compositions: which things are in
an image, and how many of each, belongs to one split, while every name is seen in all of them.
Written digits are not shared either.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .tower_data import PHOTOS, VENDORS, digits, photos

SIZE = 224  # pixels
_NAMES = (
    "cat dog cow tiger rabbit whale horse pig frog bear crab spider duck owl butterfly lizard "
    "octopus snail snake sheep monkey chicken elephant ant fish turtle penguin dolphin tulip "
    "rose sunflower mushroom apple banana pear cherries strawberry lemon grapes pizza "
    "hamburger egg carrot corn icecream doughnut cake beer bread avocado broccoli bus taxi "
    "tractor rocket helicopter airplane umbrella snowman guitar trumpet violin key lock bell "
    "hammer candle chair ladder scissors book calendar camera magnet basketball trophy gift "
    "balloon ghost skull heart star fire rainbow anchor"
)
NAMES = tuple(_NAMES.split())
SPLIT_SCENES = {"train": 10_000, "val": 200, "test": 200}
# One in eight compositions, and one in ten written digits, is for each held-out split.
_BUCKETS = {"train": (0, 1, 2, 3, 4, 5), "val": (6,), "test": (7,)}
_DIGITS = {"train": (0, 4000), "val": (4000, 4500), "test": (4500, 5000)}
# Photos of what has a name here.
_NO_GROUNDS = ("chelsea.png", "rocket.jpg", "camera.png")
KINDS = ("few", "several", "equal", "digit")
SIDES = {"small": (32, 42), "medium": (50, 64), "large": (78, 100)}
SIDE_NAMES = tuple(SIDES)
MOST_THINGS = 6
_EDGE, _GAP, _SEED = 3, 4, 5150


@dataclass(frozen=True)
class Thing:
    """An emoji, or a digit on a card.

    Attributes:
        name: of `NAMES`, or "0" to "9".
        style: the vendor's number, or the number of the written digit.
        x: of its middle, in pixels from the left.
        y: of its middle, from the top.
        side: of its square, in pixels.
    """

    name: str
    style: int
    x: int
    y: int
    side: int

    @property
    def digit(self) -> int | None:
        """The number on the card."""
        return int(self.name) if self.name.isdigit() else None

    @property
    def size(self) -> str:
        """Of `SIDES`."""
        return next(name for name in reversed(SIDE_NAMES) if self.side >= SIDES[name][0])


@dataclass(frozen=True)
class Scene:
    """A whole image as a description.

    Attributes:
        kind: of `KINDS`.
        things: none of which hides another.
        colour: of a plain ground.
        photo: number of the photo that is the ground; None for a plain one.
        crop: where its square begins and how large it is, as parts of what there is.
    """

    kind: str
    things: tuple[Thing, ...]
    colour: tuple[int, int, int]
    photo: int | None
    crop: tuple[float, float, float]


@dataclass(frozen=True)
class Library:
    """The images that scenes are made of.

    Attributes:
        emoji: RGBA, by vendor's number and name.
        digits: 28 x 28, black on white.
        labels: what is written on these.
        photos: RGB.
    """

    emoji: dict[tuple[int, str], Image.Image]
    digits: list[Image.Image]
    labels: tuple[int, ...]
    photos: list[Image.Image]

    def written(self, split: str) -> dict[int, list[int]]:
        """Numbers of the written digits of a split, by what they say."""
        first, last = _DIGITS[split]
        share = len(self.labels) / 5000
        found: dict[int, list[int]] = {}
        for number in range(int(first * share), int(last * share)):
            found.setdefault(self.labels[number], []).append(number)
        return found


@functools.cache
def library(packages: Path) -> Library:
    """All of it, read once.

    Args:
        packages: a folder in which `npm install emoji-datasource-google emoji-datasource-twitter`
            was run.
    """
    emoji = {}
    for style, vendor in enumerate(VENDORS):
        folder = packages / "node_modules" / f"emoji-datasource-{vendor}"
        if not folder.is_dir():
            raise SystemExit(f"{folder} is missing; run `npm install {folder.name}` in {packages}")
        rows = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        files = {row["short_name"]: row["image"] for row in rows}
        for name in NAMES:
            drawn = Image.open(folder / "img" / vendor / "64" / files[name]).convert("RGBA")
            emoji[style, name] = drawn
    written, labels = digits(5000)
    files = [file for some in PHOTOS.values() for file in some]
    grounds = [
        photo.convert("RGB")
        for file, photo in zip(files, photos(), strict=True)
        if file not in _NO_GROUNDS
    ]
    return Library(emoji, written, tuple(int(one) for one in labels), grounds)


def composition(scene: Scene) -> int:
    """A stable 64-bit hash of what is in a scene and how often, blind to places and looks."""
    names = sorted(thing.name for thing in scene.things)
    return int.from_bytes(hashlib.sha256(" ".join(names).encode()).digest()[:8], "big")


def scene(number: int, split: str, found: Library) -> Scene:
    """The description of one scene of a split.

    Args:
        number: 0 to `SPLIT_SCENES[split]` - 1.
        split: "train", "val" or "test".
        found: what it is made of.
    """
    kind = KINDS[number % len(KINDS)]
    for attempt in range(10_000):
        rng = random.Random(f"{_SEED}/{split}/{number}/{attempt}")
        candidate = _sampled(rng, kind, found, split)
        if composition(candidate) % 8 in _BUCKETS[split]:
            return candidate
    raise AssertionError("no composition of this split was drawn")


def _sampled(rng: random.Random, kind: str, found: Library, split: str) -> Scene:
    placed: list[Thing] = []
    _LAYOUTS[kind](rng, placed)
    if kind == "digit":
        value = rng.randrange(10)
        card = Thing(str(value), rng.choice(found.written(split)[value]), 0, 0, rng.randint(44, 64))
        placed.insert(0, card)
        placed[:] = _placed(rng, placed)
    photo = rng.randrange(len(found.photos)) if rng.random() < 0.5 else None
    colour = (rng.randint(90, 255), rng.randint(90, 255), rng.randint(90, 255))
    crop = (rng.random(), rng.random(), rng.uniform(0.5, 1.0))
    return Scene(kind, tuple(placed), colour, photo, crop)


def _emoji(rng: random.Random, name: str, size: str) -> Thing:
    return Thing(name, rng.randrange(len(VENDORS)), 0, 0, rng.randint(*SIDES[size]))


def _placed(rng: random.Random, things: list[Thing]) -> list[Thing]:
    """Each at a free place; those that find none are left out."""
    placed: list[Thing] = []
    for thing in things:
        low, high = thing.side // 2 + _EDGE, SIZE - thing.side // 2 - _EDGE
        for _ in range(60):
            candidate = replace(thing, x=rng.randint(low, high), y=rng.randint(low, high))
            if all(_apart(candidate, other) for other in placed):
                placed.append(candidate)
                break
    return placed


def _apart(one: Thing, other: Thing) -> bool:
    least = (one.side + other.side) / 2 + _GAP
    return max(abs(one.x - other.x), abs(one.y - other.y)) >= least


def _few(rng: random.Random, placed: list[Thing]) -> None:
    names = rng.sample(NAMES, rng.randint(1, 2))
    placed += _placed(rng, [_emoji(rng, name, rng.choice(SIDE_NAMES)) for name in names])


def _several(rng: random.Random, placed: list[Thing]) -> None:
    names = rng.sample(NAMES, rng.randint(3, 5))
    sizes = ("small", "medium", "medium", "large")
    placed += _placed(rng, [_emoji(rng, name, rng.choice(sizes)) for name in names])


def _equal(rng: random.Random, placed: list[Thing]) -> None:
    """Two to four that look the same, often in a row and nearly touching, and others."""
    name, *others = rng.sample(NAMES, rng.randint(1, 3))
    one, count = _emoji(rng, name, rng.choice(("small", "medium"))), rng.randint(2, 4)
    if rng.random() < 0.5 and count * (one.side + _GAP) + 2 * _EDGE < SIZE:
        pitch = one.side + _GAP
        reach, half = (count - 1) * pitch, one.side // 2 + _EDGE
        along = rng.randint(half, SIZE - half - reach)
        across = rng.randint(half, SIZE - half)
        places = [(along + pitch * step, across) for step in range(count)]
        if rng.random() < 0.5:
            places = [(y, x) for x, y in places]
        placed += [replace(one, x=x, y=y) for x, y in places]
    else:
        placed += _placed(rng, [one] * count)
    for name in others:
        extra = _emoji(rng, name, rng.choice(("small", "medium")))
        found = _placed(rng, [extra])[0]
        if all(_apart(found, other) for other in placed):
            placed.append(found)


def _with_digit(rng: random.Random, placed: list[Thing]) -> None:
    """What stands next to a digit, not placed yet."""
    names = rng.sample(NAMES, rng.randint(1, 3))
    placed += [_emoji(rng, name, rng.choice(("small", "medium"))) for name in names]


_LAYOUTS: dict[str, Callable[[random.Random, list[Thing]], None]] = {
    "few": _few,
    "several": _several,
    "equal": _equal,
    "digit": _with_digit,
}


def draw(described: Scene, found: Library) -> tuple[Image.Image, np.ndarray]:
    """The image, and which thing is seen where.

    Returns:
        RGB of `SIZE` square, and [SIZE, SIZE] uint8 with 0 for the ground and 1 + the number of
        a thing.
    """
    image = _ground(described, found)
    seen = Image.new("L", image.size)
    for number, thing in enumerate(described.things, start=1):
        place = (thing.x - thing.side // 2, thing.y - thing.side // 2)
        drawn = _drawn(thing, found)
        image.paste(drawn, place, drawn)
        seen.paste(number, place, drawn.getchannel("A").point(lambda alpha: 255 * (alpha > 100)))
    return image, np.asarray(seen)


def _ground(described: Scene, found: Library) -> Image.Image:
    if described.photo is None:
        return Image.new("RGB", (SIZE, SIZE), described.colour)
    photo = found.photos[described.photo]
    across, down, share = described.crop
    side = max(64, int(share * min(photo.size)))
    left, top = int(across * (photo.width - side)), int(down * (photo.height - side))
    square = (left, top, left + side, top + side)
    return photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=square)


def _drawn(thing: Thing, found: Library) -> Image.Image:
    """RGBA of its side."""
    side = (thing.side, thing.side)
    if thing.digit is None:
        return found.emoji[thing.style, thing.name].resize(side, Image.Resampling.BICUBIC)
    card = found.digits[thing.style].resize(side, Image.Resampling.BICUBIC).convert("RGBA")
    ImageDraw.Draw(card).rectangle((0, 0, thing.side - 1, thing.side - 1), outline=(90, 90, 90))
    return card
