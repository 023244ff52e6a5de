"""GPU part of the benchmarks: correctness, speed, memory, the merge's share, attention, nf4.

Called by gpu_bench.sh; needs PyTorch, transformers and peft only. Steps are run in this order
until --seconds are over; what was measured by then is in OUT/report.md and OUT/*.json, which are
written after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import pitome_vlm
from pitome_vlm.bench import (
    Bench,
    Budget,
    Case,
    Phases,
    Report,
    build,
    inputs_for,
    installed,
    iqr,
    median,
)
from pitome_vlm.bench.attention import time_ways
from pitome_vlm.bench.clock import Clock, watched
from pitome_vlm.bench.fits import tried_fit
from pitome_vlm.bench.report import hardware, table
from pitome_vlm.config import MergeConfig
from pitome_vlm.files import write_text

ANSWER = 16
# Of one picture in CLIP-L/336: before, half way and behind merging to a quarter.
CLIP_TOKENS = (577, 300, 145)


@dataclass
class Run:
    """What is asked for, what there is so far, and how much time is left.

    Attributes:
        options: of the command line.
        sections: of the report, Markdown.
    """

    options: argparse.Namespace
    started: float = field(default_factory=time.monotonic)
    sections: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self.options.seconds) - (time.monotonic() - self.started)

    def add(self, *lines: str) -> None:
        """Lines of the report, written at once."""
        self.sections += lines
        write_text(self.options.out / "report.md", "\n".join(self.sections) + "\n")

    def save(self, name: str, values: Any) -> None:
        """One JSON file."""
        write_text(self.options.out / f"{name}.json", json.dumps(values, indent=1) + "\n")

    def build(self, shape: str, **changes: Any) -> Any:
        """A model on the device."""
        options = {
            "layers": self.options.layers,
            "dtype": getattr(torch, self.options.dtype),
            "device": self.options.device,
        }
        return build(shape, **(options | changes))

    @contextlib.contextmanager
    def step(self, title: str, needs: float) -> Iterator[None]:
        """A step that is left out where time is short and reported where it fails."""
        if self.left < needs:
            self.add("", f"## {title}", "", f"Left out: {self.left:.0f} s were left.")
            raise OutOfTimeError
        print(f"{title} ({self.left:.0f} s left)", flush=True)
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.add("", f"## {title}", "", f"Ran out of memory: {str(error).splitlines()[0]}")
        finally:
            if self.options.device != "cpu":
                torch.cuda.empty_cache()


class OutOfTimeError(Exception):
    """The rest of the steps is left out."""


def correctness(run: Run) -> None:
    """Plans and features of the device against the CPU, float32, on the same random pictures."""
    rows, found = [], []
    for name in run.options.exact.split(","):
        for algorithm in ("pitome", "pitome_plus", "tome"):
            model = build(name, dtype=torch.float32)
            pitome_vlm.wrap(model, keep=0.25, algorithm=algorithm)
            vision = vision_inputs(model, 2)
            with torch.no_grad():
                here = pitome_vlm.encode_images(model, **vision)
                model.to(run.options.device)
                moved = {key: value.to(run.options.device) for key, value in vision.items()}
                there = pitome_vlm.encode_images(model, **moved)
            same = [
                torch.equal(a, b.cpu())
                for a, b in zip(here.source_maps, there.source_maps, strict=True)
            ]
            apart = [
                float((a - b.cpu()).norm() / a.norm())
                for a, b, equal in zip(here.features, there.features, same, strict=True)
                if equal
            ]
            worst = f"{max(apart):.1e}" if apart else "-"
            rows.append([name, algorithm, f"{sum(same)} of {len(same)}", worst])
            found.append({"shape": name, "algorithm": algorithm, "same": same, "apart": apart})
    run.save("correctness", found)
    columns = ["shape", "algorithm", "equal plans", "largest ‖device - cpu‖ / ‖cpu‖ of features"]
    run.add("", "## Against the CPU, float32", "", table(columns, rows))


def vision_inputs(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """Pixels of random pictures, and what belongs to them."""
    inputs = inputs_for(model, Case(batch))
    return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}


def budgets_of(options: argparse.Namespace) -> list[Budget]:
    """The untouched model and every algorithm at every number of tokens."""
    found = [Budget("none")]
    for count in map(int, options.tokens.split(",")):
        for name in options.algorithms.split(","):
            config = MergeConfig(tokens=count, algorithm=name)
            found.append(Budget(f"{name} tokens={count}", config))
    return found


def speed(run: Run, name: str, model: Any, until: float, title: str = "") -> None:
    """Every batch size under every budget, in turns, then the largest batch of every budget."""
    options, budgets = run.options, budgets_of(run.options)
    setup = {"dtype": options.dtype, "layers": options.layers or "all", "attention": "sdpa"}
    report = Report(title or name, [], ["random weights"], setup=setup)
    for batch in map(int, options.batches.split(",")):
        try:
            bench = Bench(model, budgets, Case(batch, 64, ANSWER))
            report.results.append(bench.results)
            timed_rounds(run, bench, until)
        except torch.OutOfMemoryError:
            report.notes.append(f"batch {batch} and larger: out of memory for at least one budget")
            break
        if bench.results[0].repeats < options.repeats:
            report.notes.append(f"batch {batch}: {bench.results[0].repeats} rounds, out of time")
            break
    largest: list[Phases] = []
    if options.device != "cpu":
        memory = torch.cuda.get_device_properties(model.device).total_memory
        for result in report.results[0]:
            if run.left < until:
                report.notes.append(f"largest batch of {result.budget.name}: out of time")
                break
            report.fits[result.budget.name], timed = tried_fit(model, result, memory)
            largest += [] if timed is None else [timed]
    report.save(options.out / f"{title or name}.json")
    run.add("", f"## {title or name}", "", rates(report, largest), "", report.markdown(), "")
    run.add(*(f"- {note}" for note in report.notes))


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
    return f"Answers of {ANSWER} tokens.\n\n" + table([*columns], rows)


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
    for budget in budgets_of(run.options)[1:]:
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
    columns = ["budget", "tower ms", "of it merge", "merge behind it", "share of tower"]
    clock_name = "CPU" if on_cpu else "device"
    run.save(f"share-{name}", [dict(zip([*columns, "of all"], row, strict=True)) for row in rows])
    title = f"## {name}: the merge's share of {clock_name} time (torch.profiler)"
    run.add("", title, "", table([*columns, "share of encoding"], rows))


def as_built(model: Any) -> None:
    """Nothing: models are built with sdpa."""
    del model


def eager(model: Any) -> None:
    """Attention written out."""
    model.set_attn_implementation("eager")


def compiled(model: Any) -> None:
    """The tower through torch.compile, in place."""
    model.model.vision_tower.compile()


# How the tower attends: name -> what is done to a freshly built and wrapped model. Ways of
# proportional attention alone: `ways`.
ATTENTION: dict[str, Callable[[Any], None]] = {
    "sdpa": as_built,
    "eager": eager,
    "compile": compiled,
}


def attention(run: Run, name: str) -> None:
    """Encoding at a quarter of the tokens, by how the tower attends, beside the untouched tower."""
    rows = []
    batch = int(run.options.batches.split(",")[-1])
    for variant in run.options.attention.split(","):
        for keep in (None, 0.25):
            if run.left < 30:
                rows.append([variant, "left out: out of time", ""])
                continue
            try:
                times = encode_times(run, name, ATTENTION[variant], keep, batch)
            except Exception as error:  # whatever a compiler or kernel says belongs in the report
                reason = str(error).splitlines()[0][:120] if str(error) else ""
                rows.append([variant, f"failed: {type(error).__name__}: {reason}", ""])
                continue
            what = "untouched" if keep is None else f"keep={keep}"
            rows.append([variant, what, f"{median(times):.2f} ±{iqr(times):.2f}"])
    title = f"## {name}: encoding {batch} pictures, by attention of the tower"
    run.save(f"attention-{name}", rows)
    run.add("", title, "", table(["attention", "budget", "ms"], rows))


@torch.no_grad()
def encode_times(
    run: Run, name: str, change: Callable[[Any], None], keep: float | None, batch: int
) -> list[float]:
    """Milliseconds of encoding, one entry per round."""
    model = run.build(name, layers=1)
    if keep is not None:
        pitome_vlm.wrap(model, keep=keep)
    change(model)
    vision, times = vision_inputs(model, batch), []

    def encode() -> None:
        if keep is None:
            model.model.get_image_features(**vision)
        else:
            pitome_vlm.encode_images(model, **vision)

    for done in range(3 + run.options.repeats):
        clock = Clock(torch.device(run.options.device))
        with clock.span("encode"):
            encode()
        clock.synchronize()
        if done >= 3:
            times.append(clock.total("encode"))
    return times


def ways(run: Run) -> None:
    """Proportional attention at CLIP-L's shapes: as a mask, as channels, in flex attention."""
    device, dtype = torch.device(run.options.device), getattr(torch, run.options.dtype)
    batch, rows = int(run.options.batches.split(",")[-1]), []
    for tokens in CLIP_TOKENS:
        found = time_ways(
            device,
            dtype,
            (batch, 16, tokens, 64),
            run.options.repeats,
            compile_flex=device.type != "cpu",
        )
        for name, times in found.items():
            if isinstance(times, str):
                rows.append([str(tokens), name, f"failed: {times}"])
            else:
                rows.append([str(tokens), name, f"{median(times):.3f} ±{iqr(times):.3f}"])
    run.save("proportional", rows)
    title = f"## Proportional attention, {batch} x 16 heads x N x 64"
    run.add("", title, "", table(["N", "way", "ms"], rows))


def quantise(model: Any) -> Any:
    """The language model's linear layers in nf4, as bitsandbytes does it; the tower is left."""
    import bitsandbytes as bnb

    language = model.model.language_model
    for parent in list(language.modules()):
        for child_name, child in list(parent.named_children()):
            if not isinstance(child, torch.nn.Linear):
                continue
            small = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=child.weight.dtype,
                quant_type="nf4",
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


def steps(run: Run) -> None:
    """Everything, in order of importance."""
    shapes = run.options.shapes.split(",")
    with run.step("Against the CPU", 0):
        correctness(run)
    for number, name in enumerate(shapes, start=1):
        with run.step(name, 30):
            # Every further shape gets as much of the time as the first ones left it.
            until = run.left * (1 - 0.6 / (len(shapes) - number + 1)) if run.left > 0 else 0
            model = run.build(name)
            speed(run, name, model, until)
            share(run, name, model)
            del model
    with run.step("Attention", 30):
        attention(run, shapes[0])
        ways(run)
    with run.step("nf4", 40):
        if has_bitsandbytes():
            speed(run, shapes[0], quantise(run.build(shapes[0])), 5, title=f"{shapes[0]}-nf4")
        else:
            run.add("", "## nf4", "", "Left out: bitsandbytes is missing.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="llava-1.5-7b,llava-1.5-13b")
    parser.add_argument("--tokens", default="288,192,144,64", help="beside all 576")
    parser.add_argument("--algorithms", default="pitome_plus")
    parser.add_argument("--batches", default="1,8,32", help="the largest that fits is added")
    parser.add_argument("--attention", default=",".join(ATTENTION), help="variants to time")
    parser.add_argument("--exact", default="tiny,tiny-next", help="shapes compared with the CPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=540, help="stop starting things after")
    parser.add_argument("--out", type=Path, required=True)
    run = Run(parser.parse_args())
    known = ", ".join(f"{name} {value}" for name, value in hardware().items())
    run.add("# Measured by scripts/gpu_bench.sh", "", f"{known}, {run.options.dtype}.")
    with contextlib.suppress(OutOfTimeError):
        steps(run)
    run.add("", f"{time.monotonic() - run.started:.0f} s in all.")
    print("\n".join(run.sections))


if __name__ == "__main__":
    main()
