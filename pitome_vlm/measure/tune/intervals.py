"""How much quality is lost, and how sure that is.

Knows: scores with and without reduction, and which questions share pictures. Does not know:
models, settings or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
_CHUNK = 500


@dataclass(frozen=True)
class Loss:
    """Loss of quality on some questions, with an interval.

    Attributes:
        value: (unreduced - reduced) / unreduced, of the mean scores; negative is a gain.
        low: lower end of the interval.
        high: upper end.
        level: coverage of the interval.
        base: mean score of the unreduced model.
        reduced: mean score of the reduced one.
        questions: how many.
        images: groups of questions that share a picture; these are resampled.
    """

    value: float
    low: float
    high: float
    level: float
    base: float
    reduced: float
    questions: int
    images: int


def relative_loss(
    base: Sequence[float],
    reduced: Sequence[float],
    groups: Sequence[int],
    *,
    level: float = 0.95,
    gains: bool = True,
    seed: int = 0,
) -> Loss:
    """Relative loss of the mean score with a paired bootstrap interval over pictures.

    Questions about one picture fail together, so pictures are resampled, with both scores of all
    their questions. Two pictures that do not exist are added to what is resampled: one with one
    question lost, one with one question gained. They do not move the middle, and without them a
    part in which nothing differs would claim certainty. (Agresti and Min 2005 add half a question
    to every cell of a 2 x 2 table for the same reason.)

    Args:
        base: [questions] scores of the unreduced model, 0 to 1.
        reduced: [questions] scores of the reduced one.
        groups: [questions] which pictures they are about.
        level: coverage, in (0, 1).
        gains: whether reduction can gain at all; agreement with the unreduced model cannot.
        seed: of the resampling.

    Raises:
        ValueError: nothing the unreduced model answered is right, so that there is no loss.
    """
    whole = float(np.sum(base))
    if whole <= 0:
        raise ValueError("the unreduced model answers no question right; a loss is not defined")
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    images = int(index.max()) + 1
    before = np.append(np.bincount(index, weights=np.asarray(base, float)), (1.0, 0.0))
    after = np.append(np.bincount(index, weights=np.asarray(reduced, float)), (0.0, 1.0))
    rng, count = np.random.default_rng(seed), images + 2
    draws = []
    for start in range(0, RESAMPLES, _CHUNK):
        size = min(_CHUNK, RESAMPLES - start)
        picked = rng.integers(0, count, (size, count))
        draws.append(np.stack([before[picked].sum(1), after[picked].sum(1)]))
    drawn, kept = np.concatenate(draws, axis=1)
    # A draw in which the unreduced model is always wrong says nothing about a share of it.
    losses = 1 - kept[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2])
    return Loss(
        value=1 - float(np.sum(reduced)) / whole,
        low=float(low) if gains else max(0.0, float(low)),
        high=float(high),
        level=level,
        base=whole / len(base),
        reduced=float(np.mean(reduced)),
        questions=len(base),
        images=images,
    )
