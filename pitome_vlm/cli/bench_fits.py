"""The largest batch of every budget: tried out on an accelerator, computed anywhere.

Knows: which of the two is asked for, whose memory it is about, what a reader must be told. Does not
know: how either is done (`pitome_vlm.measure.bench`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..measure.bench import Report

GIB = 2**30


def find_fits(
    model: Any, whole: Any, report: Report, *, memory: float | None, try_out: bool
) -> None:
    """Put the largest batch of every budget, and what it is worth, into a report.

    Args:
        model: as it was timed.
        whole: the same at its whole depth, which may be on the meta device.
        report: with timed cases; notes are added.
        memory: GiB to compute for, None for what this device has.
        try_out: search by trying where there is an accelerator.
    """
    on_cpu = model.device.type == "cpu"
    if try_out and on_cpu:
        report.notes.append("--max-batch tries batches out on a GPU only; here it is computed")
    if try_out and not on_cpu:
        _try_out(model, report)
    else:
        _compute(model, whole, report, memory)


def _compute(model: Any, whole: Any, report: Report, memory: float | None) -> None:
    from ..measure.bench import fitting_batch
    from ..measure.bench.memory import FORMULA, is_computable
    from ..measure.bench.report import Fit

    if not is_computable(whole):
        report.notes.append(
            "max batch: not computed for this model, whose tower takes pictures of any size"
        )
        return

    size, whose = _memory(model, memory)
    report.notes.append(f"max batch: computed for {size / GIB:.1f} GiB ({whose}): {FORMULA}")
    report.notes.append(
        "answers/s at max batch: >= was not timed; the time of the largest batch that was is "
        "taken as proportional to the batch, while larger batches share the reading of weights"
    )
    last = [case for case in report.results if case[0].repeats][-1]
    for one in last:
        batch = fitting_batch(whole, one, size, model.dtype)
        rate = one.answers_per_second(one.whole) if batch >= one.case.batch else None
        report.fits[one.budget.name] = Fit(batch, False, rate)


def _try_out(model: Any, report: Report) -> None:
    from ..measure.bench.fits import tried_fit

    size, _ = _memory(model, None)
    report.notes.append("the largest batches were tried out")
    for one in report.results[0]:
        report.fits[one.budget.name], _ = tried_fit(model, one, size)


def _memory(model: Any, given: float | None) -> tuple[int, str]:
    """Bytes, and whose they are."""
    if given is not None:
        return int(given * GIB), "--memory"
    if model.device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(model.device).total_memory), "the GPU's memory"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's memory"
