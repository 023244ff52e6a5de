"""Measured phases as values, tables and JSON, with everything a reader needs to judge them.

Knows: which numbers answer "will it help me?". Does not know: terminals, pictures, sentences.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ...common import __version__, write_text
from ..machine import processor_name
from .phases import SCALED, TIMES, Phases, iqr, pays_for

FORMAT = "pitome_vlm bench 3"
FORMULAS = (
    "FLOPs (2 per multiply-add; matrix products and convolutions only): "
    "tower layer = n 2 W(attention) + 4 n^2 C + n' 2 W(mlp) + merge; "
    "merge, also behind the tower = 2 p D per step, p the pairs compared (n^2 for pitome and "
    "pitome_plus) and D their width (other algorithms: pitome_vlm/measure/flops.py); "
    "projector = n 2 W(projector); prefill = n 2 W(llm) + L 4 n^2 C + 2 W(head)"
)
COLUMN_NOTE = (
    "merge is everything between pixels and visual tokens that is neither tower nor projector; "
    "where pictures are cut into tiles it holds the packing of tiles as well, which the untouched "
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
        estimated: that number was not timed: the time of the largest batch that was, taken as
            proportional to the batch, which is the least one may expect.
    """

    batch: int
    measured: bool
    answers_per_second: float | None = None
    estimated: bool = True


@dataclass
class Report:
    """All cases of one run; in every case the first budget is what others are compared with.

    Attributes:
        model: shape or folder.
        results: phases by case.
        notes: what a reader has to know beside the versions.
        fits: the largest batch by budget name, where it is known.
        depth: layers of the whole language model over those that were timed.
        setup: dtype, device and the like.
    """

    model: str
    results: list[list[Phases]]
    notes: list[str] = field(default_factory=list)
    fits: dict[str, Fit] = field(default_factory=dict)
    depth: float = 1.0
    setup: dict[str, Any] = field(default_factory=dict)

    def pairs(self) -> list[tuple[Phases, Phases]]:
        """(what it is compared with, budget) of every case and budget."""
        return [(case[0], one) for case in self.results for one in case if one.repeats]

    def time_rows(self) -> list[tuple[str, ...]]:
        """One row of `TIME_COLUMNS` per case and budget: medians in ms, IQR behind +-."""
        return [self._time_row(one) for _, one in self.pairs()]

    def gain_rows(self) -> list[tuple[str, ...]]:
        """One row of `GAIN_COLUMNS` per case and budget."""
        return [self._gain_row(base, one) for base, one in self.pairs()]

    def whole_rows(self) -> list[tuple[str, ...]]:
        """One row of `WHOLE_COLUMNS` per case and budget: the whole depth, scaled up."""
        return [self._whole_row(base, one) for base, one in self.pairs()]

    def fit_rows(self) -> list[tuple[str, ...]]:
        """One row of `FIT_COLUMNS` per budget whose largest batch is known."""
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
            f"{shown(one.median('first'))} ±{shown(iqr(one.rounds['first']))}",
            f"{shown(one.median('decode'))} ±{shown(iqr(one.rounds['decode']))}",
        )

    def _gain_row(self, base: Phases, one: Phases) -> tuple[str, ...]:
        length, own, other = one.case.answer_tokens, one.measured, base.measured
        return (
            one.budget.name,
            str(one.case.batch),
            f"{other.first / own.first:.2f}x",
            f"{other.total(length) / own.total(length):.2f}x",
            f"{one.costs.total_flops / base.costs.total_flops:.3f}",
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
            "hardware": hardware(),
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
        """The tables in Markdown."""
        parts = [
            f"Medians in ms, ± the distance of the quartiles, {self._rounds()}.",
            table(TIME_COLUMNS, self.time_rows()),
            table(GAIN_COLUMNS, self.gain_rows()),
        ]
        if self.depth != 1:
            parts += ["At the whole depth (scaled up):", table(WHOLE_COLUMNS, self.whole_rows())]
        if self.fits:
            parts.append(table(FIT_COLUMNS, self.fit_rows()))
        return "\n\n".join(parts)

    def _rounds(self) -> str:
        found = sorted({one.repeats for _, one in self.pairs()})
        return " and ".join(map(str, found)) + " rounds in turns"


def _pays(base: Phases, one: Phases, *, measured: bool) -> str:
    if one is base:
        return "-"
    lengths = pays_for(base, one, measured=measured)
    return "no" if lengths is None else str(lengths)


def _rate(fit: Fit) -> str:
    if fit.answers_per_second is None:
        return "-"
    return f"{'>= ' if fit.estimated else ''}{fit.answers_per_second:.3g}"


def shown(value: float) -> str:
    """Milliseconds with three digits that mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def values(base: Phases, one: Phases) -> dict[str, Any]:
    """What is written about one budget in one case."""
    case = vars(one.case) | {"image_size": one.case.image_size and list(one.case.image_size)}
    found: dict[str, Any] = {
        "budget": one.budget.name,
        "config": None if one.budget.config is None else one.budget.config.to_dict(),
        "visual_tokens": one.tokens,
        **case,
        "repeats": one.repeats,
        "peak_bytes": one.peak_bytes,
        "kv_bytes": one.kv_bytes,
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
            # None: for no answer. The most may be None as well: however long the answer is.
            "pays_for": None if lengths is None or one is base else vars(lengths),
        }
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hardware() -> dict[str, Any]:
    """What a measured number was measured on."""
    found: dict[str, Any] = {
        "cpu": processor_name(),
        # Names of virtual machines say little; this decides most, bfloat16 above all.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "pitome_vlm": __version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found
