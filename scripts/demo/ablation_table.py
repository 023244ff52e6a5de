"""The page that the ablation writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.demo import load_split
from pitome_vlm.measure.demo_benchmark import difference_intervals, family_words

from .ablation_rows import BUDGETS, ROWS, complete_rows
from .stored import later_words

# The budget whose FLOPs are printed.
COST_AT = 36
# Questions whose answer is a place, or needs one.
PLACES = ("where", "relation")
TOLD = (
    ("mean (default)", ROWS[0][:2]),
    ("median", ("calibration", "size bias, median positions")),
    ("original", ("calibration", "size bias, original positions")),
    ("compact", ("calibration", "size bias alone")),
)


def table(results: dict[str, Any]) -> str:
    """The cells in Markdown: accuracy of the default, then differences to it."""
    samples = load_split(results["provenance"]["split"], results["provenance"]["questions"])
    right = {
        key: np.array([int(bit) for bit in cell["correct"]], dtype=float)
        for key, cell in results["cells"].items()
    }
    whole = f"{100 * right['unreduced'].mean():.1f}"
    everything = results["cells"]["unreduced"]["flops"]
    lines = [["no reduction", "all 144 tokens", *[whole] * len(BUDGETS), "100 %"]]
    complete = complete_rows(results)
    rows = [row for row in ROWS if row[:2] in complete]
    differences = [
        right[f"{group}/{value}/{tokens}"] - right[f"default/{ROWS[0][1]}/{tokens}"]
        for group, value, options in rows
        for tokens in BUDGETS
        if options
    ]
    shown = iter(_with_ends(samples, differences))
    for group, value, options in rows:
        cells = [group, value]
        for tokens in BUDGETS:
            own = right[f"{group}/{value}/{tokens}"]
            cells.append(next(shown) if options else f"**{100 * own.mean():.1f}**")
        costs = results["cells"][f"{group}/{value}/{COST_AT}"]["flops"]
        lines.append([*cells, f"{100 * costs / everything:.0f} %"])
    columns = ["varied", "value", *(f"{tokens} tokens" for tokens in BUDGETS), "FLOPs"]
    return "\n".join([markdown_table(columns, lines), "", family_words(len(differences))])


def _with_ends(samples: list[Any], differences: list[np.ndarray]) -> list[str]:
    """Differences in points with intervals that hold together."""
    return [
        f"{100 * one.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        for one, (low, high) in zip(
            differences, difference_intervals(samples, differences), strict=True
        )
    ]


def places_table(results: dict[str, Any]) -> str:
    """Questions about places alone, by the positions that the language model is told."""
    samples = load_split(results["provenance"]["split"], results["provenance"]["questions"])
    asked = np.array([sample.question_type in PLACES for sample in samples])
    chosen = [sample for sample, about in zip(samples, asked, strict=True) if about]

    def right(key: str) -> np.ndarray:
        bits = results["cells"][key]["correct"]
        return np.array([int(bit) for bit in bits], dtype=float)[asked]

    whole = right("unreduced")
    lines = [["no reduction", *[f"{100 * whole.mean():.1f}"] * len(BUDGETS)]]
    told = [(name, row) for name, row in TOLD if row in complete_rows(results)]
    differences = [
        right("/".join((*row, str(tokens)))) - whole for _, row in told for tokens in BUDGETS
    ]
    shown = iter(_with_ends(chosen, differences))
    lines += [[name, *(next(shown) for _ in BUDGETS)] for name, _ in told]
    words = f"## The {len(chosen)} questions about places\n\nIn which corner, left or right, above "
    words += "or below; in points, minus no reduction. "
    words += f"{family_words(len(differences))}\n\n"
    return words + markdown_table(["positions", *(f"{n} tokens" for n in BUDGETS)], lines)


def report(results: dict[str, Any]) -> str:
    """The whole page."""
    facts = results["provenance"]
    standard = (
        f"python -m scripts.demo.ablation --split {facts['split']} --limit {facts['questions']} "
        "--output eval/results/ablation"
    )
    shown = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command")
    later = [line for sentence in later_words(results) for line in (sentence, "")]
    text = [
        f"# Ablation on the demo {facts['split']} split",
        "",
        f"Made by `{facts.get('command', standard)}`. The first rows are percent right; every "
        "other row is its paired difference to the default in points, with its 95 % interval. An "
        "interval that holds 0 shows no difference. "
        f"FLOPs: up to the first token at {COST_AT} tokens, in percent of no reduction.",
        "",
        table(results),
        "",
        places_table(results),
        "",
        f"{shown}; {results['minutes']:.0f} minutes.",
        "",
        *later,
    ]
    return "\n".join(text)
