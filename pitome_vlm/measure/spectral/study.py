"""Many runs on synthetic clusters and on images, averaged, and what must hold in all of them.

Runs are made by `synthetic.py` and `features.py`, rows are shown by `report.py` and `plots.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .features import TowerChange
from .graph import SpectralChange
from .synthetic import LAYOUTS, RATIO, Clusters, Run, merge_clusters

# Sizes far apart, as the theorem wants them, one after the other; one cluster so large that sizes
# stay ordered over four steps of PiToMe; sizes near each other, where a few merges make ties.
DEFAULT_SIZES = ((32, 16, 8, 5, 3), (50, 8, 4, 2), (20, 16, 12, 9, 7))
# How many steps, and what each of them keeps. Where half is kept, every token of one side has to
# merge, and the paper's Proposition 2 expects ToMe to mix clusters on random layouts, too.
STEPS = ((1, RATIO), (4, RATIO), (1, 0.5))
# Rounding of float64 eigenvalues of a few hundred nodes, with room to spare.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """What a row is about, but for the algorithm and the noise."""

    sizes: tuple[int, ...]
    layout: str
    steps: int
    ratio: float = RATIO


@dataclass(frozen=True)
class CaseResult:
    """One algorithm on one case at one noise, over several draws."""

    case: Case
    sigma: float
    algorithm: str
    runs: tuple[Run, ...]

    @property
    def distance(self) -> float:
        """Mean SD."""
        return statistics.fmean(run.distance for run in self.runs)

    @property
    def bound(self) -> float:
        """Mean Weyl bound."""
        return statistics.fmean(run.bound for run in self.runs)

    @property
    def mixed(self) -> float:
        """Mean fraction of groups that mix labels."""
        return statistics.fmean(run.mixed for run in self.runs)

    @property
    def ordered(self) -> int:
        """Draws in which A3 held at every step."""
        return sum(run.assumptions.strictly_ordered for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; lists hold one value per draw."""
        facts = [run.assumptions for run in self.runs]
        return {
            "sizes": list(self.case.sizes),
            "layout": self.case.layout,
            "steps": self.case.steps,
            "ratio": self.case.ratio,
            "sigma": self.sigma,
            "algorithm": self.algorithm,
            "groups": self.runs[0].n_groups,
            "distance": [_short(run.distance) for run in self.runs],
            "weyl_bound": [_short(run.bound) for run in self.runs],
            "mixed": [_short(run.mixed) for run in self.runs],
            "a2_separated": [fact.separated for fact in facts],
            "a2_eq4_margin_separates": [fact.own_margin_separates for fact in facts],
            "a3_strictly_ordered": [fact.strictly_ordered for fact in facts],
            "within_cosine_min": [_short(fact.within) for fact in facts],
            "across_cosine_max": [_short(fact.across) for fact in facts],
            "largest_size_ratio": [_short(fact.largest_ratio) for fact in facts],
            "sizes_before_each_step": [[list(s) for s in fact.step_sizes] for fact in facts],
        }


def _short(value: float) -> float:
    """Six digits: enough to compare, and the file stays readable."""
    return float(f"{value:.6g}")


def cases(
    sizes: Sequence[tuple[int, ...]], steps: Sequence[tuple[int, float]] = STEPS
) -> list[Case]:
    """Every size in every layout, with every number of steps and what each of them keeps."""
    return [Case(one, layout, *step) for one in sizes for layout in LAYOUTS for step in steps]


def synthetic_study(
    chosen: Sequence[Case],
    algorithms: Sequence[str],
    sigmas: Sequence[float],
    seeds: int,
    *,
    advance: Callable[[], object] = lambda: None,
) -> list[CaseResult]:
    """Every algorithm on every case at every noise, `seeds` draws each; their seeds are 0, 1, ...

    All algorithms and layouts see the same tokens for a seed. `advance` is called after every draw.

    Raises:
        ValueError: a value out of range, or an algorithm that needs more than tokens.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    results = []
    for case in chosen:
        for sigma in sigmas:
            clusters = Clusters(case.sizes, case.layout, sigma)
            for name in algorithms:
                runs = []
                for seed in range(seeds):
                    runs.append(
                        merge_clusters(
                            clusters, name, steps=case.steps, ratio=case.ratio, seed=seed
                        )
                    )
                    advance()
                results.append(CaseResult(case, sigma, name, tuple(runs)))
    return results


@dataclass(frozen=True)
class FeatureRow:
    """One merge of one algorithm, over all images.

    Attributes:
        algorithm: its name.
        layer: 0-based tower layer; None for all merges as one partition.
        n_tokens: N.
        n_groups: n.
        distance: SD / N of every image.
        bound: ||L - L_lifted||_2 of every image, the Weyl bound of SD / N.
        shuffled: SD / N of every image where the members of the groups are drawn blindly; only
            where `layer` is None.
        kept: share of the leading eigenspace of every image's similarity graph that groups keep
            (`kept_eigenspace`); only where `layer` is None.
        kept_shuffled: the same where members are drawn blindly.
    """

    algorithm: str
    layer: int | None
    n_tokens: int
    n_groups: int
    distance: tuple[float, ...]
    bound: tuple[float, ...]
    shuffled: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()
    kept_shuffled: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; lists hold one value per image."""
        values = dict(vars(self))
        for name in ("distance", "bound", "shuffled", "kept", "kept_shuffled"):
            values[name] = [_short(value) for value in values[name]]
        values["distance_per_token"] = values.pop("distance")
        values["weyl_bound_per_token"] = values.pop("bound")
        values["distance_per_token_shuffled"] = values.pop("shuffled")
        values["eigenspace_kept"] = values.pop("kept")
        values["eigenspace_kept_shuffled"] = values.pop("kept_shuffled")
        return values


def feature_rows(changes: Sequence[dict[str, TowerChange]]) -> list[FeatureRow]:
    """Rows from one `merge_changes` per batch of images, algorithm by algorithm, in layer order."""
    rows = []
    for name, first in changes[0].items():
        towers = [change[name] for change in changes]
        for index, layer in enumerate(first.layers):
            merges = [tower.layers[index].change for tower in towers]
            rows.append(FeatureRow(name, layer.layer, *_per_token(merges)))
        composed = _per_token([tower.composed for tower in towers])
        shuffled = _per_token([tower.shuffled for tower in towers])
        kept, blind = (
            tuple(torch.cat([getattr(tower, part) for tower in towers]).tolist())
            for part in ("kept", "kept_shuffled")
        )
        rows.append(FeatureRow(name, None, *composed, shuffled[2], kept, blind))
    return rows


def _per_token(
    changes: Sequence[SpectralChange],
) -> tuple[int, int, tuple[float, ...], tuple[float, ...]]:
    n_tokens = changes[0].n_tokens
    distance, bound = (
        tuple((torch.cat([getattr(change, name) for change in changes]) / n_tokens).tolist())
        for name in ("distance", "bound")
    )
    return n_tokens, changes[0].n_groups, distance, bound


@dataclass(frozen=True)
class Checks:
    """What is proven, looked at in every measurement.

    Attributes:
        partitions: how many were measured.
        weyl_violations: in how many SD exceeded N ||L - L_lifted||_2.
        lemma1_sum: largest error of Lemma 1 with sum weights; 0 where nothing synthetic was run.
        lemma1_average: the same with the paper's average weights, which is not proven.
    """

    partitions: int
    weyl_violations: int
    lemma1_sum: float
    lemma1_average: float

    @property
    def passed(self) -> bool:
        """Whether everything that must hold did."""
        return self.weyl_violations == 0 and self.lemma1_sum < TOLERANCE


def check(results: Sequence[CaseResult], rows: Sequence[FeatureRow]) -> Checks:
    """Look for violations in everything that was measured."""
    runs = [run for result in results for run in result.runs]
    pairs: Iterator[tuple[float, float]] = (
        pair for row in rows for pair in zip(row.distance, row.bound, strict=True)
    )
    compared = [(run.distance, run.bound) for run in runs] + list(pairs)
    return Checks(
        partitions=len(compared),
        weyl_violations=sum(distance > bound + TOLERANCE for distance, bound in compared),
        lemma1_sum=max((run.lemma1_sum for run in runs), default=0.0),
        lemma1_average=max((run.lemma1_average for run in runs), default=0.0),
    )


@dataclass(frozen=True)
class Under:
    """One algorithm at one noise, in those draws in which A2 and A3 held at every step.

    Attributes:
        sigma: the noise; None for all levels together.
        algorithm: its name.
        runs: how many of all draws.
        draws: all draws.
        mixed: in how many of `runs` a group mixed labels.
        distance: largest SD among them, 0 where there are none.
    """

    sigma: float | None
    algorithm: str
    runs: int
    draws: int
    mixed: int
    distance: float


def under_assumptions(results: Sequence[CaseResult]) -> list[Under]:
    """How every algorithm did where the assumptions could be seen to hold; totals come last."""
    groups: dict[tuple[float | None, str], list[Run]] = {}
    for result in results:
        groups.setdefault((result.sigma, result.algorithm), []).extend(result.runs)
    for result in results:
        groups.setdefault((None, result.algorithm), []).extend(result.runs)
    summary = []
    for (sigma, name), runs in groups.items():
        held = [run for run in runs if run.assumptions.hold]
        mixed = sum(run.mixed > 0 for run in held)
        largest = max((run.distance for run in held), default=0.0)
        summary.append(Under(sigma, name, len(held), len(runs), mixed, largest))
    return summary
