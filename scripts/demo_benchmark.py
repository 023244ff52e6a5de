"""Measure the bundled model over methods and budgets and write table, plot and raw answers.

    python scripts/demo_benchmark.py --output eval/results/demo

Writes results.json (every answer, full configuration, hardware, versions), report.md and
accuracy.png. `--split val` is for choosing options; the committed table is the test split.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.demo import checkpoint_path
from pitome_vlm.demo.benchmark import Outcome, Setting, accuracy_by, interval, provenance, run

BUDGETS = (108, 72, 36, 18, 9)
RANDOM_SEEDS = (0, 1, 2)
BASELINE = "none"


@dataclass
class Row:
    """Outcomes that share a line of the table: one, or the seeds of a random method."""

    name: str
    tokens: int
    outcomes: list[Outcome]

    @property
    def correct(self) -> np.ndarray:
        """[questions] share of the seeds that answered right."""
        return np.mean([outcome.correct for outcome in self.outcomes], axis=0)


def methods(tokens: int) -> list[Setting]:
    """Everything compared at one budget."""
    settings = [
        Setting("PiToMe", MergeConfig(tokens=tokens)),
        Setting("PiToMe (released code)", MergeConfig.preset("released", tokens=tokens)),
        Setting("PiToMe at the projector", MergeConfig(tokens=tokens, stage="projector")),
        Setting("ToMe", MergeConfig(tokens=tokens, algorithm="tome")),
        Setting("pool", MergeConfig(tokens=tokens, algorithm="pool")),
    ]
    for seed in RANDOM_SEEDS:
        config = MergeConfig(tokens=tokens, algorithm="random", seed=seed)
        settings.append(Setting("random", config))
    return settings


def rows_of(outcomes: list[Outcome]) -> list[Row]:
    """One row per method and budget, in the order measured."""
    rows: dict[tuple[str, int], Row] = {}
    for outcome in outcomes:
        key = (outcome.setting.name, outcome.tokens)
        rows.setdefault(key, Row(*key, [])).outcomes.append(outcome)
    return list(rows.values())


def table(samples: list[Any], rows: list[Row]) -> list[str]:
    """Markdown lines: accuracy and the paired difference to no merging."""
    base = next(row for row in rows if row.name == BASELINE)
    lines = [
        "| visual tokens | method | accuracy % | 95 % interval | minus none | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = interval(samples, row.correct)
        cells = [f"{row.tokens}", row.name, f"{100 * row.correct.mean():.1f}"]
        cells.append(f"{100 * low:.1f} to {100 * high:.1f}")
        if row is base:
            cells += ["", ""]
        else:
            paired = row.correct - base.correct
            low, high = interval(samples, paired)
            cells.append(f"{100 * paired.mean():+.1f}")
            cells.append(f"{100 * low:+.1f} to {100 * high:+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def breakdown(samples: list[Any], rows: list[Row], attribute: str, title: str) -> list[str]:
    """Markdown lines: accuracy by question type or kind of scene."""
    names = sorted({getattr(sample, attribute) for sample in samples})
    lines = [
        f"## By {title}",
        "",
        "| visual tokens | method | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for row in rows:
        parts = accuracy_by(samples, row.correct, attribute)
        cells = [str(row.tokens), row.name, *(f"{parts[name]:.1f}" for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def report(samples: list[Any], rows: list[Row], facts: dict[str, Any]) -> str:
    """The whole report.md."""
    shown = ", ".join(f"{key} {value}" for key, value in facts.items())
    head = [
        "# Demo benchmark",
        "",
        f"The bundled model on {facts['questions']} {facts['split']} questions, greedy, exact "
        "match. Intervals resample whole pictures (4,000 bootstrap draws); differences are "
        "paired by question. `random` is the mean of seeds "
        + ", ".join(map(str, RANDOM_SEEDS))
        + ". PiToMe and ToMe merge in the vision tower; pool and random act on the features the "
        "projector reads, where their authors put them. No method was tuned on these questions.",
        "",
        "![accuracy against visual tokens](accuracy.png)",
        "",
    ]
    parts = breakdown(samples, rows, "question_type", "question type")
    parts += breakdown(samples, rows, "kind", "kind of scene")
    command = "Regenerate with `make bench-demo`."
    return "\n".join(
        [*head, *table(samples, rows), "", *parts, f"Measured on: {shown}.", "", command, ""]
    )


def plot(samples: list[Any], rows: list[Row], path: Path) -> None:
    """Accuracy against tokens, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), dpi=150)
    base = next(row for row in rows if row.name == BASELINE)
    names = [name for name in dict.fromkeys(row.name for row in rows) if name != BASELINE]
    for index, name in enumerate(names):
        line = [row for row in rows if row.name == name]
        # A small shift keeps the intervals of neighbouring methods apart.
        x = np.array([row.tokens for row in line]) * (1 + 0.03 * (index - len(names) / 2))
        y = np.array([100 * row.correct.mean() for row in line])
        ends = 100 * np.array([interval(samples, row.correct) for row in line])
        axes.errorbar(
            x, y, yerr=[y - ends[:, 0], ends[:, 1] - y], marker="o", ms=4, capsize=2, label=name
        )
    level = 100 * base.correct.mean()
    axes.axhline(level, color="0.4", ls="--", lw=1)
    axes.annotate(f"no merging, {base.tokens} tokens: {level:.1f} %", (9, level), va="bottom")
    axes.set_xscale("log")
    axes.set_xticks(BUDGETS, [str(count) for count in BUDGETS])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens per image (log scale)")
    axes.set_ylabel("accuracy %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def raw(samples: list[Any], outcomes: list[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, for anyone who wants to count again."""
    return {
        "provenance": facts,
        "samples": [vars(sample) for sample in samples],
        "outcomes": [
            {
                "method": outcome.setting.name,
                "tokens": outcome.tokens,
                "accuracy": round(outcome.accuracy, 3),
                "config": outcome.setting.config.to_dict(),
                "answers": outcome.answers,
            }
            for outcome in outcomes
        ],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--limit", type=int, help="first questions only, for a quick look")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--model", type=Path, default=None, help="another checkpoint folder")
    arguments = parser.parse_args()
    model, processor = pitome_vlm.load(arguments.model or checkpoint_path(), dtype="float32")
    settings = [Setting(BASELINE, MergeConfig(keep=1.0, algorithm="none"))]
    settings += [setting for tokens in BUDGETS for setting in methods(tokens)]
    start = time.time()
    with tqdm(unit="answer", smoothing=0) as bar:
        samples, outcomes = run(
            model,
            processor,
            settings,
            split=arguments.split,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            advance=bar.update,
        )
    facts = provenance(
        model, split=arguments.split, questions=len(samples), batch_size=arguments.batch_size
    )
    facts["minutes"] = round((time.time() - start) / 60, 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = rows_of(outcomes)
    text = json.dumps(raw(samples, outcomes, facts), separators=(",", ":"))
    (arguments.output / "results.json").write_text(text + "\n")
    (arguments.output / "report.md").write_text(report(samples, rows, facts))
    plot(samples, rows, arguments.output / "accuracy.png")
    print("\n".join(table(samples, rows)))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
