"""GPU part of the benchmarks: the CUDA path against the CPU, the merge's share, speed and memory.

Called by gpu_bench.sh. Needs PyTorch, transformers and peft only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import pitome_vlm
from pitome_vlm.bench import Budget, Case, Report, build, measure
from pitome_vlm.bench.measurement import largest_batch
from pitome_vlm.config import MergeConfig


def correctness(device: str) -> str:
    """Largest difference of features between device and CPU, and whether plans are the same."""
    lines = []
    for algorithm in ("pitome", "pitome_plus", "tome"):
        model = build("tiny", dtype=torch.float32)
        pitome_vlm.wrap(model, keep=0.25, algorithm=algorithm)
        pixels = torch.randn(4, 3, 96, 96)
        with torch.no_grad():
            here = pitome_vlm.encode_images(model, pixels)
            there = pitome_vlm.encode_images(model.to(device), pixels.to(device))
        pairs = list(zip(here.source_maps, there.source_maps, strict=True))
        same = sum(torch.equal(a, b.cpu()) for a, b in pairs)
        apart = (
            max(
                (a - b.cpu()).abs().max().item()
                for a, b, maps in zip(here.features, there.features, pairs, strict=True)
                if torch.equal(maps[0], maps[1].cpu())
            )
            if same
            else float("nan")
        )
        lines.append(
            f"- {algorithm}: {same} of {len(pairs)} plans equal, largest difference of "
            f"features with equal plans {apart:.2e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llava-1.5-7b,llava-1.5-13b")
    parser.add_argument("--tokens", default="288,192,144,64")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=540, help="stop starting cases after")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started, dtype = time.monotonic(), getattr(torch, options.dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    text = ["# Measured by scripts/gpu_bench.sh", "", "Against the CPU, float32:", ""]
    text.append(correctness(options.device))
    budgets = [Budget("none")]
    for count in options.tokens.split(","):
        for name in ("pitome", "pitome_plus"):
            config = MergeConfig(tokens=int(count), algorithm=name)
            budgets.append(Budget(config.summary(), config))
    for shape in options.shapes.split(","):
        model = build(shape, layers=options.layers, dtype=dtype, device=options.device)
        report = Report(shape, [], [f"random weights, {options.dtype}"])
        for batch in map(int, options.batches.split(",")):
            if time.monotonic() - started > options.seconds:
                report.notes.append(f"batch {batch} and larger left out: out of time")
                break
            case = Case(batch, 64, 16)
            try:
                report.results.append(measure(model, budgets, case, repeats=options.repeats))
            except torch.OutOfMemoryError:
                report.notes.append(f"batch {batch}: out of memory")
                break
        if options.device != "cpu" and time.monotonic() - started < options.seconds:
            picked = [one for one in budgets if "pitome_plus" not in one.name]
            report.largest = {one.name: largest_batch(model, one, Case()) for one in picked}
        report.save(options.out / f"{shape}.json")
        text += ["", f"## {shape}", "", report.markdown(), "", *report.notes]
        (options.out / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8")
        del model
        if options.device != "cpu":
            torch.cuda.empty_cache()
    print("\n".join(text))


if __name__ == "__main__":
    main()
