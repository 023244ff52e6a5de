"""What a tuning run found: the config, what may be said about it, and where that comes from.

Knows: cells, and how to word a claim that the numbers carry. Does not know: how cells are
measured, Markdown, or plots.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...common import write_bytes, write_text
from ...merge.config import MergeConfig
from .bench import Cell
from .intervals import Loss
from .search import within

Verdict = Literal["met", "not_shown", "unreduced"]
# Closer to the target than this share of it, a number of images would be no advice.
_CLOSE = 0.25


@dataclass(frozen=True)
class TuneResult:
    """The outcome of `tune`.

    Attributes:
        config: for `wrap(model, config=...)`; keeps all tokens where nothing smaller held.
        verdict: "met": the whole interval is within the target. "not_shown": the loss is, the
            interval is not. "unreduced": no setting held, all tokens are kept.
        statement: the claim in words, from the check part alone.
        max_loss: the target.
        tokens: visual tokens per image under `config`.
        tokens_in: without reduction.
        cells: search part, in the order measured.
        checks: check part, in the order measured; with "met" and "not_shown" the last one is of
            `config`.
        answered: whether losses are of accuracy; otherwise of agreement with the unreduced model.
        savings: what the config saves, as a phrase.
        skipped: recipes the model cannot have, with the reason.
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
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> Loss | None:
        """Loss of `config` on the check part; None where nothing is reduced."""
        return None if self.verdict == "unreduced" else self.checks[-1].loss

    def report(self) -> str:
        """The run in Markdown."""
        from .report import markdown

        return markdown(self)

    def plot(self) -> bytes:
        """Loss against tokens as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import draw

        return draw(self)

    def to_dict(self) -> dict[str, Any]:
        """Every number, as plain JSON values."""
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
            "skipped": self.skipped,
            "notes": list(self.notes),
            "facts": self.facts,
        }

    def save(self, folder: str | os.PathLike[str], *, plot: bool = True) -> list[Path]:
        """Write pitome_config.json, report.md, result.json and the plot; returns the paths.

        Raises:
            ImportError: a plot is wanted and matplotlib is not installed.
        """
        target = Path(folder)
        drawn = self.plot() if plot else None
        paths = []
        if drawn is not None:
            paths.append(write_bytes(target / "loss_tokens.png", drawn))
        else:
            # One of an earlier run with other options would stand beside the wrong report.
            (target / "loss_tokens.png").unlink(missing_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        paths.append(write_text(target / "result.json", text))
        from .report import markdown

        paths.append(write_text(target / "report.md", markdown(self, plot=plot)))
        paths.append(self.config.save_pretrained(target))
        return paths


def judge(
    cells: Sequence[Cell], checks: Sequence[Cell], *, max_loss: float, answered: bool
) -> tuple[Verdict, str]:
    """The verdict and the sentence it comes with.

    Args:
        cells: search part.
        checks: check part, the last one is the candidate.
        max_loss: the target.
        answered: whether losses are of accuracy.
    """
    target = f"the target of at most {percent(max_loss)}"
    if not checks:
        if not cells:
            return "unreduced", "No setting could be measured: the config keeps all tokens."
        least = min(cells, key=lambda cell: cell.loss.value)
        return "unreduced", (
            f"No setting is within {target} on the {least.loss.questions} questions that were "
            f"searched; the least is {percent(least.loss.value)} with {named(least)}. The config "
            "keeps all tokens."
        )
    last = checks[-1]
    loss = last.loss
    about = f"{loss.questions} held-out questions about {loss.images} images"
    if not within(loss.value, max_loss):
        lost = ", ".join(f"{named(cell)} {_with_interval(cell.loss)}" for cell in checks)
        return "unreduced", (
            f"On {about} every setting that was checked misses {target}: {lost}. The config keeps "
            "all tokens."
        )
    what = "the loss of accuracy" if answered else "the loss of agreement with the unreduced model"
    sentence = f"On {about} {what} is {_with_interval(loss)}: {target}"
    if len(checks) > 1:
        before = "smaller budget" if len(checks) == 2 else f"{len(checks) - 1} smaller budgets"
        sentence += f" (missed by the {before} checked before)"
    if within(loss.high, max_loss):
        return "met", f"{sentence} is met."
    sentence += f" is not shown to be met: the interval reaches {percent(loss.high)}."
    return "not_shown", sentence + _wanted(loss, max_loss)


def named(cell: Cell) -> str:
    """A setting in words."""
    return f"{cell.recipe.name} at {cell.tokens} tokens"


def percent(value: float) -> str:
    """A share in percent, one decimal."""
    return f"{_plain_zero(100 * value):.1f} %"


def level(value: float) -> str:
    """A coverage in percent, as short as it can be."""
    return f"{100 * value:.3g} %"


def _with_interval(loss: Loss) -> str:
    low = f"{_plain_zero(100 * loss.low):.1f}"
    return f"{percent(loss.value)} ({level(loss.level)} interval {low} to {percent(loss.high)})"


def _plain_zero(value: float) -> float:
    """No minus sign in front of what rounds to zero."""
    return 0.0 if abs(value) < 0.05 else value


def _wanted(loss: Loss, max_loss: float) -> str:
    """How many images would have been enough, where that can be said."""
    wide, room = loss.high - loss.value, max_loss - loss.value
    if room <= _CLOSE * max_loss:
        return " The loss is too close to the target for more images to settle it soon."
    images = math.ceil(loss.images * (wide / room) ** 2)
    # Two figures: this is an extrapolation.
    scale = 10 ** max(0, math.floor(math.log10(images)) - 1)
    return (
        f" To show it, about {math.ceil(images / scale) * scale} images to check on would be "
        "needed if the loss stays what it is."
    )


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        "recipe": cell.recipe.name,
        "options": cell.recipe.options,
        "tokens": cell.tokens,
        "loss": dataclasses.asdict(cell.loss),
        "divergence": cell.divergence,
        "seconds": cell.seconds,
    }
