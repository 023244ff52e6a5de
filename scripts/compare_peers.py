"""Ways to reduce visual tokens against each other, at equal tokens, in one run.

Peers are written from their papers as algorithms of ours: ToMe in the tower, selection at the end
of the tower (VisionZip), selection before the language model (DivPrune), average pooling.

    python scripts/compare_peers.py --shape llava-1.5-7b --layers 4 --tokens 144 --out FILE.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pitome_vlm.bench import Budget, Case, Report, build, measure
from pitome_vlm.bench.measurement import median
from pitome_vlm.config import MergeConfig

PEERS = ("tome", "visionzip", "divprune", "pool", "pitome", "pitome_plus")
LENGTHS = (1, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="language model layers to build")
    parser.add_argument("--tokens", type=int, default=144)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--answer", type=int, default=8, help="tokens timed for decoding")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = build(
        options.shape,
        layers=options.layers,
        dtype=getattr(torch, options.dtype),
        device=options.device,
    )
    configs = [MergeConfig(tokens=options.tokens, algorithm=name) for name in PEERS]
    budgets = [Budget("none"), *map(Budget, PEERS, configs)]
    case = Case(options.batch, 64, options.answer)
    found = measure(model, budgets, case, repeats=options.repeats, warmup=2)
    notes = [f"{options.dtype} on {options.device}, {options.layers or 'all'} language layers"]
    print("| method | tokens | tower + projector | prefill | 1 | 32 | 128 tokens (ms) |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        totals = " | ".join(f"{one.total_ms(length):.0f}" for length in LENGTHS)
        print(
            f"| {one.budget.name} | {one.tokens} | {median(one.encode):.0f} | "
            f"{one.prefill_ms:.0f} | {totals} |"
        )
    if options.out is not None:
        Report(options.shape, [found], notes).save(options.out)


if __name__ == "__main__":
    main()
