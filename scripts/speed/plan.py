"""Time and memory of one plan against the number of tokens, 64 to 16384.

    python -m scripts.speed.plan                                  # everything, about 20 minutes
    python -m scripts.speed.plan --what time --series pitome tome # on an idle machine, in parts
    python -m scripts.speed.plan --what report                    # tables and plot again

Only the decision is measured: which tokens merge, given what they are compared by (a resampling
decides nothing and is carried out). Time is the
median of several calls after a warm-up, all points of a series in one process. Memory is how far
the resident set rises above what is resident before the call (keys included), the call being the
first large one of a fresh process; the largest size is repeated in several processes, because the
allocator does not give back the same memory every time. Random keys; nothing depends on them but
rounding. Rows are added to the JSON file, rows of the same series and size are replaced.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pitome_vlm.common import install_hint
from pitome_vlm.measure.provenance import provenance
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.algorithm import MergeContext, make_plan
from pitome_vlm.merge.config import MergeConfig

OUT = Path(__file__).resolve().parents[2] / "eval" / "results" / "performance"
COUNTS = [2**power for power in range(6, 15)]
LIMIT_MIB = 256
KEY_WIDTH, HIDDEN_WIDTH = 64, 1024


@dataclass(frozen=True)
class Series:
    """One line of the plot: an algorithm, what it compares, and how far it reduces."""

    algorithm: str
    width: int
    share: float
    at_projector: bool = False

    def plan(self, keys: torch.Tensor, attention: torch.Tensor) -> None:
        """Decide once; what it decides is not looked at."""
        n_out = max(1, int(keys.shape[1] * self.share))
        config = MergeConfig(tokens=n_out, algorithm=self.algorithm)
        context = MergeContext(
            config, layer=1, depth=0.2, at_projector=self.at_projector, cls_attention=attention
        )
        make_plan(algorithms.get(self.algorithm), keys, n_out, ctx=context)


def all_series() -> dict[str, Series]:
    """Every algorithm that costs something, by what it compares by default (CLIP-L's widths)."""
    found = {}
    for name in algorithms.available():
        algorithm = algorithms.get(name)
        if algorithm.compares and name not in ("none", "pitome_plus"):
            width = KEY_WIDTH if algorithm.metric == "keys" else HIDDEN_WIDTH
            # The most that a pairwise step can do; selections leave a quarter.
            share = 0.5 if algorithm.pairwise else 0.25
            found[name] = Series(name, width, share)
    for width in (KEY_WIDTH, HIDDEN_WIDTH):
        found[f"pitome_plus, tower, {width}-d"] = Series("pitome_plus", width, 0.5)
    found["pitome_plus, projector"] = Series("pitome_plus", HIDDEN_WIDTH, 0.25, at_projector=True)
    return found


def inputs(series: Series, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, n_tokens, series.width, generator=generator)
    return keys, torch.rand(1, n_tokens, generator=generator)


def status(field: str) -> float:
    """A field of /proc/self/status in MiB (VmRSS: resident now, VmHWM: its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def memory(series: Series, n_tokens: int) -> float:
    """Rise of the resident set in MiB; meant for a process that has done nothing else."""
    keys, attention = inputs(series, n_tokens)
    # Libraries load and set up on the first call.
    series.plan(keys[:, :64], attention[:, :64])
    # The peak so far belongs to the imports.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    series.plan(keys, attention)
    return status("VmHWM") - before


def milliseconds(series: Series, n_tokens: int, most: float) -> dict[str, Any]:
    keys, attention = inputs(series, n_tokens)
    times: list[float] = []
    # The largest take many seconds a call; there the first one counts as well.
    warm_up = min(n_tokens, 4096)
    series.plan(keys[:, :warm_up], attention[:, :warm_up])
    while len(times) < 20 and (len(times) < 3 or sum(times) < most * 1e3):
        start = time.perf_counter()
        series.plan(keys, attention)
        times.append((time.perf_counter() - start) * 1e3)
    return {"ms": statistics.median(times), "calls": len(times)}


def in_fresh_process(name: str, n_tokens: int, threads: int) -> float:
    words = [sys.executable, "-m", __spec__.name, "--one", name, str(n_tokens)]
    words += ["--threads", str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} at {n_tokens} tokens failed:\n{done.stderr.strip()}")
    return float(done.stdout)


def circumstances() -> dict[str, Any]:
    """What the rows of one file have in common; the C library decides what memory stays taken."""
    fixed = {"dtype": "float32", "batch": 1, "seed": 0, "libc": " ".join(platform.libc_ver())}
    return provenance(**fixed)


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"time": [], "memory": []}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found


def store(path: Path, found: dict[str, Any], kind: str, row: dict[str, Any]) -> None:
    """Put a row in, and the file away: hours of measuring must survive an interruption."""
    same = [r for r in found[kind] if (r["series"], r["tokens"]) != (row["series"], row["tokens"])]
    found[kind] = sorted([*same, row], key=lambda r: (r["series"], r["tokens"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def markdown(found: dict[str, Any]) -> str:
    where = found["hardware"]
    kind = where.get("instructions", "instructions not recorded")
    lines = [
        "# What a plan costs against the number of tokens",
        "",
        f"`python -m scripts.speed.plan`: {where['hardware']} ({kind}), "
        f"{where['threads']} thread(s), "
        f"{where['dtype']}, batch {where['batch']}, seed {where['seed']}, Python "
        f"{where['python']}, torch {where['torch']}, {where['libc']}, pitome_vlm "
        f"{where['pitome_vlm']}.",
        "",
        "64-d are attention keys averaged over heads, 1024-d the hidden states of CLIP-L. Pairwise "
        "algorithms merge half of the tokens, the others leave a quarter. Up to 4096 tokens all "
        "cosines are one matrix, beyond they are made piece by piece. Algorithms that compare "
        "nothing (`pool`, `none`) are left out.",
    ]
    tables = (
        ("time", "ms", "Time of one plan in ms (median)"),
        ("memory", "mib", f"Memory above the keys in MiB; limit at 16384: {LIMIT_MIB}"),
    )
    for kind, field, title in tables:
        rows = found[kind]
        if not rows:
            continue
        counts = sorted({row["tokens"] for row in rows})
        lines += ["", f"## {title}", "", "| algorithm | " + " | ".join(map(str, counts)) + " |"]
        lines += ["|---|" + "---:|" * len(counts)]
        for name in sorted({row["series"] for row in rows}):
            width = found["series"][name]["width"]
            label = name if f"{width}-d" in name else f"{name}, {width}-d"
            cells = {row["tokens"]: cell(row, field) for row in rows if row["series"] == name}
            lines.append(f"| {label} | " + " | ".join(cells.get(n, "") for n in counts) + " |")
    fresh = max(len(row["mib"]) for row in found["memory"]) if found["memory"] else 0
    lines += ["", f"A range is the least and the most of {fresh} fresh processes.", ""]
    return "\n".join(lines)


def cell(row: dict[str, Any], field: str) -> str:
    values = row[field] if isinstance(row[field], list) else [row[field]]
    shown = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in values]
    low, high = shown[values.index(min(values))], shown[values.index(max(values))]
    return low if low == high else f"{low}..{high}"


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = zip(figure.subplots(1, 2), (("time", "ms"), ("memory", "mib")), strict=True)
    names = sorted(found["series"])
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
    for axes, (kind, field) in panels:
        for index, name in enumerate(names):
            rows = [row for row in found[kind] if row["series"] == name]
            high = [max(r[field]) if isinstance(r[field], list) else r[field] for r in rows]
            axes.plot(
                [row["tokens"] for row in rows],
                # Nothing measurable is no point on a logarithmic axis.
                [max(value, 0.1) for value in high],
                color=colours[index % len(colours)],
                marker="os^Dv*PXhp<>"[index % 12],
                ls=("-", "--")[index // len(colours)],
                ms=4,
                lw=1.2,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes.set_xlabel("tokens")
        axes.axvline(4096, color="0.7", lw=1, ls=":")
        axes.grid(alpha=0.25)
    first, second = figure.axes
    first.set_ylabel("ms")
    first.set_title("Time of one plan (right of the dotted line: in pieces)")
    second.set_ylabel("MiB")
    second.set_title("Memory above the keys (worst process)")
    whole = [4 * count**2 / 2**20 for count in COUNTS]
    second.plot(COUNTS, whole, color="0.5", lw=1, ls="-.", label="one N x N matrix")
    second.axhline(LIMIT_MIB, color="0.25", lw=1, ls="--", label=f"limit at 16384: {LIMIT_MIB} MiB")
    second.set_ylim(0.08, 2000)
    figure.legend(*second.get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path)


def report(found: dict[str, Any], out: Path) -> None:
    (out / "plan.md").write_text(markdown(found), encoding="utf-8")
    if not (found["time"] and found["memory"]):
        return
    try:
        draw(found, out / "plan.png")
    except ImportError:
        print(f"no plot: {install_hint('viz')}", file=sys.stderr)


def main() -> None:
    series = all_series()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=["time", "memory", "both", "report"], default="both")
    parser.add_argument("--series", nargs="+", choices=list(series), default=list(series))
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="largest number of tokens")
    parser.add_argument("--fresh", type=int, default=5, help="processes at the largest number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="about, per point timed")
    parser.add_argument("--output", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(memory(series[options.one[0]], int(options.one[1])))
        return
    if not Path("/proc/self/clear_refs").exists():
        parser.error("memory is read from /proc, which only Linux has")
    path = options.output / "plan.json"
    found = load(path)
    if options.what == "report":
        report(found, options.output)
        return
    here = circumstances()
    if found.setdefault("hardware", here) != here:
        parser.error(f"{path} was measured on something else; name another --output")
    found["series"] = {name: vars(one) for name, one in series.items()}
    for name in options.series:
        for count in [count for count in COUNTS if count <= options.most]:
            where = {"series": name, "tokens": count}
            if options.what in ("time", "both"):
                row = where | milliseconds(series[name], count, options.seconds)
                store(path, found, "time", row)
                print(row, flush=True)
            if options.what in ("memory", "both"):
                runs = options.fresh if count == COUNTS[-1] else 1
                mib = [in_fresh_process(name, count, options.threads) for _ in range(runs)]
                store(path, found, "memory", where | {"mib": mib})
                print(where | {"mib": mib}, flush=True)
    report(found, options.output)


if __name__ == "__main__":
    main()
