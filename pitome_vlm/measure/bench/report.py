"""Measured phases as tables and JSON; terminals are the command line's business."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common import write_text
from ..provenance import provenance
from ..stats import iqr
from ..tables import Table
from .phases import SCALED, TIMES, Phases, median, pays_for

FORMAT = "pitome_vlm bench 4"
FORMULAS = (
    "FLOPs (2 per multiply-add; matrix products and convolutions only): "
    "tower layer = n 2 W(attention) + 4 n^2 C + n' 2 W(mlp) + merge; "
    "merge, also after the tower = 2 p D per step, p the pairs compared (n^2 for pitome and "
    "pitome_plus) and D their width (other algorithms: pitome_vlm/measure/flops.py); "
    "projector = n 2 W(projector); prefill = n 2 W(llm) + L 4 n^2 C + 2 W(head)"
)
COLUMN_NOTE = (
    "merge is everything between pixels and visual tokens that is neither tower nor projector; "
    "in models that cut images into tiles it includes packing the tiles, which the untouched "
    "model does under prompt. Proportional attention is in tower. prompt: ids, embeddings, cache "
    "and mask. First token = tower + merge + proj. + prompt + prefill"
)
TIME_COLUMNS = (
    *("budget", "tokens", "batch", "tower", "merge", "proj.", "prompt", "prefill"),
    *("first token", "per token"),
)
GAIN_COLUMNS = (
    *("budget", "batch", "first", "answer", "FLOPs", "KV MiB", "peak GiB"),
    *("answers/s", "pays to"),
)
FIT_COLUMNS = ("budget", "max batch", "how", "answers/s at it")
WHOLE_COLUMNS = (
    *("budget", "batch", "prefill", "first token", "per token", "answer"),
    *("first", "answer", "answers/s", "pays to"),
)


@dataclass
class Fit:
    """The largest batch of one budget.

    Attributes:
        batch: prompts at a time.
        measured: found by trying; otherwise computed (`memory.FORMULA`).
        answers_per_second: at that batch.
        estimated: `answers_per_second` was not timed but extrapolated from the largest timed
            batch, as if time grew in proportion to the batch; a lower bound.
    """

    batch: int
    measured: bool
    answers_per_second: float | None = None
    estimated: bool = True


@dataclass
class Report:
    """All cases of one run; in every case the first budget is the baseline.

    Attributes:
        model: name of the shape, or the checkpoint's folder.
        results: phases by case.
        notes: what a reader has to know besides the versions.
        fits: the largest batch by budget name, where it is known.
        depth: layers of the whole language model divided by those that were timed.
        setup: hardware, dtype, device, versions and settings of the run.
    """

    model: str
    results: list[list[Phases]]
    notes: list[str] = field(default_factory=list)
    fits: dict[str, Fit] = field(default_factory=dict)
    depth: float = 1.0
    setup: dict[str, Any] = field(default_factory=provenance)

    def pairs(self) -> list[tuple[Phases, Phases]]:
        """(baseline, budget) of every case and budget that was timed, the baseline included."""
        return [(case[0], one) for case in self.results for one in case if one.repeats]

    def tables(self) -> list[Table]:
        """Times, gains, then (for a cut model) those of full depth, then largest batches."""
        pairs, built = self.pairs(), " as built" if self.depth != 1 else ""
        widths = sorted({one.costs.kv_dtype for _, one in pairs})
        found = [
            _table(
                f"{self.model}{built}: where the time goes, medians in ms (± interquartile range), "
                f"{self.rounds()}",
                TIME_COLUMNS,
                [self._time_row(one) for _, one in pairs],
            ),
            _table(
                f"{self.model}{built}: gains (2.00x = 2 times faster than the baseline, or 2 times "
                f"fewer FLOPs; KV cache in {' and '.join(widths)})",
                GAIN_COLUMNS,
                [self._gain_row(base, one) for base, one in pairs],
            ),
        ]
        if self.depth != 1:
            title = f"{self.model} at full depth, scaled up (ms; 2.00x = 2 times faster)"
            rows = [self._whole_row(base, one) for base, one in pairs]
            found.append(_table(title, WHOLE_COLUMNS, rows))
        if self.fits:
            title = "largest batch" + (" at full depth" if self.depth != 1 else "")
            found.append(_table(title, FIT_COLUMNS, self._fit_rows()))
        return found

    def rounds(self) -> str:
        """How often every budget was timed, as a phrase."""
        found = sorted({one.repeats for _, one in self.pairs()})
        plural = "" if found == [1] else "s"
        return " and ".join(map(str, found)) + f" round{plural} in turns"

    def footnotes(self) -> list[str]:
        """What columns and formulas mean, then the notes of this run."""
        return [COLUMN_NOTE, FORMULAS, *self.notes]

    def _fit_rows(self) -> list[tuple[str, ...]]:
        return [
            (name, str(fit.batch), "tried" if fit.measured else "computed", _rate(fit))
            for name, fit in self.fits.items()
        ]

    def _time_row(self, one: Phases) -> tuple[str, ...]:
        return (
            one.budget.name,
            str(one.tokens),
            str(one.case.batch),
            *(shown(one.median(name)) for name in TIMES[:5]),
            _with_spread(one.rounds["first"]),
            _with_spread(one.rounds["decode"]),
        )

    def _gain_row(self, base: Phases, one: Phases) -> tuple[str, ...]:
        length, own, other = one.case.answer_tokens, one.measured, base.measured
        return (
            one.budget.name,
            str(one.case.batch),
            f"{other.first / own.first:.2f}x",
            f"{other.total(length) / own.total(length):.2f}x",
            f"{base.costs.total_flops / one.costs.total_flops:.2f}x",
            shown(one.kv_bytes / 2**20),
            "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f}",
            f"{one.answers_per_second(own):.3g}",
            _pays(base, one, measured=True),
        )

    def _whole_row(self, base: Phases, one: Phases) -> tuple[str, ...]:
        length, own, other = one.case.answer_tokens, one.whole, base.whole
        return (
            one.budget.name,
            str(one.case.batch),
            *(shown(value) for value in (own.prefill, own.first, own.decode, own.total(length))),
            f"{other.first / own.first:.2f}x",
            f"{other.total(length) / own.total(length):.2f}x",
            f"{one.answers_per_second(own):.3g}",
            _pays(base, one, measured=False),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, every round, with hardware and versions."""
        return {
            "format": FORMAT,
            "model": self.model,
            "setup": self.setup,
            "depth": self.depth,
            "formulas": FORMULAS,
            "columns": COLUMN_NOTE,
            "notes": self.notes,
            "max_batch": {name: vars(fit) for name, fit in self.fits.items()},
            "results": [values(base, one) for base, one in self.pairs()],
        }

    def save(self, path: Path) -> None:
        """Write `to_dict` as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def markdown(self) -> str:
        """The tables in Markdown, each under its heading."""
        return "\n\n".join(table.markdown() for table in self.tables())


def _table(caption: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    return Table(caption, columns, rows, numbers=frozenset(range(1, len(columns))))


def _pays(base: Phases, one: Phases, *, measured: bool) -> str:
    if one is base:
        return "-"
    lengths = pays_for(base, one, measured=measured)
    return "no" if lengths is None else str(lengths)


def _rate(fit: Fit) -> str:
    if fit.answers_per_second is None:
        return "-"
    return f"{'>= ' if fit.estimated else ''}{fit.answers_per_second:.3g}"


def _with_spread(values: list[float]) -> str:
    """Median ± interquartile range, which a single value does not have."""
    spread = f" ±{shown(iqr(values))}" if len(values) > 1 else ""
    return f"{shown(median(values))}{spread}"


def shown(value: float) -> str:
    """A number with about three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def values(base: Phases, one: Phases) -> dict[str, Any]:
    """Everything about one budget in one case, as JSON values."""
    case = vars(one.case) | {"image_size": one.case.image_size and list(one.case.image_size)}
    del case["image_processor"]
    found: dict[str, Any] = {
        "budget": one.budget.name,
        "config": None if one.budget.config is None else one.budget.config.to_dict(),
        "visual_tokens": one.tokens,
        **case,
        "repeats": one.repeats,
        "peak_bytes": one.peak_bytes,
        "kv_bytes": one.kv_bytes,
        "kv_dtype": one.costs.kv_dtype,
        "flops": {
            "tower": one.costs.tower_flops,
            "projector": one.costs.projector_flops,
            "merge": one.costs.merge_flops,
            "prefill": one.costs.prefill_flops,
            "total": one.costs.total_flops,
            "ratio": one.costs.total_flops / base.costs.total_flops,
        },
        "median_ms": {name: one.median(name) for name in (*TIMES, *SCALED)},
        "iqr_ms": {name: iqr(one.rounds[name]) for name in (*TIMES, *SCALED)},
        "rounds_ms": {name: [round(ms, 4) for ms in own] for name, own in one.rounds.items()},
    }
    for name in ("measured", "whole"):
        own, other = getattr(one, name), getattr(base, name)
        lengths = pays_for(base, one, measured=name == "measured")
        length = one.case.answer_tokens
        found[name] = {
            **vars(own),
            "answer": own.total(length),
            "answers_per_second": one.answers_per_second(own),
            "speed_up_first": other.first / own.first,
            "speed_up_answer": other.total(length) / own.total(length),
            # None where merging pays for no answer; `most` is None where there is no limit.
            "pays_for": None if lengths is None or one is base else vars(lengths),
        }
    return found
