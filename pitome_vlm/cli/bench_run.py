"""How `pitome-vlm bench` loads a model, times it, and finds the largest batch.

How anything is timed or computed is left to `pitome_vlm.measure.bench`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..loading.checkpoints import torch_dtype
from ..measure.bench import (
    Bench,
    Budget,
    Case,
    Report,
    build,
    configuration,
    counted_over_formula,
    fitting_batch,
)
from ..measure.bench.fits import tried_fit
from ..measure.bench.memory import FORMULA, is_computable, out_of_memory
from ..measure.bench.report import Fit
from ..measure.provenance import provenance
from ..measure.sizes import pieces_of, planned_total
from ..wrapping.encode import planned_schedule
from ..wrapping.wrap import unwrap
from .options import Loading
from .session import accelerator, checked_device, load_model
from .terminal import say

GIB = 2**30
SECONDS_BETWEEN_LINES = 10


@dataclass
class Loaded:
    """A model to time.

    Attributes:
        model: the model.
        whole: the same at full depth, which may be on the meta device.
        depth: layers of `whole` divided by layers of `model`.
        notes: what a reader of the numbers has to know about it.
        processor: of a checkpoint.
    """

    model: Any
    whole: Any
    depth: float = 1.0
    notes: list[str] = field(default_factory=list)
    processor: Any = None


def load_checkpoint(name: str, threads: int | None, loading: Loading) -> Loaded:
    """An unwrapped model from a checkpoint."""
    _use_threads(threads)
    vlm, processor = load_model(name, encoders=True, **vars(loading))
    vlm = unwrap(vlm).eval()
    return Loaded(vlm, vlm, processor=processor)


def build_shape(
    name: str, layers: int | None, dtype: str | None, device: str | None, threads: int | None
) -> Loaded:
    """A model of a published shape with random weights, of all or of some layers."""
    _use_threads(threads)
    chosen: Any = torch_dtype(dtype or "float32")
    place = checked_device(device) or accelerator() or "cpu"
    say(f"Building {name} with random weights on {place} ...")
    vlm = build(name, layers=layers, dtype=chosen, device=place)
    all_layers = configuration(name).text_config.num_hidden_layers
    depth = all_layers / vlm.config.text_config.num_hidden_layers
    notes = [f"random weights of the shape of {name}"]
    if depth == 1:
        return Loaded(vlm, vlm, notes=notes)
    notes.append(
        f"{layers} of {all_layers} language model layers were built. For the full depth, the time "
        "from the start of the first layer to the end of the last one is multiplied by "
        f"{depth:g}, and everything else (tower, projector, embedding, head, sampling) counts "
        "once. KV cache, largest batch and the sentences are about the full depth; the first "
        "table, FLOPs and peak memory are about what was built"
    )
    return Loaded(vlm, build(name, dtype=chosen, device="meta"), depth, notes)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def check_budgets(vlm: Any, budgets: list[Budget], case: Case) -> None:
    """Refuse a budget that does not fit the model before the first round."""
    pieces = pieces_of(vlm, **case.shown)
    for budget in budgets:
        if budget.config is not None:
            planned_schedule(vlm, budget.config)
            planned_total(vlm, budget.config, pieces)


def timed(
    name: str,
    loaded: Loaded,
    budgets: list[Budget],
    cases: list[Case],
    *,
    repeats: int,
    warmup: int,
    check_flops: bool,
) -> tuple[Report, bool]:
    """Time every budget in every case; also whether Ctrl-C ended that early."""
    setup = provenance(
        loaded.model,
        language_model_layers=loaded.model.config.get_text_config().num_hidden_layers,
        algorithm=", ".join(sorted({x.config.algorithm for x in budgets if x.config})),
    )
    report = Report(name, [], loaded.notes, depth=loaded.depth, setup=setup)
    try:
        if check_flops:
            for budget in budgets:
                share = counted_over_formula(loaded.model, budget, cases[0])
                report.notes.append(
                    f"FLOPs counted by PyTorch / formula, {budget.name}: {share:.4f}"
                )
        _measure(loaded, budgets, cases, report, repeats, warmup)
    except KeyboardInterrupt:
        done = min((one.repeats for _, one in report.pairs()), default=0)
        report.notes.append(f"interrupted after {done} of {repeats} rounds")
        say("interrupted")
        return report, True
    return report, False


def _measure(
    loaded: Loaded,
    budgets: list[Budget],
    cases: list[Case],
    report: Report,
    repeats: int,
    warmup: int,
) -> None:
    for case in cases:
        try:
            bench = Bench(loaded.model, budgets, case, depth=loaded.depth)
            report.results.append(bench.results)
            tell = _progress(case.batch, time.monotonic())
            bench.run(repeats=repeats, warmup=warmup, progress=tell)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            said = f"batch {case.batch}: out of memory for at least one budget"
            if not any(done[0].repeats for done in report.results):
                hint = "try a smaller --batch, --load-4bit or --layers"
                raise MemoryError(f"{said}; {hint}") from error
            report.notes.append(f"{said}; larger ones were not tried")
            say(said)
            break


def _progress(batch: int, started: float) -> Callable[[int, int], None]:
    last = [0.0]

    def tell(done: int, rounds: int) -> None:
        now = time.monotonic()
        if done == rounds or now - last[0] > SECONDS_BETWEEN_LINES:
            left = (now - started) / done * (rounds - done)
            say(f"batch {batch}: round {done} of {rounds}, about {left:.0f} s left")
            last[0] = now

    return tell


def find_fits(loaded: Loaded, report: Report, *, memory: float | None, try_out: bool) -> None:
    """Add the largest batch of every budget, and its throughput, to a report.

    `memory` is in GiB, None for what this device has; `try_out` searches by trying batches out
    where there is an accelerator.
    """
    model = loaded.model
    on_cpu = model.device.type == "cpu"
    if try_out and on_cpu:
        report.notes.append(
            "--max-batch tries batches out on GPUs only; here the largest batch is computed"
        )
    if try_out and not on_cpu:
        _try_out(model, report)
    else:
        _compute(model, loaded.whole, report, memory)


def _compute(model: Any, whole: Any, report: Report, memory: float | None) -> None:
    if not is_computable(whole):
        report.notes.append(
            "max batch: not computed for this model, whose tower takes images of any size"
        )
        return

    size, whose = _memory(model, memory)
    report.notes.append(f"max batch: computed for {size / GIB:.1f} GiB ({whose}): {FORMULA}")
    report.notes.append(
        'answers/s at it: ">=" marks an estimate from the largest timed batch, as if time grew in '
        "proportion to the batch; larger batches share the reading of weights and are faster"
    )
    last = [case for case in report.results if case[0].repeats][-1]
    for one in last:
        batch = fitting_batch(whole, one, size, model.dtype)
        rate = one.answers_per_second(one.whole) if batch >= one.case.batch else None
        report.fits[one.budget.name] = Fit(batch, False, rate)


def _try_out(model: Any, report: Report) -> None:
    size, _ = _memory(model, None)
    report.notes.append("the largest batches were tried out")
    for one in report.results[0]:
        report.fits[one.budget.name], _ = tried_fit(model, one, size)


def _memory(model: Any, given: float | None) -> tuple[int, str]:
    """Bytes, and what they are the memory of."""
    if given is not None:
        return int(given * GIB), "--memory"
    if model.device.type == "cuda":
        return int(torch.cuda.get_device_properties(model.device).total_memory), "the GPU's memory"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's memory"
