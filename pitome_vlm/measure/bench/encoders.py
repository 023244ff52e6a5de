"""Times of an encoder on its own, with and without merging, in turns.

What is timed is the encoder alone, from pixels to its output: what a model does with that (text,
classes, cross-attention) is the same with and without merging.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...adapters.encoders import find_encoder
from ...merge.config import MergeConfig
from ...wrapping.wrap import wrapped
from ..encoders import describe_encoder
from ..provenance import provenance
from ..stats import iqr
from ..tables import Table, flops_text
from .clock import Clock
from .prompts import Budget

COLUMNS = ("budget", "tokens", "encoder", "ms per batch", "IQR", "images/s", "speed")


@dataclass(frozen=True)
class EncoderTiming:
    """Times of one budget.

    Attributes:
        budget: its name.
        tokens: per image after the last layer.
        flops: of the encoder for one image.
        times: milliseconds of every batch, in the order of the rounds.
    """

    budget: str
    tokens: int
    flops: int
    times: tuple[float, ...] = ()

    @property
    def median_ms(self) -> float:
        """Of a batch."""
        return statistics.median(self.times)


@dataclass(frozen=True)
class EncoderReport:
    """What was measured.

    Attributes:
        name: of the model.
        batch: images in a batch.
        rows: one per budget; the first is the unmerged encoder.
        setup: hardware, dtype and versions.
    """

    name: str
    batch: int
    rows: tuple[EncoderTiming, ...]
    setup: dict[str, Any]

    def table(self) -> Table:
        """Medians, and how much faster than without merging."""
        whole = self.rows[0].median_ms
        rows = [
            (
                one.budget,
                str(one.tokens),
                flops_text(one.flops),
                f"{one.median_ms:.2f}",
                f"{iqr(list(one.times)):.2f}",
                f"{1000 * self.batch / one.median_ms:.1f}",
                f"{whole / one.median_ms:.2f}x",
            )
            for one in self.rows
        ]
        caption = f"{self.name}, batch {self.batch}, {len(self.rows[0].times)} rounds"
        return Table(caption, COLUMNS, rows, numbers=frozenset(range(1, len(COLUMNS))))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [dataclasses.asdict(one) | {"median_ms": one.median_ms} for one in self.rows]
        return {"model": self.name, "batch": self.batch, "setup": self.setup, "budgets": rows}


@torch.no_grad()
def time_encoder(
    model: Any,
    budgets: Sequence[Budget],
    *,
    name: str,
    batch: int = 1,
    image_size: tuple[int, int] | None = None,
    repeats: int = 20,
    warmup: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> EncoderReport:
    """Time every budget once per round.

    Args:
        model: an encoder, or a model around one, unwrapped; so it is afterwards.
        budgets: what to compare; the first one is the baseline.
        name: of the model, for the report.
        batch: images of noise that are encoded together.
        image_size: (height, width) in pixels, None for that of the model's configuration.
        repeats: timed rounds, >= 1.
        warmup: untimed rounds before them.
        progress: called with the number of the round and of all rounds.

    Raises:
        ValueError: a budget does not fit.
    """
    encoder = find_encoder(model)
    configs = [budget.config or MergeConfig(keep=1.0) for budget in budgets]
    plans = [describe_encoder(model, config=one, image_size=image_size) for one in configs]
    weight = next(encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, *plans[0].image_size)
    pixels = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
    times: list[list[float]] = [[] for _ in budgets]
    for number in range(warmup + repeats):
        for own, config in zip(times, configs, strict=True):
            own.append(_one_run(model, encoder, pixels, config))
        if progress is not None:
            progress(number + 1, warmup + repeats)
    rows = [
        EncoderTiming(budget.name, plan.tokens_out, plan.after.total_flops, tuple(own[warmup:]))
        for budget, plan, own in zip(budgets, plans, times, strict=True)
    ]
    setup = provenance(model, batch_size=batch, image_size=list(plans[0].image_size))
    return EncoderReport(name, batch, tuple(rows), setup)


def _one_run(model: Any, encoder: Any, pixels: torch.Tensor, config: MergeConfig) -> float:
    with wrapped(model, config=config):
        clock = Clock(pixels.device)
        clock.synchronize()
        with clock.span("encoder"):
            encoder(pixels)
        clock.synchronize()
    return clock.total("encoder")
