"""Template questions about a scene, with exact one-word answers.

A question keeps its mentions (where each object phrase ends and which objects it means), so that
training can ground the phrase; nothing else uses them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pitome_vlm.demo.scenes import (
    CANONICAL_SIZE,
    COLOURS,
    NUMBER,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
)

QUESTION_TYPES = (
    "colour",
    "shape",
    "count",
    "exists",
    "where",
    "relation",
    "size",
    "number",
    "compare",
)
NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
    NUMBER: "numbers",
    "object": "objects",
}
MAX_COUNT = 6

_MIDDLE = CANONICAL_SIZE // 2
_MIN_OFFSET = 8
_MIN_DISTANCE = 16


@dataclass(frozen=True)
class Phrase:
    """Words that name objects: any of colour, shape and size may be left open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None

    def matches(self, thing: SceneObject) -> bool:
        """Whether `thing` is meant by this phrase."""
        return (
            (self.shape is None or thing.shape == self.shape)
            and (self.colour is None or thing.colour == self.colour)
            and (self.size is None or thing.size == self.size)
        )

    def words(self, plural: bool = False) -> str:
        """The phrase as text, such as "large red circle" or "red objects"."""
        noun = self.shape or "object"
        parts = [self.size, self.colour, PLURALS[noun] if plural else noun]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Mention:
    """Index of the last word of a phrase in the question, and the objects that it means."""

    word: int
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question of one of `QUESTION_TYPES` with its exact answer."""

    type: str
    text: str
    answer: str
    mentions: tuple[Mention, ...] = ()


Draft = tuple[str, list[tuple[Phrase, bool]], str]
"""Template with {} per phrase, the phrases (with plural flag), the answer."""


def questions_of_type(scene: Scene, question_type: str, rng: random.Random) -> list[Question]:
    """Questions of one type that `scene` supports, in random order, at most one per answer.

    One per answer, so that a caller who picks among them can balance the answers.
    """
    if question_type not in _MAKERS:
        allowed = ", ".join(QUESTION_TYPES)
        raise ValueError(f"question_type must be one of {allowed}, got {question_type!r}")
    drafts = _MAKERS[question_type](scene, rng)
    rng.shuffle(drafts)
    chosen: dict[str, Question] = {}
    for draft in drafts:
        if draft[2] not in chosen:
            chosen[draft[2]] = _finish(scene, question_type, draft)
    return list(chosen.values())


def _finish(scene: Scene, question_type: str, draft: Draft) -> Question:
    template, phrases, answer = draft
    words: list[str] = []
    mentions: list[Mention] = []
    remaining = iter(phrases)
    for token in template.split():
        if token != "{}":
            words.append(token)
            continue
        phrase, plural = next(remaining)
        words.extend(phrase.words(plural).split())
        meant = tuple(i for i, o in enumerate(scene.objects) if phrase.matches(o))
        mentions.append(Mention(len(words) - 1, meant))
    text = " ".join(words)
    return Question(question_type, text[0].upper() + text[1:] + "?", answer, tuple(mentions))


def _count(scene: Scene, phrase: Phrase) -> int:
    return sum(phrase.matches(thing) for thing in scene.objects)


def _unique_phrases(
    scene: Scene, *, colour: bool = True, shape: bool = True
) -> list[tuple[Phrase, SceneObject]]:
    """Phrases that mean exactly one object, without naming colour or shape if not allowed."""
    found: list[tuple[Phrase, SceneObject]] = []
    for thing in scene.objects:
        for phrase in _phrases_for(thing, colour, shape):
            if _count(scene, phrase) == 1:
                found.append((phrase, thing))
    return found


def _phrases_for(thing: SceneObject, colour: bool, shape: bool) -> list[Phrase]:
    phrases: list[Phrase] = []
    if colour and shape:
        phrases.append(Phrase(shape=thing.shape, colour=thing.colour))
    if shape:
        phrases.append(Phrase(shape=thing.shape))
        if not colour and thing.shape != NUMBER:
            phrases.append(Phrase(shape=thing.shape, size=thing.size))
    if colour and not shape:
        phrases.append(Phrase(colour=thing.colour))
    if not (colour and shape):
        phrases.append(Phrase())
    return phrases


def _colour(scene: Scene, rng: random.Random) -> list[Draft]:
    templates = ("what colour is the {}", "which colour is the {}", "what is the colour of the {}")
    return [
        (rng.choice(templates), [(phrase, False)], thing.colour)
        for phrase, thing in _unique_phrases(scene, colour=False)
    ]


def _shape(scene: Scene, rng: random.Random) -> list[Draft]:
    templates = ("what shape is the {}", "which shape is the {}", "what is the shape of the {}")
    return [
        (rng.choice(templates), [(phrase, False)], thing.shape)
        for phrase, thing in _unique_phrases(scene, shape=False)
        if thing.shape != NUMBER
    ]


def _countable(scene: Scene) -> list[Phrase]:
    phrases: dict[Phrase, None] = {Phrase(): None}
    for thing in scene.objects:
        phrases[Phrase(shape=thing.shape)] = None
        phrases[Phrase(colour=thing.colour)] = None
        phrases[Phrase(shape=thing.shape, colour=thing.colour)] = None
    return list(phrases)


def _count_drafts(scene: Scene, rng: random.Random) -> list[Draft]:
    templates = ("how many {} are there", "how many {} can you see", "count the {}")
    drafts: list[Draft] = []
    for phrase in _countable(scene):
        number = _count(scene, phrase)
        if 1 <= number <= MAX_COUNT:
            drafts.append((rng.choice(templates), [(phrase, True)], NUMBER_WORDS[number]))
    return drafts


def _absent_phrases(scene: Scene, rng: random.Random) -> list[Phrase]:
    """Phrases that mean nothing here; mostly a colour and a shape that are both present."""
    colours = sorted({thing.colour for thing in scene.objects})
    shapes = sorted({thing.shape for thing in scene.objects})
    candidates = [
        *(Phrase(shape=s, colour=c) for s in shapes for c in colours),
        *(Phrase(shape=rng.choice(SHAPES), colour=c) for c in colours),
        *(Phrase(shape=s, colour=rng.choice(COLOURS)) for s in shapes),
        Phrase(shape=rng.choice(SHAPES)),
        Phrase(colour=rng.choice(COLOURS)),
    ]
    return [phrase for phrase in candidates if _count(scene, phrase) == 0]


def _exists(scene: Scene, rng: random.Random) -> list[Draft]:
    templates = ("is there a {}", "is there a {} in the picture", "can you see a {}")
    present = [phrase for phrase in _countable(scene) if phrase != Phrase()]
    drafts: list[Draft] = [(rng.choice(templates), [(p, False)], "yes") for p in present]
    absent = _absent_phrases(scene, rng)
    drafts += [(rng.choice(templates), [(p, False)], "no") for p in absent]
    return drafts


def _where(scene: Scene, rng: random.Random) -> list[Draft]:
    templates = ("where is the {}", "in which corner is the {}")
    drafts: list[Draft] = []
    for phrase, thing in _unique_phrases(scene) + _unique_phrases(scene, shape=False):
        if min(abs(thing.x - _MIDDLE), abs(thing.y - _MIDDLE)) < _MIN_OFFSET:
            continue
        row = "top" if thing.y < _MIDDLE else "bottom"
        column = "left" if thing.x < _MIDDLE else "right"
        drafts.append((rng.choice(templates), [(phrase, False)], f"{row}-{column}"))
    return drafts


def _relation(scene: Scene, rng: random.Random) -> list[Draft]:
    unique = _unique_phrases(scene)
    drafts: list[Draft] = []
    for first, a in unique:
        for second, b in unique:
            if a is b:
                continue
            pair = [(first, False), (second, False)]
            for distance, before, after in (
                (b.x - a.x, "left", "right"),
                (b.y - a.y, "above", "below"),
            ):
                if abs(distance) < _MIN_DISTANCE:
                    continue
                joined = [w + " of" if w in ("left", "right") else w for w in (before, after)]
                side = rng.randrange(2)
                answer = "yes" if (distance > 0) == (side == 0) else "no"
                drafts.append((f"is the {{}} {joined[side]} the {{}}", pair, answer))
                choice = f"is the {{}} {before} or {joined[1]} the {{}}"
                drafts.append((choice, pair, before if distance > 0 else after))
    return drafts


def _size(scene: Scene, rng: random.Random) -> list[Draft]:
    templates = ("what size is the {}", "which size is the {}", "how big is the {}")
    return [
        (rng.choice(templates), [(phrase, False)], thing.size)
        for phrase, thing in _unique_phrases(scene)
        if thing.shape != NUMBER and thing.size in SIZES
    ]


def _number(scene: Scene, rng: random.Random) -> list[Draft]:
    templates = ("what is the {}", "which number is the {}", "what does the {} say")
    return [
        (rng.choice(templates), [(phrase, False)], NUMBER_WORDS[thing.digit])
        for phrase, thing in _unique_phrases(scene)
        if thing.digit is not None
    ]


def _compare(scene: Scene, rng: random.Random) -> list[Draft]:
    colours = Counter(thing.colour for thing in scene.objects)
    shapes = Counter(thing.shape for thing in scene.objects)
    absent = [Phrase(colour=rng.choice(COLOURS)), Phrase(shape=rng.choice(SHAPES))]
    phrases = [*(Phrase(colour=c) for c in colours), *(Phrase(shape=s) for s in shapes), *absent]
    drafts: list[Draft] = []
    for first in phrases:
        for second in phrases:
            comparable = first != second and (first.shape is None) == (second.shape is None)
            numbers = _count(scene, first), _count(scene, second)
            if not comparable or max(numbers) > MAX_COUNT or max(numbers) == 0:
                continue
            # Ties would make "no" guessable from equal-looking scenes; keep a few of them.
            if numbers[0] == numbers[1] and rng.random() < 0.75:
                continue
            word, gap = ("more", 1) if rng.random() < 0.6 else ("fewer", -1)
            answer = "yes" if (numbers[0] - numbers[1]) * gap > 0 else "no"
            drafts.append(
                (f"are there {word} {{}} than {{}}", [(first, True), (second, True)], answer)
            )
    return drafts


_MAKERS: dict[str, Callable[[Scene, random.Random], list[Draft]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count_drafts,
    "exists": _exists,
    "where": _where,
    "relation": _relation,
    "size": _size,
    "number": _number,
    "compare": _compare,
}
