"""The README's figures out of the demo benchmark: headline and table, between marks in the page.

python -m scripts.demo.benchmark --output eval/results/demo --readme README.md --rewrite
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.measure.demo_benchmark import accuracy_interval

from .report import BASELINE, PAPER, RECOMMENDED, SELECTORS, Row, kept_shares
from .times import BATCHES, by_name, faster, hardware_of

BUDGETS = (72, 36, 18)
HEADLINE_TOKENS = 36


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        samples: the questions.
        rows: answers, of `rows_of`.
        times: of `time_rows`.
        facts: of the first run.
    """

    samples: list[Any]
    rows: list[Row]
    times: Sequence[dict[str, Any]]
    facts: dict[str, Any]

    def row(self, name: str, tokens: int) -> Row:
        """The answers of a method at a budget."""
        return next(row for row in self.rows if (row.name, row.tokens) == (name, tokens))

    @property
    def base(self) -> Row:
        """The answers without merging."""
        return next(row for row in self.rows if row.name == BASELINE)

    def accuracy(self, name: str, tokens: int) -> float:
        """Percent right."""
        return 100 * float(self.row(name, tokens).correct.mean())

    def faster(self, name: str, tokens: int, batch: int) -> str:
        """How many times sooner the first token comes than without merging."""
        base = BASELINE, self.base.tokens
        return faster(by_name(self.times), base, (name, tokens), batch)

    def best_selector(self) -> str:
        """The selector that is right most often over the budgets of the table."""
        known = {row.name for row in self.rows}
        names = [name for name in SELECTORS if name in known]
        return max(names, key=lambda n: np.mean([self.accuracy(n, tokens) for tokens in BUDGETS]))


def headline(measured: Measured) -> str:
    """One sentence: what a quarter of the tokens keeps, and what it saves."""
    _, (low, high) = kept_shares(measured.samples, measured.rows)[HEADLINE_TOKENS]
    timed = [size for size in BATCHES if any(row["batch"] == size for row in measured.times)]
    first, *others = (
        f"{measured.faster(RECOMMENDED, HEADLINE_TOKENS, size)}{{}} at batch {size}"
        for size in sorted(timed, reverse=True)
    )
    sooner = ", ".join([first.format(" faster"), *(one.format("") for one in others)])
    return (
        f"**{HEADLINE_TOKENS} instead of {measured.base.tokens} visual tokens: "
        f"{measured.accuracy(RECOMMENDED, HEADLINE_TOKENS):.1f} instead of "
        f"{100 * measured.base.correct.mean():.1f} % right, and the first token is "
        f"{sooner}.** The bundled model of 3 M parameters on "
        f"{measured.facts['questions']} held-out questions, one CPU thread. "
        f"Accuracy kept (95 % interval): {low:.1f} to {high:.1f} %."
    )


def readme_table(measured: Measured) -> str:
    """Five methods at three budgets, with what they save."""
    selector = measured.best_selector()
    names = {
        RECOMMENDED: RECOMMENDED,
        "ToMe": "ToMe",
        selector: f"{selector} (best selector)",
        PAPER: PAPER,
    }
    low, high = accuracy_interval(measured.samples, measured.base.correct)
    whole = f"{100 * measured.base.correct.mean():.1f} ({low:.1f} to {high:.1f})"
    lines = [[f"none, {measured.base.tokens} tokens", whole, *["1x"] * len(BATCHES)]]
    for name, shown in names.items():
        right = ", ".join(f"{measured.accuracy(name, tokens):.1f}" for tokens in BUDGETS)
        cells = [shown, right]
        for size in BATCHES:
            times = [measured.faster(name, tokens, size) for tokens in BUDGETS]
            cells.append(", ".join(times))
        lines.append(cells)
    budgets = ", ".join(map(str, BUDGETS))
    columns = ["method", f"right at {budgets} tokens, %"]
    columns += [f"first token faster, batch {size}" for size in BATCHES]
    facts = measured.facts
    note = (
        f"{facts['questions']} held-out questions; timed on {hardware_of(measured.times)}, "
        f"{facts['threads']} thread, {facts['dtype']}, torch {facts['torch']}. All but {PAPER} "
        "are calibrated. More: "
        "[the report](eval/results/demo/report.md), made by `make bench-demo`."
    )
    return "\n".join([markdown_table(columns, lines), "", note])


def update_readme(path: Path, **parts: str) -> None:
    """Replace what stands between the marks of every part: `<!-- NAME:begin -->`, ..., `:end`.

    Raises:
        ValueError: marks are missing; nothing is written then.
    """
    text = path.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text or end not in text:
            raise ValueError(f"{path} has no {begin} ... {end} to write between")
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"
    path.write_text(text)
