"""A tuning run as a page of Markdown.

Knows: the order in which a reader wants things, and which numbers must not be taken for which.
Does not know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .bench import Cell
from .recipes import BASELINES
from .result import level, named, percent
from .search import within

if TYPE_CHECKING:
    from .result import TuneResult

_HOW = (
    "The questions were split by picture. Every recipe walked down the budgets on the search part "
    "and stopped at a confident violation of the target (whole interval above it) or at two "
    "violations in a row; later recipes began {spare} budget(s) above the smallest that was known "
    "to be good. The fewest tokens within the target won, at equal counts the lower loss, then the "
    "lower divergence. That setting was asked the questions of the check part; if it missed the "
    "target there, the next larger admissible budget was, at most {checks} in all."
)
_INTERVALS = (
    "Intervals: paired bootstrap over pictures (4,000 draws; questions about one picture fail "
    "together), with two pictures added that do not exist, one losing and one gaining a question, "
    "so that a part without any difference does not claim certainty. The i-th setting looked at on "
    "the check part has level 1 - {alpha:.3g} / i. Divergence: mean KL(unreduced || reduced) of "
    "the first answer token, in nats."
)


def markdown(result: TuneResult, *, plot: bool = True) -> str:
    """The page.

    Args:
        result: what was found.
        plot: refer to `loss_tokens.png`.
    """
    parts = ["# Tuning report", f"**{_headline(result)}**", result.statement]
    if result.notes:
        parts.append("\n".join(f"- Note: {note}." for note in result.notes))
    parts.append(_use(result))
    if plot:
        parts.append("![loss against tokens](loss_tokens.png)")
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
        "`pitome_config.json` beside this page holds the setting "
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
        [*_measured(cell), level(cell.loss.level), _outcome(cell, result)]
        for cell in (result.checks)
    ]
    columns = [*_columns(result), "level", "outcome"]
    loss = result.checks[0].loss
    lead = (
        f"{loss.questions} questions about {loss.images} images that the search never saw; the "
        f"unreduced model's score on them is {percent(loss.base)}. These numbers are the quality."
    )
    return f"## Check\n\n{lead}\n\n{_table(columns, lines)}"


def _outcome(cell: Cell, result: TuneResult) -> str:
    if not within(cell.loss.value, result.max_loss):
        return "missed"
    return "met" if within(cell.loss.high, result.max_loss) else "within, not shown"


def _search(result: TuneResult) -> str:
    if not result.cells:
        return "## Search\n\nNo setting could be measured."
    loss = result.cells[0].loss
    lead = (
        f"{loss.questions} questions about {loss.images} images; unreduced {percent(loss.base)}. "
        "These numbers chose the setting and flatter it: they are not its quality."
    )
    lines = [_measured(cell) for cell in result.cells]
    return f"## Search\n\n{lead}\n\n{_table(_columns(result), lines)}"


def _columns(result: TuneResult) -> list[str]:
    score = "right" if result.answered else "agreement"
    return ["setting", "tokens", score, "loss", "interval", "divergence"]


def _measured(cell: Cell) -> list[str]:
    loss = cell.loss
    return [
        cell.recipe.name,
        str(cell.tokens),
        percent(loss.reduced),
        percent(loss.value),
        f"{percent(loss.low)} to {percent(loss.high)}",
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
    how = _HOW.format(spare=checks - 1, checks=checks)
    baselines = f"Baselines ({', '.join(BASELINES)}) are tried only where they are named."
    return f"## How\n\n{loss}\n\n{how} {baselines}\n\n{_INTERVALS.format(alpha=alpha)}"


def _provenance(result: TuneResult) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in result.facts.items())
    return f"## Provenance\n\nMeasured, greedy decoding. {facts}. All answers: cells.jsonl."


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(columns) - 1)]
    rows = [columns, ruler, *lines]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)
