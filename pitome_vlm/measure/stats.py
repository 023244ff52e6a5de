"""How uncertain a mean is, and whether two sets of scores on the same questions differ.

Questions about one image fail together, so an image with all its questions is what is resampled
or flipped. Only McNemar's test treats every question on its own, which is its definition.

Every interval is a bootstrap over the images and two more that do not exist, with one
question each: one with the lowest score there can be, one with the highest. Without them 40 right
answers out of 40 would claim certainty. (Agresti and Coull 1998 add as many questions to a
proportion for the same reason, Agresti and Min 2005 to a table of pairs.)
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 4000
FLIPS = 10_000
# The bootstrap holds _BATCH x images numbers at once. Beyond these many images a normal
# approximation is as good.
MOST_RESAMPLED = 5000
MOST_FLIPPED = 1000
_BATCH = 500


class Interval(NamedTuple):
    """Lower and upper end of an interval, in the unit of the values it was made from."""

    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """One setting against another on the same questions.

    Attributes:
        difference: mean score minus the other's.
        low: lower end of its 95 % interval, images resampled.
        high: upper end.
        p: sign-flip permutation test by image, two-sided.
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
        questions: number of questions.
        images: groups of questions that share an image; these are resampled.
    """

    value: float
    low: float
    high: float
    level: float
    base: float
    reduced: float
    questions: int
    images: int


def mean_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    extremes: tuple[float, float] = (0.0, 1.0),
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a mean over questions; images are resampled.

    Args:
        values: [questions] scores.
        clusters: [questions] the image that each question is about, anything hashable.
        extremes: the lowest and the highest score there can be, which the two added images have;
            (0, 100) for percentages, (-1, 1) for differences of scores (`difference_interval`).
        level: coverage, in (0, 1).
        seed: seed of the resampling.

    Returns:
        The ends, in the unit of the values.

    Raises:
        ValueError: no values, or not one cluster for every value.
    """
    index = _index(clusters, len(values))
    sums = np.append(np.bincount(index, weights=np.asarray(values, float)), extremes)
    counts = np.append(np.bincount(index), (1, 1))
    if len(counts) > MOST_RESAMPLED:
        return _normal_interval(sums, counts, level)
    return _bootstrap(_ratio, (sums, counts), level, seed)


def difference_interval(
    values: Sequence[float] | np.ndarray,
    other: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    level: float = LEVEL,
) -> Interval:
    """Paired interval of mean(values) - mean(other), scores in [0, 1]; images are resampled."""
    differences = np.asarray(values, float) - np.asarray(other, float)
    return mean_interval(differences, clusters, extremes=(-1.0, 1.0), level=level)


def simultaneous_intervals(
    values: Sequence[Sequence[float]] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    extremes: tuple[float, float] | Sequence[tuple[float, float]] = (-1.0, 1.0),
    level: float = LEVEL,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of several means that all hold together with probability `level`.

    The single-step max-t bootstrap (Westfall and Young 1993; Romano and Wolf 2005): every interval
    reaches as many standard errors to both sides, so many that in a share `level` of the draws no
    mean of the family strays further, with Student's quantile for few images. Means that move
    together are corrected less than by Bonferroni's rule.

    Args:
        values: [means, questions] scores or paired differences, NaN where a mean is not about a
            question.
        clusters: [questions] the image that each question is about.
        extremes: as for `mean_interval`, for all means or for every one.
        level: coverage of the whole family, in (0, 1).
        seed: seed of the resampling.

    Returns:
        One interval per mean, in order.

    Raises:
        ValueError: a mean without questions, or not one cluster for every question.
    """
    table = np.asarray(values, float)
    if not len(table):
        return []
    index, known = _index(clusters, table.shape[1]), ~np.isnan(table)
    if not known.any(1).all():
        raise ValueError(f"mean {int((~known.any(1)).argmax())} of the family is of no question")
    images = int(index.max()) + 1
    weights = np.zeros((len(index), images))
    weights[np.arange(len(index)), index] = 1
    added = np.broadcast_to(np.asarray(extremes, float), (len(table), 2))
    sums = np.hstack([np.where(known, table, 0.0) @ weights, added])
    counts = np.hstack([known @ weights, np.ones_like(added)])
    means = sums.sum(1) / counts.sum(1)
    strayed = _resampled_means(sums, counts, seed) - means
    groups = sums.shape[1]
    errors = np.sqrt(np.nanmean(strayed**2, axis=0) * groups / (groups - 1))
    # A mean that no draw moves is known and constrains nothing.
    far = np.divide(np.abs(strayed), errors, out=np.zeros_like(strayed), where=errors > 0)
    most = float(np.nanquantile(np.nanmax(far, axis=1), level))
    # The errors are estimates themselves: Student's quantile in place of the normal one.
    reach = float(stats.t.isf(stats.norm.sf(most), groups - 1)) * errors
    return [Interval(float(m - r), float(m + r)) for m, r in zip(means, reach, strict=True)]


def relative_loss(
    base: Sequence[float],
    reduced: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    level: float = LEVEL,
    gains: bool = True,
) -> Loss:
    """Relative loss of the mean score with a paired bootstrap interval over images.

    Of the two added images one loses a question and one gains a question, which does not move
    the middle of the interval.

    Args:
        base: [questions] scores of the unreduced model, 0 to 1.
        reduced: [questions] scores of the reduced one.
        clusters: [questions] the image that each question is about.
        level: coverage, in (0, 1).
        gains: whether reduction can gain at all; agreement with the unreduced model cannot.

    Raises:
        ValueError: nothing the unreduced model answered is right, so that there is no loss.
    """
    whole = float(np.sum(base))
    if whole <= 0:
        raise ValueError("the unreduced model answers no question right; a loss is not defined")
    index = _index(clusters, len(base))
    before = np.append(np.bincount(index, weights=np.asarray(base, float)), (1.0, 0.0))
    after = np.append(np.bincount(index, weights=np.asarray(reduced, float)), (0.0, 1.0))
    low, high = _bootstrap(_lost_share, (before, after), level)
    return Loss(
        value=1 - float(np.sum(reduced)) / whole,
        low=low if gains else max(0.0, low),
        high=high,
        level=level,
        base=whole / len(base),
        reduced=float(np.mean(reduced)),
        questions=len(base),
        images=int(index.max()) + 1,
    )


def compare(
    scores: Sequence[float] | np.ndarray,
    other: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
) -> Paired:
    """`scores` against `other`, question by question.

    Args:
        scores: [questions] in [0, 1].
        other: [questions] in [0, 1], of the same questions.
        clusters: [questions] the image that each question is about.

    Raises:
        ValueError: the two do not have one score for every question.
    """
    own, base = np.asarray(scores, float), np.asarray(other, float)
    if not len(own) == len(base) == len(clusters):
        raise ValueError(
            f"paired scores must be of the same questions, got {len(own)}, {len(base)} scores "
            f"for {len(clusters)} questions"
        )
    differences = own - base
    low, high = difference_interval(own, base, clusters)
    lost = gained = mcnemar = None
    if is_binary(own) and is_binary(base):
        lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
        mcnemar = mcnemar_exact(lost, gained)
    p = sign_flip(differences, clusters)
    return Paired(float(differences.mean()), low, high, p, lost, gained, mcnemar)


def is_binary(scores: np.ndarray) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: are losses and gains equally likely?"""
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def sign_flip(differences: Sequence[float] | np.ndarray, clusters: Sequence[Hashable]) -> float:
    """Two-sided permutation test of a mean difference of zero, flipping whole images.

    Exact where there are at most log2(`FLIPS`) images that differ, drawn `FLIPS` times up to
    `MOST_FLIPPED`, a normal approximation beyond.
    """
    sums = np.bincount(_index(clusters, len(differences)), weights=np.asarray(differences, float))
    sums = sums[sums != 0]
    if len(sums) < 2:
        # A single image that differs has the same size whichever way it is flipped.
        return 1.0
    if len(sums) > MOST_FLIPPED:
        spread = math.sqrt(float((sums**2).sum()))
        return math.erfc(abs(float(sums.sum())) / spread / math.sqrt(2))
    result = stats.permutation_test(
        (sums,),
        _absolute_sum,
        permutation_type="samples",
        alternative="greater",
        n_resamples=FLIPS,
        batch=_BATCH,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def iqr(values: Sequence[float]) -> float:
    """Interquartile range, 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4)
    return third - first


def _index(clusters: Sequence[Hashable], count: int) -> np.ndarray:
    """[questions] number of every question's image."""
    if not count or len(clusters) != count:
        raise ValueError(
            f"there must be one image for every value and at least one, got {len(clusters)} for "
            f"{count} values"
        )
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])


def _bootstrap(
    statistic: Callable[..., Any], data: tuple[np.ndarray, np.ndarray], level: float, seed: int = 0
) -> Interval:
    with warnings.catch_warnings():
        # Draws without a value (nothing right to lose) are left out below; SciPy warns of them.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            data,
            statistic,
            n_resamples=RESAMPLES,
            batch=_BATCH,
            vectorized=True,
            paired=True,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    ends = np.nanquantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(ends[0]), float(ends[1]))


def _resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """[RESAMPLES, means] of draws of images; NaN where a draw has no question of a mean."""
    images, rng = sums.shape[1], np.random.default_rng(seed)
    parts = []
    for _ in range(0, RESAMPLES, _BATCH):
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=_BATCH).astype(float)
        asked = drawn @ counts.T
        parts.append(np.divide(drawn @ sums.T, asked, where=asked > 0, out=asked * np.nan))
    return np.concatenate(parts)


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> Any:
    return sums.sum(axis) / counts.sum(axis)


def _lost_share(before: np.ndarray, after: np.ndarray, axis: int = -1) -> Any:
    whole = before.sum(axis)
    return np.where(whole > 0, 1 - after.sum(axis) / np.where(whole > 0, whole, 1), np.nan)


def _absolute_sum(values: np.ndarray, axis: int = -1) -> Any:
    return np.abs(values.sum(axis))


def _normal_interval(sums: np.ndarray, counts: np.ndarray, level: float) -> Interval:
    """Of a ratio of sums, by the delta method."""
    mean, groups = sums.sum() / counts.sum(), len(counts)
    residuals = sums - mean * counts
    error = math.sqrt(groups / (groups - 1) * float((residuals**2).sum())) / counts.sum()
    reach = float(stats.norm.ppf((1 + level) / 2)) * error
    return Interval(float(mean - reach), float(mean + reach))
