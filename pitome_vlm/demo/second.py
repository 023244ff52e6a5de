"""Second questions: about another part of an image of which one question was answered before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pitome_vlm.demo.dataset import Sample
from pitome_vlm.demo.questions import PLURALS
from pitome_vlm.demo.scenes import COLOURS, SIZES

_NAMES = {*COLOURS, *SIZES, *PLURALS, *PLURALS.values()} - {"object", "objects"}


@dataclass(frozen=True)
class SecondQuestion(Sample):
    """A question that is asked after another one about the same scene and its right answer.

    Attributes:
        first_question: the text of the other one.
        first_answer: its answer.
    """

    first_question: str
    first_answer: str


def second_questions(samples: Sequence[Sample]) -> list[SecondQuestion]:
    """Every question after an earlier one about another part of the image.

    Another part: each names a colour, shape or size, and they share none. The first such question
    about the scene goes before; questions without one are left out.

    Args:
        samples: of a split, in order.
    """
    scenes: dict[int, list[Sample]] = {}
    for sample in samples:
        scenes.setdefault(sample.scene_id, []).append(sample)
    found = []
    for sample in samples:
        named = _named(sample)
        others = [
            other
            for other in scenes[sample.scene_id]
            if _named(other) and named.isdisjoint(_named(other))
        ]
        if named and others:
            question, answer = others[0].question, others[0].answer
            found.append(
                SecondQuestion(**vars(sample), first_question=question, first_answer=answer)
            )
    return found


def _named(sample: Sample) -> set[str]:
    """What a question and its answer name, in the singular."""
    singular = {plural: one for one, plural in PLURALS.items()}
    words = {*sample.question.replace("?", " ").split(), sample.answer}
    return {singular.get(word, word) for word in words & _NAMES}
