"""The words and tables of a spectral verification, as Markdown.

Says what was measured and which of the paper's statements are true.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...common import markdown_table
from .study import TOLERANCE, Case, CaseResult, Checks, FeatureRow, Under

# Claims of PiToMe's paper (arXiv 2405.16148, section 3.3 and appendix) against what was found.
TRUTHS = (
    "Proven, and checked in every measurement: SD <= N ||L - L_lifted||_2 (Weyl's inequality).",
    "Lemma 1 (the lifted spectrum is the coarse one and N - n ones) is true with sum weights only. "
    "With the average weights the paper defines it is false unless all groups are of one size. SD "
    "is not affected: it uses the lifted graph.",
    "Theorem 1's contrast between PiToMe and ToMe shows only for striped layouts (a large cluster "
    "on one parity) and sizes that stay well apart, or where half of the tokens go at once "
    "(Proposition 2). On random layouts with a quarter to go ToMe is as good.",
    '"PiToMe is always closer in spectrum than ToMe" is false: once the sizes of clusters tie, '
    "which merging itself brings about, PiToMe merges across clusters, because it merges all k "
    "pairs however unlike they are.",
    "Real features have no true clusters, so the theorem says nothing about them. SD hardly tells "
    "good groups from blind ones there; the share of the leading eigenspace that groups keep does. "
    "Neither is an accuracy.",
)
WHOLE = "all, first graph"
ABOUT_SYNTHETIC = (
    "Tokens are orthogonal unit centres and noise of root mean square length sigma; every step "
    "keeps the share of them that is shown. SD is ||lambda - lambda_lifted||_1 of the normalised "
    "Laplacians of W = 1 - cos in float64, against the graph before the first step. `random` keeps "
    "random tokens and books every other one on its most similar survivor."
)
ABOUT_FEATURES = (
    "SD / N ≤ its Weyl bound ||L - L_lifted||_2: means over images, on what each "
    "merge compared. From the second layer on every algorithm sees the tokens its own merges left, "
    "so layers compare within a column; the last rows compare across: all merges as one partition "
    "of the patches, on the graph of the first merging layer's keys, which is the same for all. "
    "`blind` has groups of the same sizes with members drawn at random. `eigenspace`: of the eight "
    "leading eigenvectors of the graph of cosines, the share that is constant within groups (1 is "
    "all; blind groups keep about n / N)."
)


def number(value: float) -> str:
    """Three decimals, or the exponent where they would show nothing."""
    return f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.0e}"


def sizes_text(sizes: Iterable[int]) -> str:
    """For instance 32/16/8/5/3."""
    return "/".join(map(str, sizes))


def steps_text(case: Case) -> str:
    """For instance "4 x 75%"."""
    return f"{case.steps} x {case.ratio:.0%}"


def check_lines(checks: Checks) -> list[str]:
    """The outcome of what must hold, one statement a line."""
    weyl = f"held in all {checks.partitions} partitions"
    if checks.weyl_violations:
        weyl = f"FAILED in {checks.weyl_violations} of {checks.partitions} partitions"
    lines = [f"Weyl bound: {weyl}"]
    if checks.lemma1_average or checks.lemma1_sum:
        verdict = "holds" if checks.lemma1_sum < TOLERANCE else "FAILED"
        lines += [
            f"Lemma 1 with sum weights: {verdict}, largest error {checks.lemma1_sum:.0e}",
            f"Lemma 1 with the paper's average weights: off by up to {checks.lemma1_average:.2f}",
        ]
    return lines


def headline(checks: Checks) -> str:
    """The outcome in one line, to be read before everything else."""
    if checks.passed:
        return "Passed: everything that is proven held in every measurement."
    return "FAILED: something that is proven did not hold; see the statements."


def under_line(one: Under) -> str:
    """What an algorithm did where A2 and A3 held."""
    return (
        f"{one.algorithm}: A2 and A3 held at every step in {one.runs} of {one.draws} draws; "
        f"labels were mixed in {one.mixed} of these, largest SD {number(one.distance)}"
    )


def under_table(summary: Sequence[Under]) -> str:
    """The same for every noise."""
    rows = [
        [
            "all" if one.sigma is None else f"{one.sigma:g}",
            one.algorithm,
            f"{one.runs} of {one.draws}",
            str(one.mixed),
            number(one.distance),
        ]
        for one in summary
    ]
    return markdown_table(
        ["sigma", "algorithm", "draws", "of these mixed labels", "largest SD"], rows
    )


def by_case(results: Sequence[CaseResult]) -> dict[Case, dict[float, dict[str, CaseResult]]]:
    """Results by case, noise and algorithm, in the order they came."""
    found: dict[Case, dict[float, dict[str, CaseResult]]] = {}
    for result in results:
        found.setdefault(result.case, {}).setdefault(result.sigma, {})[result.algorithm] = result
    return found


def distance_table(results: Sequence[CaseResult]) -> str:
    """SD by noise; at the smallest noise also bounds, mixed groups and the assumptions."""
    sigmas = sorted({result.sigma for result in results}, reverse=True)
    least = sigmas[-1]
    rows = []
    for case, noise in by_case(results).items():
        for name, last in noise[least].items():
            ratio = max(run.assumptions.largest_ratio for run in last.runs)
            rows.append(
                [
                    sizes_text(case.sizes),
                    case.layout,
                    steps_text(case),
                    name,
                    *(number(noise[sigma][name].distance) for sigma in sigmas),
                    number(last.bound),
                    f"{last.mixed:.1%}",
                    f"{last.ordered} of {len(last.runs)}",
                    f"{ratio:.2f}",
                ]
            )
    head = ["sizes", "layout", "steps", "algorithm", *(f"SD, sigma {s:g}" for s in sigmas)]
    head += ["Weyl bound", "groups mixed", "A3 held", "largest size ratio"]
    return markdown_table(head, rows)


def margin_table(results: Sequence[CaseResult]) -> str:
    """A1 and A2: cosines within and across, for every size and noise."""
    rows: dict[tuple[tuple[int, ...], float], list[str]] = {}
    for result in results:
        key = (result.case.sizes, result.sigma)
        if key in rows:
            continue  # layouts, steps and algorithms see the same tokens
        facts = [run.assumptions for run in result.runs]
        first_margin = [fact.across < fact.margins[0] <= fact.within for fact in facts]
        rows[key] = [
            sizes_text(result.case.sizes),
            f"{result.sigma:g}",
            f"{min(fact.within for fact in facts):.3f}",
            f"{max(fact.across for fact in facts):.3f}",
            f"{sum(fact.separated for fact in facts)} of {len(facts)}",
            f"{sum(first_margin)} of {len(facts)}",
        ]
    head = ["sizes", "sigma", "smallest cos within", "largest cos across"]
    return markdown_table(
        [*head, "A2: a margin separates", "eq. 4's first margin does"], rows.values()
    )


def layer_name(row: FeatureRow) -> str:
    """The first column of a feature table."""
    return WHOLE if row.layer is None else str(row.layer)


def feature_lines(rows: Sequence[FeatureRow]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the feature table: a row per layer, a column per algorithm."""
    names = list(dict.fromkeys(row.algorithm for row in rows))
    found: dict[tuple[int | None, int, int], dict[str, FeatureRow]] = {}
    for row in rows:
        found.setdefault((row.layer, row.n_tokens, row.n_groups), {})[row.algorithm] = row
    # Algorithms that reduce once have a layer of their own; the whole comes last.
    order = sorted(found, key=lambda key: (key[0] is None, key[0] or 0))
    lines = []
    for key in order:
        cells = found[key]
        first = next(iter(cells.values()))
        tokens = f"{first.n_tokens} -> {first.n_groups}"
        shown = [_pair(cells[name]) if name in cells else "" for name in names]
        lines.append([layer_name(first), tokens, *shown])
        if first.shuffled:
            blind = [number4(statistics.fmean(cells[name].shuffled)) for name in names]
            lines.append(["all, blind", tokens, *blind])
            for title, part in (("eigenspace", "kept"), ("eigenspace, blind", "kept_shuffled")):
                kept = [f"{statistics.fmean(getattr(cells[name], part)):.2f}" for name in names]
                lines.append([title, tokens, *kept])
    return ["layer", "tokens", *names], lines


def number4(value: float) -> str:
    """SD / N is small: four decimals."""
    return f"{value:.4f}"


def _pair(row: FeatureRow) -> str:
    return f"{number4(statistics.fmean(row.distance))} ≤ {statistics.fmean(row.bound):.3f}"


def markdown(
    results: Sequence[CaseResult],
    rows: Sequence[FeatureRow],
    *,
    checks: Checks,
    summary: Sequence[Under],
    facts: Mapping[str, Any],
    plot: str | None,
) -> str:
    """The whole report; `results` and `rows` may be empty, `plot` is a file in the same folder."""
    parts = ["# Spectral verification", _bullets(TRUTHS)]
    parts += ["## What must hold", _bullets(check_lines(checks))]
    if plot:
        parts.append(f"![spectral distance by noise and by layer]({plot})")
    if results:
        parts += ["## Synthetic clusters", ABOUT_SYNTHETIC, distance_table(results)]
        parts.append(
            "Weyl bound, mixed groups and A3 at the smallest sigma. A3: the clusters' sizes were "
            "strictly ordered before every step; largest size ratio: N_j / N_i of a cluster and a "
            "larger one over all steps and draws, 1 is a tie. Every draw: results.json."
        )
        parts += ["### Draws in which A2 and A3 held at every step", under_table(summary)]
        parts += ["### Cosines (A1, A2)", margin_table(results)]
    if rows:
        head, lines = feature_lines(rows)
        parts += ["## Real features", ABOUT_FEATURES, markdown_table(head, lines)]
    parts += ["## Measured with", _bullets(f"{name}: {value}" for name, value in facts.items())]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
