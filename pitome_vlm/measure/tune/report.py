"""What a tuning run found: the config, what may be said about it, and its files."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common import counted, markdown_table, write_bytes, write_text
from ...merge.config import MergeConfig
from ..provenance import in_words
from ..stats import RESAMPLES, Loss
from ..store import TUNE_PLOT
from ..tables import percent_text
from .cells import Cell
from .comparison import Comparison
from .plots import draw
from .recipes import BASELINES
from .search import within
from .verdict import Verdict, level, named

_HOW = (
    "The questions were split by image. Every recipe walked down the budgets on the search part "
    "and stopped at a confident violation of the target (whole interval above it) or at two "
    "violations in a row; later recipes began {spare} above the smallest that was known "
    "to be good. The fewest tokens within the target won, at equal counts the lower loss, then the "
    "lower divergence. That setting was asked the questions of the check part; if it missed the "
    "target there, the next larger admissible budget was, at most {checks} in all."
)
_INTERVALS = (
    "Intervals: paired bootstrap over images ({draws:,} draws; questions about one image fail "
    "together). Two images that do not exist are added, one losing and one gaining a question, so "
    "that a part without any difference does not claim certainty. The i-th setting looked at on "
    "the check part has level 1 - {alpha:.3g} / i. Divergence: mean KL(unreduced || reduced) of "
    "the first answer token, in nats."
)


@dataclass(frozen=True)
class TuneResult:
    """The outcome of `tune`.

    Attributes:
        config: for `wrap(model, config=...)`; keeps all tokens where no smaller budget held.
        verdict: "met": the whole interval is within the target. "not_shown": the loss is, the
            interval is not. "unreduced": no setting held, all tokens are kept.
        statement: the claim in words, from the check part alone.
        max_loss: the target, as a share.
        tokens: visual tokens per image under `config`.
        tokens_in: visual tokens per image without reduction.
        cells: cells of the search part, in the order measured.
        checks: cells of the check part, in the order measured; unless the verdict is
            "unreduced", the last one is that of `config`.
        answered: losses are of accuracy; otherwise of agreement with the unreduced model.
        savings: what the config saves, as a phrase.
        smaller: `config` against smaller images of as many tokens, on the check part; None where
            nothing is reduced or images cannot be made smaller.
        against_smaller: the same in one line, or why it is left out; empty where nothing is
            reduced.
        skipped: reasons by name of the recipes that do not fit the model.
        notes: what a reader should know about the data.
        facts: split, options, model, hardware, versions.
    """

    config: MergeConfig
    verdict: Verdict
    statement: str
    max_loss: float
    tokens: int
    tokens_in: int
    cells: tuple[Cell, ...]
    checks: tuple[Cell, ...]
    answered: bool
    savings: str = ""
    smaller: Comparison | None = None
    against_smaller: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> Loss | None:
        """Loss of `config` on the check part; None where nothing is reduced."""
        return None if self.verdict == "unreduced" else self.checks[-1].loss

    def report(self) -> str:
        """The run as a page of Markdown."""
        return markdown(self)

    def plot(self) -> bytes:
        """Loss against tokens as a PNG."""
        return draw(self.cells, self.checks, max_loss=self.max_loss, answered=self.answered)

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON values."""
        return {
            "verdict": self.verdict,
            "statement": self.statement,
            "max_loss": self.max_loss,
            "config": self.config.to_dict(),
            "tokens": self.tokens,
            "tokens_in": self.tokens_in,
            "answered": self.answered,
            "search": [_plain(cell) for cell in self.cells],
            "check": [_plain(cell) for cell in self.checks],
            "smaller": self.smaller and dataclasses.asdict(self.smaller),
            "against_smaller": self.against_smaller,
            "skipped": self.skipped,
            "notes": list(self.notes),
            "facts": self.facts,
        }

    def save(self, folder: str | os.PathLike[str], *, plot: bool = True) -> list[Path]:
        """Write pitome_config.json, report.md, result.json and the plot (`TUNE_FILES`).

        Args:
            folder: the output folder, made where it does not exist.
            plot: write the plot too.

        Returns:
            The paths written.

        Raises:
            ImportError: `plot` is set and matplotlib is not installed.
        """
        target = Path(folder)
        drawn = self.plot() if plot else None
        paths = []
        if drawn is not None:
            paths.append(write_bytes(target / TUNE_PLOT, drawn))
        else:
            # The plot of an earlier run with other options does not belong to this report.
            (target / TUNE_PLOT).unlink(missing_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        paths.append(write_text(target / "result.json", text))
        paths.append(write_text(target / "report.md", markdown(self, plot=plot)))
        paths.append(self.config.save_pretrained(target))
        return paths


def markdown(result: TuneResult, *, plot: bool = True) -> str:
    """A tuning run as a page of Markdown, with `loss_tokens.png` if `plot`."""
    parts = ["# Tuning report", f"**{_headline(result)}**", result.statement]
    if result.against_smaller:
        parts.append(result.against_smaller)
    if result.notes:
        parts.append("\n".join(f"- Note: {note}." for note in result.notes))
    parts.append(_use(result))
    if plot:
        parts.append(f"![loss against tokens]({TUNE_PLOT})")
    parts += [_check(result), _search(result)]
    if result.skipped:
        lines = [f"- {name}: {reason}" for name, reason in result.skipped.items()]
        parts.append("\n".join(["## Left out", "", *lines]))
    parts += [_method(result), _provenance(result)]
    return "\n\n".join(parts) + "\n"


def _headline(result: TuneResult) -> str:
    if result.verdict == "unreduced":
        return f"Keep all {result.tokens_in} tokens."
    if not result.savings:
        return f"{named(result.checks[-1])}."
    return f"{result.checks[-1].recipe.name}: {result.savings}."


def _use(result: TuneResult) -> str:
    return (
        "`pitome_config.json` next to this page holds the setting "
        f"(`{result.config.summary()}`):\n\n"
        "```python\n"
        'config = pitome_vlm.MergeConfig.from_pretrained("path/of/this/folder")\n'
        "model = pitome_vlm.wrap(model, config=config)\n"
        "```"
    )


def _check(result: TuneResult) -> str:
    if not result.checks:
        return "## Check\n\nNothing was checked: the search found no setting within the target."
    lines = [
        [*_measured(cell), level(cell.loss.level), _outcome(cell, result)] for cell in result.checks
    ]
    columns = [*_columns(result), "level", "outcome"]
    loss = result.checks[0].loss
    lead = (
        f"{loss.questions} questions about {loss.images} images that the search never saw; the "
        f"unreduced model's score on them is {percent_text(loss.base)}. These numbers are the "
        "quality."
    )
    return f"## Check\n\n{lead}\n\n{markdown_table(columns, lines, range(1, len(columns)))}"


def _outcome(cell: Cell, result: TuneResult) -> str:
    if not within(cell.loss.value, result.max_loss):
        return "missed"
    return "met" if within(cell.loss.high, result.max_loss) else "within, not shown"


def _search(result: TuneResult) -> str:
    if not result.cells:
        return "## Search\n\nNo setting could be measured."
    loss = result.cells[0].loss
    lead = (
        f"{loss.questions} questions about {loss.images} images; unreduced "
        f"{percent_text(loss.base)}. These numbers chose the setting and flatter it: they are not "
        "its quality."
    )
    lines, columns = [_measured(cell) for cell in result.cells], _columns(result)
    return f"## Search\n\n{lead}\n\n{markdown_table(columns, lines, range(1, len(columns)))}"


def _columns(result: TuneResult) -> list[str]:
    score = "right" if result.answered else "agreement"
    return ["setting", "tokens", score, "loss", "interval", "divergence"]


def _measured(cell: Cell) -> list[str]:
    loss = cell.loss
    return [
        cell.recipe.name,
        str(cell.tokens),
        percent_text(loss.reduced),
        percent_text(loss.value),
        f"{percent_text(loss.low)} to {percent_text(loss.high)}",
        f"{cell.divergence:.3g}",
    ]


def _method(result: TuneResult) -> str:
    checks = int(result.facts.get("max_checks", len(result.checks)))
    alpha = 1 - float(result.facts.get("confidence", 0.95))
    loss = (
        "Loss: (unreduced accuracy - reduced accuracy) / unreduced accuracy; accuracy is the mean "
        f"score by `{result.facts.get('scorer', 'exact_match')}`."
        if result.answered
        else "Loss: 1 - agreement with the unreduced model's greedy answers, compared by "
        f"`{result.facts.get('scorer', 'exact_match')}`; nobody said whether those are right."
    )
    how = _HOW.format(spare=counted(checks - 1, "budget"), checks=checks)
    baselines = f"Baselines ({', '.join(BASELINES)}) are tried only where they are named."
    intervals = _INTERVALS.format(alpha=alpha, draws=RESAMPLES)
    return f"## How\n\n{loss}\n\n{how} {baselines}\n\n{intervals}"


def _provenance(result: TuneResult) -> str:
    facts = in_words(result.facts)
    return f"## Provenance\n\nMeasured, greedy decoding. {facts}. All answers: cells/*.json."


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        "recipe": cell.recipe.name,
        "options": cell.recipe.options,
        "tokens": cell.tokens,
        "loss": dataclasses.asdict(cell.loss),
        "divergence": cell.divergence,
        "seconds": cell.seconds,
    }
