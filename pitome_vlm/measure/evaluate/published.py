"""Numbers that others published, to show next to measured ones (`published_table.py`).

Handles the columns of the CSV files in `published/` and what each may hold.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "published"
PROVENANCES = ("paper", "authors' log", "re-run by a third party", "copied")
BASES = ("stated", "computed", "inferred", "mean", "unknown")


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        model: checkpoint family, for instance "LLaVA-1.5-7B".
        method: as the source names it; "none" is the unreduced model.
        tokens: visual tokens that reach the language model, None where nobody knows.
        tokens_basis: how that count is known, one of `BASES`.
        benchmark: as the source names it.
        task: the lmms-eval task that comes nearest.
        metric: its metric, or "mme_total" for the sum of both MME scores.
        value: percent; MME is a raw score.
        provenance: who measured it, one of `PROVENANCES`.
        source: where it stands.
        protocol: how it was measured, as far as known.
    """

    model: str
    method: str
    tokens: int | None
    tokens_basis: str
    benchmark: str
    task: str
    metric: str
    value: float
    provenance: str
    source: str
    protocol: str

    def __post_init__(self) -> None:
        for field, allowed in (("tokens_basis", BASES), ("provenance", PROVENANCES)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}"
                )
        if (self.tokens is None) != (self.tokens_basis == "unknown"):
            raise ValueError(f"tokens {self.tokens!r} does not go with basis {self.tokens_basis}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        low, high = (0, 2800) if self.task == "mme" else (0, 100)
        if not low <= self.value <= high:
            raise ValueError(f"value must be in [{low}, {high}] for {self.task}, got {self.value}")
        for name in ("model", "method", "benchmark", "task", "metric", "source", "protocol"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")


def load_published(folder: Path = FOLDER) -> list[Published]:
    """Every published number, file by file; a ValueError names file and line."""
    return [row for path in sorted(folder.glob("*.csv")) for row in _read(path)]


def nearest(tasks: Iterable[str]) -> list[Published]:
    """The published numbers on these lmms-eval tasks, largest budget first within a source."""
    wanted = set(tasks)
    found = [row for row in load_published() if row.task in wanted]
    # Sorting is stable: within a source and budget the source's own order stays.
    return sorted(found, key=lambda row: (row.model, row.source, -(row.tokens or 0)))


def _read(path: Path) -> list[Published]:
    names = [field.name for field in fields(Published)]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path}: columns must be {', '.join(names)}")
        return [_row(path, reader.line_num, values) for values in reader]


def _row(path: Path, line: int, values: dict[str, str]) -> Published:
    try:
        tokens = int(values["tokens"]) if values["tokens"] else None
        return Published(
            **{k: v for k, v in values.items() if k not in ("tokens", "value")},
            tokens=tokens,
            value=float(values["value"]),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
