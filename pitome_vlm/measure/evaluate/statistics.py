"""How uncertain an accuracy is, and whether two accuracies on the same questions differ.

Knows: per-question scores, which questions share a picture, and tests for pairs of scores. Does
not know: tasks, files or how scores are shown.

Questions about one picture fail together, so whatever is resampled or flipped is a picture with
all its questions. Only McNemar's test treats every question on its own, which is its definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..demo_benchmark import interval

# The bootstrap holds RESAMPLES x pictures numbers at once; beyond this many pictures the normal
# approximation is as good and needs no memory.
MOST_RESAMPLED = 5000
FLIPS = 10_000
_CHUNK = 500
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class _Sample:
    """What `interval` asks of a question: the picture it belongs to."""

    scene_id: Any


@dataclass(frozen=True)
class Paired:
    """One setting against another on the same questions.

    Attributes:
        difference: mean score minus the other's.
        low: lower end of its 95 % interval, pictures resampled.
        high: upper end.
        p: sign-flip permutation test by picture, two-sided.
        lost: questions only the other answered right; None where scores are not right or wrong.
        gained: questions only this one answered right.
        mcnemar: exact McNemar test, two-sided; None where scores are not right or wrong.
    """

    difference: float
    low: float
    high: float
    p: float
    lost: int | None
    gained: int | None
    mcnemar: float | None


def mean_interval(values: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """95 % interval of a mean over questions; `clusters` names each question's picture."""
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    if index.max(initial=0) < MOST_RESAMPLED:
        samples: Any = [_Sample(int(i)) for i in index]
        return interval(samples, values)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    mean, groups = sums.sum() / counts.sum(), len(counts)
    residuals = sums - mean * counts
    error = math.sqrt(groups / (groups - 1) * float((residuals**2).sum())) / counts.sum()
    return float(mean - _Z95 * error), float(mean + _Z95 * error)


def compare(scores: np.ndarray, other: np.ndarray, clusters: Sequence[Any]) -> Paired:
    """`scores` against `other`, question by question.

    Raises:
        ValueError: the two do not have one score for every question.
    """
    if not len(scores) == len(other) == len(clusters):
        raise ValueError(
            f"paired scores must be of the same questions, got {len(scores)}, {len(other)} scores "
            f"for {len(clusters)} questions"
        )
    differences = scores.astype(float) - other.astype(float)
    low, high = mean_interval(differences, clusters)
    lost = gained = mcnemar = None
    if is_binary(scores) and is_binary(other):
        lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
        mcnemar = mcnemar_exact(lost, gained)
    return Paired(
        float(differences.mean()),
        low,
        high,
        sign_flip(differences, clusters),
        lost,
        gained,
        mcnemar,
    )


def is_binary(scores: np.ndarray) -> bool:
    """Whether every score is right or wrong and nothing between."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: are losses and gains equally likely?"""
    n, k = lost + gained, min(lost, gained)
    # Summed as logarithms: the coefficients of thousands of questions fit no float.
    logs = [_log_choose(n, i) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def sign_flip(differences: np.ndarray, clusters: Sequence[Any], seed: int = 0) -> float:
    """Two-sided permutation test of a mean difference of zero, flipping whole pictures."""
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = np.bincount(index, weights=differences)
    sums = sums[sums != 0]
    observed, scale = abs(float(sums.sum())), math.sqrt(float((sums**2).sum()))
    if not len(sums):
        return 1.0
    if len(sums) > MOST_RESAMPLED:
        return math.erfc(observed / scale / math.sqrt(2))
    rng, extreme = np.random.default_rng(seed), 0
    for start in range(0, FLIPS, _CHUNK):
        size = min(_CHUNK, FLIPS - start)
        signs = rng.integers(0, 2, (size, len(sums)), dtype=np.int8) * 2 - 1
        # The tolerance lets sums that differ by rounding only count as equal.
        extreme += int((np.abs(signs @ sums) >= observed * (1 - 1e-12)).sum())
    return (1 + extreme) / (1 + FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
