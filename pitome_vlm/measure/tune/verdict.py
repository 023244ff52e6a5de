"""Whether a setting may be used: the verdict on a tuning run, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ..stats import Loss
from ..tables import percent, percent_text
from .cells import Cell
from .search import within

# "met": the whole interval is within the target. "not_shown": the loss is, the interval is not.
# "unreduced": no setting held, all tokens are kept.
Verdict = Literal["met", "not_shown", "unreduced"]
# With less room below the target than this share of it, a number of images would be no advice.
_CLOSE = 0.25


def judge(
    cells: Sequence[Cell], checks: Sequence[Cell], *, max_loss: float, answered: bool
) -> tuple[Verdict, str]:
    """The verdict, and the statement in words.

    `cells` are of the search part, `checks` of the check part with the candidate last. With
    `answered` losses are of accuracy, otherwise of agreement with the unreduced model.
    """
    target = f"the target of at most {percent_text(max_loss)}"
    if not checks:
        if not cells:
            return "unreduced", "No setting could be measured: the config keeps all tokens."
        least = min(cells, key=lambda cell: cell.loss.value)
        return "unreduced", (
            f"No setting is within {target} on the {least.loss.questions} questions that were "
            f"searched; the least is {percent_text(least.loss.value)} with {named(least)}. The "
            "config keeps all tokens."
        )
    last = checks[-1]
    loss = last.loss
    about = f"{loss.questions} held-out questions about {loss.images} images"
    if not within(loss.value, max_loss):
        lost = ", ".join(f"{named(cell)} {_with_interval(cell.loss)}" for cell in checks)
        return "unreduced", (
            f"On {about} every setting that was checked misses {target}: {lost}. The config keeps "
            "all tokens."
        )
    what = "the loss of accuracy" if answered else "the loss of agreement with the unreduced model"
    sentence = f"On {about} {what} is {_with_interval(loss)}: {target}"
    if len(checks) > 1:
        before = "smaller budget" if len(checks) == 2 else f"{len(checks) - 1} smaller budgets"
        sentence += f" (missed by the {before} checked before)"
    if within(loss.high, max_loss):
        return "met", f"{sentence} is met."
    sentence += f" is not shown to be met: the interval reaches {percent_text(loss.high)}."
    return "not_shown", sentence + _wanted(loss, max_loss)


def named(cell: Cell) -> str:
    """A setting in words: recipe and tokens."""
    return f"{cell.recipe.name} at {cell.tokens} tokens"


def level(value: float) -> str:
    """The coverage of an interval in percent, with up to three digits."""
    return f"{100 * value:.3g} %"


def _with_interval(loss: Loss) -> str:
    ends = f"{percent(loss.low)} to {percent_text(loss.high)}"
    return f"{percent_text(loss.value)} ({level(loss.level)} interval {ends})"


def _wanted(loss: Loss, max_loss: float) -> str:
    """How many images would have been enough, where that can be said."""
    wide, room = loss.high - loss.value, max_loss - loss.value
    if room <= _CLOSE * max_loss:
        return " The loss is too close to the target for more images to settle it soon."
    images = math.ceil(loss.images * (wide / room) ** 2)
    # Two figures: this is an extrapolation.
    scale = 10 ** max(0, math.floor(math.log10(images)) - 1)
    return (
        f" To show it, about {math.ceil(images / scale) * scale} images to check on would be "
        "needed if the loss stays what it is."
    )
