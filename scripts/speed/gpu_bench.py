"""GPU part of the benchmarks: correctness, speed, memory, the merge's share, serving, nf4.

Called by gpu_bench.sh; needs PyTorch, transformers and peft only; vLLM is served where this package
is installed next to it. Steps are run in this order until --seconds are over; what was measured by
then is in OUT/report.md and OUT/*.json, which are written after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.common import markdown_table
from pitome_vlm.measure.bench import Bench, Budget, Case, Phases, Report, installed
from pitome_vlm.measure.bench.clock import Clock, watched
from pitome_vlm.measure.bench.fits import tried_fit
from pitome_vlm.measure.bench.memory import out_of_memory
from pitome_vlm.measure.provenance import in_words, machine, provenance, versions
from pitome_vlm.measure.stats import iqr
from pitome_vlm.merge.config import MergeConfig

from .attention_ways import first_line
from .gpu_attention import ATTENTION, attention, language_kernels, ways
from .gpu_correctness import correctness, selection
from .gpu_run import OutOfTimeError, Run, vision_inputs
from .gpu_serving import SECONDS, has_vllm, serving

ANSWER = 16
# Of the tokens of an image of any size.
KEEPS = (0.25, 0.11)
# What a search for the largest batch may take.
FIT_SECONDS = 30


def budgets_of(options: argparse.Namespace, model: Any) -> list[Budget]:
    """The untouched model and every algorithm at every number of tokens.

    Parts of them where images have any number, with and without merging in the tower.
    """
    found = [Budget("none")]
    if find_adapter(model).sized_by_processor:
        for keep, stage in itertools.product(KEEPS, ("both", "projector")):
            found.append(Budget(f"keep={keep} stage={stage}", MergeConfig(keep, stage=stage)))
        return found
    for count in map(int, options.tokens.split(",")):
        for name in options.algorithms.split(","):
            config = MergeConfig(tokens=count, algorithm=name)
            found.append(Budget(f"{name} tokens={count}", config))
    return found


def speed(run: Run, name: str, model: Any, until: float, title: str = "") -> None:
    """Every batch size under every budget, in turns, then the largest batch of every budget.

    What was measured is written whatever happens: after every batch, and in the end.
    """
    options = run.options
    setup = provenance(model, layers=options.layers or "all")
    report = Report(title or name, [], ["random weights"], setup=setup)
    largest: list[Phases] = []
    try:
        # Some of the time is for the largest batches.
        time_batches(run, model, report, until + 0.4 * max(0.0, run.left - until))
        if options.device != "cpu":
            largest += largest_batches(run, model, report, until)
    finally:
        report.save(options.out / f"{title or name}.json")
        run.add("", f"## {title or name}", "")
        if report.pairs():
            run.add(rates(report, largest), "", report.markdown(), "")
        run.add(*(f"- {note}" for note in report.notes))


def time_batches(run: Run, model: Any, report: Report, until: float) -> None:
    """Rounds at every batch size until one fails or only `until` seconds are left."""
    for batch in map(int, run.options.batches.split(",")):
        try:
            bench = Bench(model, budgets_of(run.options, model), Case(batch, 64, ANSWER))
            report.results.append(bench.results)
            timed_rounds(run, bench, until)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            report.notes.append(f"batch {batch} and larger: out of memory for at least one budget")
            torch.cuda.empty_cache()
            break
        finally:
            report.save(run.options.out / f"{report.model}.json")
        if bench.results[0].repeats < run.options.repeats:
            report.notes.append(f"batch {batch}: {bench.results[0].repeats} rounds, out of time")
            break


def largest_batches(run: Run, model: Any, report: Report, until: float) -> list[Phases]:
    """The largest batch of every budget, the first and the last one before those in between."""
    found: list[Phases] = []
    memory = torch.cuda.get_device_properties(model.device).total_memory
    results = report.results[0] if report.results else []
    for result in [*results[:1], *results[:0:-1]]:
        if run.left < until + FIT_SECONDS:
            report.notes.append(f"largest batch of {result.budget.name}: out of time")
            continue
        try:
            report.fits[result.budget.name], timed = tried_fit(model, result, memory)
        except Exception as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            report.notes.append(f"largest batch of {result.budget.name}: {said}")
            continue
        found += [] if timed is None else [timed]
    return found


def timed_rounds(run: Run, bench: Bench, until: float) -> None:
    """As many rounds as were asked for, fewer where time is short."""
    started = time.monotonic()
    bench.warm_up(2)
    took = (time.monotonic() - started) / 2
    while bench.results[0].repeats < run.options.repeats and run.left - took > until:
        bench.run(repeats=1, warmup=0)


def rates(report: Report, largest: list[Phases]) -> str:
    """What a server's owner asks for, at every batch size and at the largest of every budget."""
    columns = ["budget", "batch", "time to first token ms", "decode tokens/s", "requests/s"]
    rows = [
        [
            one.budget.name,
            str(one.case.batch),
            f"{one.median('first'):.1f} ±{iqr(one.rounds['first']):.1f}",
            f"{1e3 * one.case.batch / one.median('decode'):.0f}",
            f"{one.answers_per_second(one.measured):.2f}",
        ]
        for one in [*(one for _, one in report.pairs()), *largest]
    ]
    return f"Answers of {ANSWER} tokens.\n\n" + markdown_table([*columns], rows)


class ProfiledClock(Clock):
    """Spans that the profiler sees."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._ranges: dict[str, list[Any]] = {}

    def start(self, name: str) -> None:
        """See `Clock`."""
        found = record_function(f"pitome: {name}")
        found.__enter__()
        self._ranges.setdefault(name, []).append(found)

    def stop(self, name: str) -> None:
        """See `Clock`."""
        self._ranges[name].pop().__exit__(None, None, None)


def share(run: Run, name: str, model: Any) -> None:
    """How much of the tower's and of encoding's device time is merging, from the profiler."""
    on_cpu = run.options.device == "cpu"
    kinds = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    rows = []
    for budget in budgets_of(run.options, model)[1:]:
        with installed(model, budget), torch.no_grad():
            vision = vision_inputs(model, int(run.options.batches.split(",")[0]))
            for _ in range(3):
                pitome_vlm.encode_images(model, **vision)
            clock = ProfiledClock(torch.device(run.options.device))
            with profile(activities=kinds) as found, watched(model, clock):
                pitome_vlm.encode_images(model, **vision)
        times = {}
        for event in found.key_averages():
            if event.key.startswith("pitome: "):
                spent = event.cpu_time_total if on_cpu else event.device_time_total
                times[event.key.removeprefix("pitome: ")] = max(
                    spent, times.get(event.key.removeprefix("pitome: "), 0.0)
                )
        inside, tower, whole = (times.get(x, 0.0) for x in ("merge in tower", "tower", "encode"))
        outside = max(0.0, whole - tower - times.get("projector", 0.0))
        rows.append(
            [
                budget.name,
                f"{tower / 1e3:.2f}",
                f"{inside / 1e3:.2f}",
                f"{outside / 1e3:.2f}",
                f"{100 * inside / tower:.1f} %" if tower else "-",
                f"{100 * (inside + outside) / whole:.1f} %" if whole else "-",
            ]
        )
    columns = ["budget", "tower ms", "of it merge", "merge after it", "share of tower"]
    clock_name = "CPU" if on_cpu else "device"
    run.save(f"share-{name}", [dict(zip([*columns, "of all"], row, strict=True)) for row in rows])
    title = f"## {name}: the merge's share of {clock_name} time (torch.profiler)"
    run.add("", title, "", markdown_table([*columns, "share of encoding"], rows))


def quantise(model: Any) -> Any:
    """The language model's linear layers in nf4, as bitsandbytes does it; the tower is left."""
    import bitsandbytes as bnb

    language = model.model.language_model
    for parent in list(language.modules()):
        for child_name, child in list(parent.named_children()):
            if not isinstance(child, torch.nn.Linear):
                continue
            # Its own weights would be made and thrown away.
            small = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=child.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            small.weight = bnb.nn.Params4bit(
                child.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
            if child.bias is not None:
                small.bias = child.bias
            setattr(parent, child_name, small.to(child.weight.device))
    return model


def has_bitsandbytes() -> bool:
    """Whether it can be imported; a broken installation counts as missing."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception:
        return False
    return True


def one_shape(run: Run, name: str, until: float) -> None:
    """Speed of a shape and what merging is of it; its memory is given back however that ends."""
    model = run.build(name)
    try:
        speed(run, name, model, until)
    finally:
        share(run, name, model)


def steps(run: Run) -> None:
    """Everything, in order of importance."""
    shapes = run.options.shapes.split(",")
    with run.step("Against the CPU", 0):
        correctness(run)
    with run.step("Choosing tokens after the tower", 10):
        selection(run)
    with run.step("Proportional attention", 10):
        ways(run)
    with run.step("Kernels of the language model", 40):
        language_kernels(run, shapes[0])
    for number, name in enumerate(shapes, start=1):
        with run.step(name, 30):
            # Where little is left, shapes go before serving.
            kept = SECONDS if has_vllm() and run.left > SECONDS + 120 else 0
            # Every further shape gets as much of the time as the first ones left it.
            free = max(0.0, run.left - kept)
            one_shape(run, name, run.left - free * 0.6 / (len(shapes) - number + 1))
    with run.step("vLLM under load", 0):
        serving(run, shapes[0])
    with run.step("nf4", 60):
        if has_bitsandbytes():
            left = 0.5 * run.left
            speed(run, shapes[0], quantise(run.build(shapes[0])), left, title=f"{shapes[0]}-nf4")
        else:
            run.add("", "## nf4", "", "Left out: bitsandbytes is missing.")
    # Last, as what compiles may take minutes.
    with run.step("Attention", 30):
        attention(run, shapes[0])


def main() -> int:
    """Measure and write; 1 where a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="llava-1.5-7b,qwen2.5-vl-7b")
    parser.add_argument("--tokens", default="288,192,144,64", help="compared with all 576")
    parser.add_argument("--algorithms", default="pitome_plus")
    parser.add_argument("--batches", default="1,8,32", help="the largest that fits is added")
    parser.add_argument("--attention", default=",".join(ATTENTION), help="variants to time")
    parser.add_argument("--kernels", default="flash_attention_2", help="compared with sdpa")
    parser.add_argument("--served", help="checkpoint for vLLM; default: the first shape, random")
    parser.add_argument(
        "--vllm",
        default="--load-format dummy --gpu-memory-utilization 0.42 --max-model-len 2048",
        help="options of vLLM's servers, one string; two of them share the device",
    )
    parser.add_argument("--requests", type=int, default=64, help="to vLLM in a round")
    parser.add_argument("--exact", default="tiny,tiny-next", help="shapes compared with the CPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=540, help="stop starting things after")
    parser.add_argument("--out", type=Path, required=True)
    run = Run(parser.parse_args())
    known = in_words(machine(run.options.device) | versions())
    run.add("# Measured by scripts/speed/gpu_bench.sh", "", f"{known}, {run.options.dtype}.")
    with contextlib.suppress(OutOfTimeError):
        steps(run)
    run.add("", f"{time.monotonic() - run.started:.0f} s in all.")
    print("\n".join(run.sections))
    return int(bool(run.failed))


if __name__ == "__main__":
    raise SystemExit(main())
