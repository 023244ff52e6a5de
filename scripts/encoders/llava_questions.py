"""Questions about the scenes of `llava_scenes.py`, with exact one-word answers.

What, where, how many, whether there is one, which is larger, which digit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from pitome_vlm.demo import Sample
from pitome_vlm.demo.dataset import picked
from pitome_vlm.demo.questions import NUMBER_WORDS, QUADRANTS, Mention, Question

from .llava_scenes import NAMES, SIZE, SPLIT_SCENES, Library, Scene, Thing, scene

TYPES = ("what", "where", "count", "exists", "larger", "digit")
WORDS = (
    *("what", "is", "in", "the", "shown", "where", "how", "many", "times", "a", "things", "are"),
    *("there", "which", "larger", "or", "number", "yes", "no"),
)
PER_SCENE = 4  # of held-out scenes: every scene has so many
# Sides of two things that are asked for the larger one, in pixels of their images.
_LEAST_RATIO = 1.3
_LEAST_OFFSET = 12


def _quadrant(thing: Thing) -> str | None:
    """Of its middle; None near a border between two."""
    right, down = thing.x - SIZE // 2, thing.y - SIZE // 2
    if min(abs(right), abs(down)) < _LEAST_OFFSET:
        return None
    return QUADRANTS[2 * (down > 0) + (right > 0)]


def _once(scene: Scene) -> list[tuple[int, Thing]]:
    """Emoji, with their numbers, of which there is one."""
    counts = Counter(thing.name for thing in scene.things)
    return [
        (number, thing)
        for number, thing in enumerate(scene.things)
        if counts[thing.name] == 1 and thing.digit is None
    ]


def _asked(kind: str, text: str, answer: str, *meant: tuple[str, tuple[int, ...]]) -> Question:
    """A question; `meant` are words of it and the numbers of the things that they mean."""
    words = text.split()
    mentions = tuple(Mention(words.index(word), things) for word, things in meant)
    return Question(kind, text, answer, mentions)


def _what(scene: Scene, _rng: random.Random) -> list[Question]:
    if len(scene.things) == 1 and scene.things[0].digit is None:
        return [_asked("what", "what is shown ?", scene.things[0].name)]
    places = [_quadrant(thing) for thing in scene.things]
    if None in places:
        # Some may look as if they were there.
        return []
    return [
        _asked("what", f"what is in the {place} ?", thing.name)
        for thing, place in zip(scene.things, places, strict=True)
        if places.count(place) == 1 and thing.digit is None
    ]


def _where(scene: Scene, _rng: random.Random) -> list[Question]:
    found = []
    for number, thing in _once(scene):
        place = _quadrant(thing)
        if place is not None:
            text = f"where is the {thing.name} ?"
            found.append(_asked("where", text, place, (thing.name, (number,))))
    return found


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    total = NUMBER_WORDS[len(scene.things)]
    found = [_asked("count", "how many things are there ?", total)]
    names = {thing.name for thing in scene.things if thing.digit is None}
    for name in [*sorted(names), _absent(scene, rng)]:
        own = tuple(n for n, thing in enumerate(scene.things) if thing.name == name)
        text = f"how many times is the {name} shown ?"
        found.append(_asked("count", text, NUMBER_WORDS[len(own)], (name, own)))
    return found


def _absent(scene: Scene, rng: random.Random) -> str:
    names = {thing.name for thing in scene.things}
    return rng.choice([name for name in NAMES if name not in names])


def _exists(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    for number, thing in _once(scene):
        text = f"is there a {thing.name} ?"
        found.append(_asked("exists", text, "yes", (thing.name, (number,))))
    other = _absent(scene, rng)
    return [*found, _asked("exists", f"is there a {other} ?", "no", (other, ()))]


def _larger(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    for first, one in _once(scene):
        for second, other in _once(scene):
            if one.side >= _LEAST_RATIO * other.side:
                pair = [(one.name, (first,)), (other.name, (second,))]
                rng.shuffle(pair)
                text = f"which is larger the {pair[0][0]} or the {pair[1][0]} ?"
                found.append(_asked("larger", text, one.name, *pair))
    return found


def _digit(scene: Scene, _rng: random.Random) -> list[Question]:
    written = [(number, thing.digit) for number, thing in enumerate(scene.things)]
    return [
        _asked("digit", "what number is shown ?", NUMBER_WORDS[digit], ("number", (number,)))
        for number, digit in written
        if digit is not None
    ]


_MAKERS: dict[str, Callable[[Scene, random.Random], list[Question]]] = {
    "what": _what,
    "where": _where,
    "count": _count,
    "exists": _exists,
    "larger": _larger,
    "digit": _digit,
}


def questions(
    number: int, split: str, count: int, found: Library, counts: Counter[tuple[str, str]]
) -> tuple[Scene, list[Question]]:
    """A scene and up to `count` questions about it, the rarest types and answers so far first.

    Args:
        number: of the scene.
        split: it belongs to.
        count: at most so many.
        found: what scenes are made of.
        counts: how often each (type, answer) was asked before; brought up to date.
    """
    rng = random.Random(f"questions/{split}/{number}")
    described = scene(number, split, found)
    pools = {name: make(described, rng) for name, make in _MAKERS.items()}
    for pool in pools.values():
        rng.shuffle(pool)
    return described, picked(pools, count, rng, counts)


def load_split(split: str, found: Library, limit: int | None = None) -> list[Sample]:
    """The questions of a split, those of the first `limit` scenes."""
    counts: Counter[tuple[str, str]] = Counter()
    samples = []
    for number in range(min(limit or SPLIT_SCENES[split], SPLIT_SCENES[split])):
        described, asked = questions(number, split, PER_SCENE, found, counts)
        samples += [Sample(number, described.kind, q.type, q.text, q.answer) for q in asked]
    return samples
