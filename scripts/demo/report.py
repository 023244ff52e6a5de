"""How the demo benchmark is written down: Markdown tables, a plot, raw JSON.

Renders outcomes and intervals; measuring is in `benchmark.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pitome_vlm import MergeConfig, algorithms
from pitome_vlm.common import markdown_table
from pitome_vlm.demo import Sample
from pitome_vlm.measure.demo_benchmark import (
    Outcome,
    Setting,
    accuracy_by,
    accuracy_interval,
    difference_intervals,
    family_words,
)
from pitome_vlm.measure.stats import Interval

from .stored import CHANGES
from .times import time_table
from .where_not import where_not

BASELINE = "none"
RESIZE = "resize (smaller image)"
BUDGETS = (72, 36, 18, 9)
RECOMMENDED = "pitome_plus (default)"
# Baselines as named by their authors and in the registry.
BASELINES = {
    "ToMe": "tome",
    "ToFu": "tofu",
    "DiffRate": "diffrate",
    "VisionZip": "visionzip",
    "VisPruner": "vispruner",
    "HoloV": "holov",
    "SCOPE": "scope",
    "DivPrune": "divprune",
    "pool": "pool",
}
# What every baseline is given too, so that algorithms are compared and not calibrations.
CALIBRATED: dict[str, Any] = {"size_bias": True, "positions": "mean"}
RANDOM_SEEDS = (0, 1, 2)
PAPER = "PiToMe (paper)"
# They pick tokens where the others merge them.
SELECTORS = ("VisionZip", "VisPruner", "HoloV", "SCOPE", "DivPrune")
TIMED = (RECOMMENDED, "ToMe", *SELECTORS, PAPER)


@dataclass
class Row:
    """Outcomes that share a line of the table: one, or the seeds of a random method.

    `tokens` is the budget; a smaller image may have a few tokens more.
    """

    name: str
    tokens: int
    outcomes: list[Outcome]

    @property
    def shown_tokens(self) -> str:
        """The budget, and what it became if that differs."""
        seen = self.outcomes[0].tokens
        return f"{self.tokens}" if seen == self.tokens else f"{self.tokens} ({seen})"

    @property
    def correct(self) -> np.ndarray:
        """[questions] share of the seeds that answered right."""
        return np.mean([outcome.correct for outcome in self.outcomes], axis=0)


def rows_of(outcomes: list[Outcome]) -> list[Row]:
    """One row per method and budget, in the order measured."""
    rows: dict[tuple[str, int], Row] = {}
    for outcome in outcomes:
        key = (outcome.setting.name, outcome.setting.budget or outcome.tokens)
        rows.setdefault(key, Row(*key, [])).outcomes.append(outcome)
    return list(rows.values())


def budgets_of(rows: list[Row]) -> list[int]:
    """Token counts that were measured, falling."""
    return sorted({row.tokens for row in rows if row.name == RECOMMENDED}, reverse=True)


def table(samples: list[Any], rows: list[Row]) -> str:
    """Accuracy and the paired difference to no merging, in Markdown."""
    base = next(row for row in rows if row.name == BASELINE)
    columns = ["visual tokens", "method", "accuracy %", "95 % interval", "minus none"]
    paired = [row.correct - base.correct for row in rows if row is not base]
    ends = iter(difference_intervals(samples, paired))
    lines = []
    for row in rows:
        low, high = accuracy_interval(samples, row.correct)
        cells = [row.shown_tokens, row.name, f"{100 * row.correct.mean():.1f}"]
        cells.append(f"{low:.1f} to {high:.1f}")
        if row is base:
            cells += ["", ""]
        else:
            low, high = next(ends)
            cells.append(f"{100 * (row.correct - base.correct).mean():+.1f}")
            cells.append(f"{low:+.1f} to {high:+.1f}")
        lines.append(cells)
    shown = markdown_table([*columns, "95 % interval"], lines)
    return "\n".join([shown, "", f"{family_words(len(paired))} Those of accuracies are single."])


def against_recommended(samples: list[Any], rows: list[Row]) -> list[str]:
    """The default minus every other method, paired, at every budget."""
    found = {(row.name, row.tokens): row.correct for row in rows}
    names = [name for name in dict.fromkeys(row.name for row in rows) if name != BASELINE]
    names.remove(RECOMMENDED)
    budgets = budgets_of(rows)
    pairs = {
        (name, tokens): found[RECOMMENDED, tokens] - found[name, tokens]
        for name in names
        for tokens in budgets
    }
    ends = dict(zip(pairs, difference_intervals(samples, list(pairs.values())), strict=True))
    lines = []
    for name in names:
        cells = [name]
        for tokens in budgets:
            low, high = ends[name, tokens]
            sign = "" if low > 0 else " (not shown)" if high >= 0 else " (worse)"
            mean = 100 * pairs[name, tokens].mean()
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{sign}")
        lines.append(cells)
    note = f'Points. {family_words(len(pairs))} "not shown": the interval reaches 0.'
    shown = markdown_table(["method", *(f"{tokens} tokens" for tokens in budgets)], lines)
    return [f"## {RECOMMENDED} minus the others", "", shown, "", note, ""]


def kept_shares(samples: list[Any], rows: list[Row]) -> dict[int, tuple[float, Interval]]:
    """How many percent of the unreduced accuracy the default keeps, by tokens.

    The intervals hold together for all budgets.
    """
    base = next(row for row in rows if row.name == BASELINE).correct
    ours = [row for row in rows if row.name == RECOMMENDED]
    ends = difference_intervals(samples, [row.correct - base for row in ours])
    return {
        row.tokens: (
            100 * row.correct.mean() / base.mean(),
            Interval(100 + low / base.mean(), 100 + high / base.mean()),
        )
        for row, (low, high) in zip(ours, ends, strict=True)
    }


def kept_share(samples: list[Any], rows: list[Row]) -> list[str]:
    """The section on `kept_shares`."""
    columns = ["visual tokens", "share of the unreduced accuracy", "95 % interval"]
    kept = kept_shares(samples, rows)
    lines = [
        [str(tokens), f"{whole:.1f} %", f"{ends.low:.1f} to {ends.high:.1f} %"]
        for tokens, (whole, ends) in kept.items()
    ]
    shown = markdown_table(columns, lines)
    return ["## What the default keeps", "", shown, "", family_words(len(kept)), ""]


def breakdown(samples: list[Any], rows: list[Row], attribute: str, title: str) -> list[str]:
    """Accuracy by question type or kind of scene."""
    names = sorted({getattr(sample, attribute) for sample in samples})
    lines = []
    for row in rows:
        parts = accuracy_by(samples, row.correct, attribute)
        lines.append([str(row.tokens), row.name, *(f"{parts[name]:.1f}" for name in names)])
    shown = markdown_table(["visual tokens", "method", *names], lines)
    return [f"## By {title}", "", shown, ""]


def hard_questions(rows: list[Row]) -> list[str]:
    """Accuracy on the questions that a smaller image of the same tokens gets wrong (VTC-Bench)."""
    found = {(row.name, row.tokens): row.correct for row in rows}
    budgets = budgets_of(rows)
    if any((RESIZE, tokens) not in found for tokens in budgets):
        return []
    unreduced = next(row for row in rows if row.name == BASELINE).correct
    # What the unreduced model gets wrong, too, says nothing about a method.
    hard = {t: (found[RESIZE, t] == 0) & (unreduced == 1) for t in budgets}
    names = dict.fromkeys(row.name for row in rows)
    lines = [
        [name, *(f"{100 * found[name, t][hard[t]].mean():.1f}" for t in budgets)]
        for name in names
        if name not in (BASELINE, RESIZE)
    ]
    columns = [f"{t} tokens ({hard[t].sum()} questions)" for t in budgets]
    note = (
        "Percent right among the questions that the unreduced model answers right and an image "
        "scaled down to the same number of tokens gets wrong: those that need the detail."
    )
    return ["## Hard questions only", "", markdown_table(["method", *columns], lines), "", note, ""]


def cost_table(costs: list[dict[str, Any]], dtype: str) -> list[str]:
    """What `cost_rows` found."""
    base = costs[0]
    columns = ["visual tokens", "FLOPs to the first token", f"KV cache per image ({dtype})"]
    lines = []
    for row in costs:
        flops = row["prefill_flops"] / base["prefill_flops"]
        lines.append(
            [
                str(row["tokens"]),
                f"{row['prefill_flops'] / 1e6:.0f} M ({100 * flops:.0f} %)",
                f"{row['kv_bytes_per_image'] / 1024:.0f} KiB",
            ]
        )
    return ["## Costs (default)", "", markdown_table(columns, lines), ""]


def report(
    samples: list[Any],
    rows: list[Row],
    costs: list[dict[str, Any]],
    facts: dict[str, Any],
    *,
    times: Sequence[dict[str, Any]] = (),
    later: Sequence[str] = (),
) -> str:
    """The whole report.md; `times` of `time_rows`, `later` says which rows other runs measured."""
    hidden = ("model", "command", "checkpoint")
    shown = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in hidden)
    title = f": {facts['model'].lower()}" if "model" in facts else ""
    head = [
        f"# Demo benchmark{title}",
        "",
        f"{facts.get('model', 'The bundled model')} on {facts['questions']} {facts['split']} "
        "questions, greedy, exact match. Intervals resample whole images (4,000 bootstrap "
        "draws); differences are paired by question. `random` is the mean of seeds "
        + ", ".join(map(str, RANDOM_SEEDS))
        + ". Every method acts where its authors put it: most merge in the vision tower, DivPrune, "
        "pool and random act on the features the projector reads. All but the two rows PiToMe "
        "(paper) and (released code) have the same calibration: log-size bias and mean positions "
        "in the language model. Options were chosen on val, none on these questions.",
        "",
        "![accuracy against visual tokens](accuracy.png)",
        "",
    ]
    base = next(row for row in rows if row.name == BASELINE)
    merged = {row.tokens: row.correct for row in rows if row.name == RECOMMENDED}
    parts = kept_share(samples, rows) + where_not(samples, base.correct, merged)
    parts += against_recommended(samples, rows) + hard_questions(rows)
    parts += cost_table(costs, facts["dtype"])
    parts += time_table(times, (BASELINE, base.tokens))
    parts += breakdown(samples, rows, "question_type", "question type")
    parts += breakdown(samples, rows, "kind", "kind of scene")
    command = facts.get("command", "Regenerate with `make bench-demo`.")
    foot = [f"Measured on: {shown}.", *later, command]
    return "\n".join([*head, table(samples, rows), "", *parts, "\n\n".join(foot), ""])


def plot(samples: list[Any], rows: list[Row], path: Path) -> None:
    """Accuracy against tokens, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5.4), dpi=150)
    base = next(row for row in rows if row.name == BASELINE)
    names = [name for name in dict.fromkeys(row.name for row in rows) if name != BASELINE]
    for index, name in enumerate(names):
        line = [row for row in rows if row.name == name]
        # A small shift keeps the intervals of neighbouring methods apart.
        x = np.array([row.tokens for row in line]) * (1 + 0.015 * (index - len(names) / 2))
        y = np.array([100 * row.correct.mean() for row in line])
        ends = np.array([accuracy_interval(samples, row.correct) for row in line])
        axes.errorbar(
            x,
            y,
            yerr=[y - ends[:, 0], ends[:, 1] - y],
            marker="osD^v"[index // 10],
            color=f"C{index % 10}",
            ls="-" if name == RECOMMENDED else ":" if "(" in name else "--",
            lw=2.2 if name == RECOMMENDED else 1.1,
            ms=4,
            capsize=2,
            label=name,
        )
    level = 100 * base.correct.mean()
    axes.axhline(level, color="0.4", ls="--", lw=1)
    axes.annotate(
        f"no merging, {base.tokens} tokens: {level:.1f} %",
        (budgets_of(rows)[-1], level),
        va="bottom",
    )
    axes.set_ylim(top=min(103.0, level + 5))
    axes.set_xscale("log")
    axes.set_xticks(budgets_of(rows), [str(count) for count in budgets_of(rows)])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens per image (log scale)")
    axes.set_ylabel("accuracy %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def raw(
    samples: list[Any],
    outcomes: list[dict[str, Any]],
    costs: dict[str, Any],
    runs: dict[str, Any],
) -> dict[str, Any]:
    """Everything measured, for anyone who wants to count again.

    `costs` are "costs" and "times", runs as `with_run` gives them.
    """
    return {
        **runs,
        **costs,
        "samples": [vars(sample) for sample in samples],
        "outcomes": outcomes,
    }


def setting_values(setting: Setting) -> dict[str, Any]:
    """What a row of results.json says about its method."""
    config = setting.config.to_dict()
    return {"method": setting.name, "config": config, "resize": setting.resize}


def outcome_values(outcome: Outcome) -> dict[str, Any]:
    """A row of results.json."""
    return {
        **setting_values(outcome.setting),
        "changes": len(CHANGES),
        "tokens": outcome.tokens,
        "accuracy": round(outcome.accuracy, 3),
        "answers": outcome.answers,
    }


def from_raw(results: dict[str, Any]) -> tuple[list[Sample], list[Row]]:
    """Samples and rows from a results.json, so that tables can be written again without a run."""
    samples = [Sample(**values) for values in results["samples"]]
    truth = np.array([sample.answer for sample in samples])
    outcomes = []
    for one in results["outcomes"]:
        if one["config"]["algorithm"] not in algorithms.available():
            continue  # measured with an algorithm that the package no longer has
        config = MergeConfig.from_dict(one["config"])
        setting = Setting(one["method"], config, one.get("resize"))
        correct = np.array(one["answers"]) == truth
        outcomes.append(Outcome(setting, one["tokens"], one["answers"], correct))
    return samples, rows_of(outcomes)
