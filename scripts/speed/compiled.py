"""What `wrap(..., compile=True)` saves in LLaVA-1.5's tower, and how long its first image waits.

    python -m scripts.speed.compiled --output eval/results/performance    # some minutes of a core

Every decision that the tower makes by default is taken from a run on CLIP-L/336's shape (random
weights) and made again, plain and compiled in turns; then the whole tower runs with both in turns.
Times are processor time of the process, all its threads. The first call of a compiled decision is
timed without PyTorch's cache on disk, on one compiling thread, its C++ compiler included; the very
first one also loads PyTorch's compiler. Kernels: eager, operators that compute a tensor
(`pitome_vlm.measure.kernels`); compiled, what the generated code calls: its own functions, each of
several loops on a CPU, and operators of PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.measure.kernels import count_kernels
from pitome_vlm.measure.provenance import in_words, provenance
from pitome_vlm.merge.algorithm import Algorithm, MergeContext, make_plan
from pitome_vlm.merge.compiled import compiled_plan
from pitome_vlm.merge.merge_pass import MergePass
from pitome_vlm.merge.plan import MergePlan
from pitome_vlm.wrapping.wrap import merging_of

from ..command import command_line
from . import inner_towers
from .tower import clip_l

# Calls in generated code that compute: its own functions, and PyTorch's operators.
_OWN = re.compile(r"^\s*(?:cpp_fused\w*\(|triton_\w+\.run\()", re.M)
_EXTERN = re.compile(r"(?:extern_kernels\.\w+|torch\.ops\.(?!inductor)\w+(?:\.\w+)+)\(")
# Of a plan or a tower, in milliseconds.
Rounds = dict[str, list[float]]


@dataclasses.dataclass
class Decision:
    """The arguments of one `make_plan`."""

    algorithm: Algorithm
    keys: torch.Tensor
    n_out: int
    ctx: MergeContext

    def by(self, make: Callable[..., MergePlan]) -> MergePlan:
        """The plan of `make_plan` or `compiled_plan`."""
        return make(self.algorithm, self.keys, self.n_out, ctx=self.ctx)

    def under(self, config: MergeConfig) -> Decision:
        """The same with other options."""
        return dataclasses.replace(self, ctx=dataclasses.replace(self.ctx, config=config))

    @property
    def words(self) -> str:
        """Its layer and counts of mergeable tokens."""
        before = self.keys.shape[1] - self.ctx.n_leading
        return f"layer {self.ctx.layer}, {before} to {self.n_out}"


class Noting(MergePass):
    """A pass that keeps the arguments of its decisions."""

    noted: list[Decision]

    @classmethod
    def of(cls, other: MergePass) -> Noting:
        """The same pass."""
        given = {f.name: getattr(other, f.name) for f in dataclasses.fields(MergePass) if f.init}
        found = cls(**given)
        found.noted = []
        return found

    def _planned(self, layer: int, metric: torch.Tensor, context: MergeContext) -> MergePlan:
        n_out = dict(self.schedule.tower)[layer]
        self.noted.append(Decision(self.algorithm, metric, n_out, context))
        return super()._planned(layer, metric, context)


def decisions(model: Any, config: MergeConfig, pixels: torch.Tensor) -> list[Decision]:
    """Those of one run of the tower."""
    base, merging = merging_of(pitome_vlm.wrap(model, config=config))
    own = Noting.of(merging.plan(base).new_pass())
    merging.adapter.encode(base, {"pixel_values": pixels}, own)
    pitome_vlm.unwrap(model)
    return own.noted


def launches(code: str) -> tuple[int, int]:
    """What generated code calls: functions of its own, and operators of PyTorch."""
    body = code.split("def call(", 1)[-1].split("def benchmark_compiled_module", 1)[0]
    return len(_OWN.findall(body)), len(_EXTERN.findall(body))


def first_call(one: Decision) -> dict[str, Any]:
    """Seconds that the first compiled plan takes, and what its code calls."""
    from torch._inductor import metrics
    from torch._inductor.utils import run_and_get_code

    metrics.reset()
    clock, spent = time.perf_counter(), _processor_seconds()
    _, codes = run_and_get_code(one.by, compiled_plan)
    clock, spent = time.perf_counter() - clock, _processor_seconds() - spent
    own, operators = (sum(counts) for counts in zip(*map(launches, codes), strict=True))
    return {
        "first_call_s": clock,
        "first_call_processor_s": spent,
        "functions": own,
        "operators": operators,
        "loops": metrics.generated_kernel_count,
        "code": codes,
    }


def _processor_seconds() -> float:
    """Of this process and of its children that have ended, as the C++ compiler."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> Rounds:
    """Milliseconds of every way, once per round; whichever began comes last in the next round."""
    found: Rounds = {name: [] for name in ways}
    names = list(ways)
    for number in range(1 + rounds):
        for name in names:
            took = ways[name]()
            if number:
                found[name].append(took)
        names.reverse()
    return found


def processor_ms(work: Callable[[], Any], times: int) -> float:
    """Of one run, a mean of `times`."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times * 1e3


def middle(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4)


def ratio(rounds: Rounds) -> list[float]:
    """Quartiles of compiled over plain within a round."""
    return middle([a / b for a, b in zip(rounds["compiled"], rounds["plain"], strict=True)])


def elsewhere(assign: torch.Tensor, other: torch.Tensor) -> int:
    """Tokens of one image, [1, N] groups each, that are not with the same others in both."""
    one, two = (groups[0, :, None] == groups[0] for groups in (assign, other))
    return int((one != two).any(1).sum())


def measured_decision(one: Decision, rounds: int) -> dict[str, Any]:
    """A row about one decision."""
    found = first_call(one)
    ways = {"plain": make_plan, "compiled": compiled_plan}
    works = {name: functools.partial(one.by, make) for name, make in ways.items()}
    times = in_turns(
        {name: functools.partial(processor_ms, work, 5) for name, work in works.items()}, rounds
    )
    return {
        "decision": one.words,
        "kernels": count_kernels(works["plain"]).total,
        **found,
        "elsewhere": elsewhere(*(work().assign for work in works.values())),
        "rounds_ms": times,
    }


@torch.no_grad()
def measured(dtype: str, keep: float, options: argparse.Namespace) -> dict[str, Any]:
    """Decisions and tower at one budget in one dtype."""
    model = clip_l(getattr(torch, dtype))
    pixels = torch.randn(1, 3, 336, 336, dtype=model.dtype)
    ways = {"plain": MergeConfig(keep), "compiled": MergeConfig(keep, compile=True)}
    # Under the second one's options, so that its tower finds them compiled.
    own = [
        measured_decision(one.under(ways["compiled"]), options.rounds)
        for one in decisions(model, ways["plain"], pixels)
    ]
    inputs = {"pixel_values": pixels}
    tower = in_turns(
        {
            name: functools.partial(inner_towers.run, model, inputs, one)
            for name, one in ways.items()
        },
        options.rounds,
    )
    return {"dtype": dtype, "keep": keep, "decisions": own, "tower_rounds_ms": tower}


def every_case(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All budgets in all dtypes; nothing compiled is taken from an earlier process."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    cases, found = list(itertools.product(options.dtypes, options.keep)), []
    with fresh_cache(), config.patch(compile_threads=1):
        for dtype, keep in tqdm(cases, disable=not sys.stderr.isatty()):
            found.append(measured(dtype, keep, options))
            store_code(found[-1], options.code)
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """Two tables: decisions, and towers."""
    lines, towers = [], []
    for case in found:
        head = [case["dtype"], f"{case['keep']:g}"]
        for one in case["decisions"]:
            low, mid, high = ratio(one["rounds_ms"])
            ms = [statistics.median(one["rounds_ms"][way]) for way in ("plain", "compiled")]
            cells = [f"{ms[0]:.2f}", f"{ms[1]:.2f}", f"{mid:.2f} ({low:.2f} to {high:.2f})"]
            calls = f"{one['functions']} + {one['operators']}"
            cells += [str(one["kernels"]), calls, str(one["loops"])]
            waits = f"{one['first_call_s']:.0f} ({one['first_call_processor_s']:.0f})"
            lines.append([*head, one["decision"], *cells, waits, str(one["elsewhere"])])
        times = case["tower_rounds_ms"]
        (_, plain, _), (_, ours, _) = middle(times["plain"]), middle(times["compiled"])
        low, mid, high = ratio(times)
        share = f"{mid:.3f} ({low:.3f} to {high:.3f})"
        towers.append([*head, f"{plain:.0f}", f"{ours:.0f}", share])
    columns = ["dtype", "keep", "decision", "plain ms", "compiled ms", "compiled / plain"]
    columns += ["kernels", "functions + operators", "loops in them"]
    columns += ["first call s (processor)", "tokens in other groups"]
    tower_columns = ["dtype", "keep", "tower, plain ms", "compiled ms", "compiled / plain"]
    return f"{markdown_table(columns, lines)}\n\n{markdown_table(tower_columns, towers)}"


HEAD = """# Compiled decisions

Processor time, plain and compiled in turns: medians, and ratios within a round with their
quartiles. Loops are what inductor counts as kernels. The first call is by the clock, in brackets
processor time with the C++ compiler's; the first row's also loads PyTorch's compiler."""


def main(say: Callable[[str], Any] = print) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.25, 0.11])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, help="folder of compiled.json, .md")
    parser.add_argument("--code", type=Path, help="folder for the generated code, to read it")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2 (quartiles are shown), got {options.rounds}")
    torch.set_num_threads(options.threads)
    found = every_case(options)
    facts = provenance(batch=1, rounds=options.rounds)
    text = f"{markdown(found)}\n\n{in_words(facts)}\n\nMade by `{command_line()}`.\n"
    say(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        values = {"about": {"command": command_line(), **facts}, "cases": found}
        write_text(options.output / "compiled.json", json.dumps(values, indent=1) + "\n")
        write_text(options.output / "compiled.md", f"{HEAD}\n\n{text}")


def store_code(case: dict[str, Any], folder: Path | None) -> None:
    """Take the generated code out of a case, into files where they are wanted."""
    for number, one in enumerate(case["decisions"]):
        codes = one.pop("code")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{case['dtype']}_{case['keep']:g}_{number}.py"
            write_text(folder / name, "\n".join(codes))


if __name__ == "__main__":
    main()
