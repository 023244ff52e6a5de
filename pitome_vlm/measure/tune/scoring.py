"""Is an answer right? Exact match after the usual VQA normalisation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

# From an answer and the accepted ones to a score in [0, 1].
Scorer = Callable[[str, Sequence[str]], float]

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
# Points and commas inside numbers are kept.
_PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]|_")
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


def normalise(answer: str) -> str:
    """Lower case, no punctuation, no articles, number words up to ten as digits, single spaces.

    This is the rule of the VQA evaluation (Antol et al. 2015) with two differences: a hyphen
    becomes a space, and an answer of nothing but articles or punctuation (the choice "A") is kept.
    """
    text = _THOUSANDS.sub("", _APOSTROPHE.sub("", answer.lower()))
    words = _PUNCTUATION.sub(" ", text).split()
    kept = [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or " ".join(answer.lower().split())


def exact_match(given: str, answers: Sequence[str]) -> float:
    """1 if the answer equals any accepted one after `normalise`, else 0."""
    found = normalise(given)
    return float(any(found == normalise(answer) for answer in answers))


def checked_score(scorer: Scorer, given: str, answers: Sequence[str]) -> float:
    """The scorer's score; ValueError if it is no number in [0, 1]."""
    score = float(scorer(given, answers))
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(
            f"scorer must return a number in [0, 1], got {score} for answer {given!r} and "
            f"accepted {list(answers)!r}"
        )
    return score
