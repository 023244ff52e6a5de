"""The GPU benchmark's part on correctness: what the device decides against the CPU.

The other steps are in `gpu_bench.py`.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator

import torch

import pitome_vlm
from pitome_vlm.common import markdown_table
from pitome_vlm.measure.bench import build
from pitome_vlm.measure.bench.clock import Clock
from pitome_vlm.measure.stats import iqr
from pitome_vlm.merge.similarity import Similarity

from .gpu_run import Run, vision_inputs

FEATURES_APART = {torch.float64: 1e-9, torch.float32: 1e-3}


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, which convolutions use by default and which moves near ties."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def correctness(run: Run) -> None:
    """Plans and features of the device against the CPU on the same random images.

    In float64 plans must be equal; in float32 near ties may fall otherwise.
    """
    rows, found = [], []
    for name in run.options.exact.split(","):
        for algorithm in ("pitome", "pitome_plus", "tome"):
            for dtype in (torch.float64, torch.float32):
                same, apart = compared(run, name, algorithm, dtype)
                kind = str(dtype).removeprefix("torch.")
                worst = f"{max(apart):.1e}" if apart else "-"
                rows.append([name, algorithm, kind, f"{sum(same)} of {len(same)}", worst])
                found.append(
                    {"shape": name, "algorithm": algorithm, "dtype": kind}
                    | {"same": same, "apart": apart}
                )
                limit = FEATURES_APART[dtype]
                if (dtype == torch.float64 and not all(same)) or max(apart, default=0) > limit:
                    run.failed.append(f"{name}, {algorithm}, {kind}: differs from the CPU")
    run.save("correctness", found)
    columns = ["shape", "algorithm", "dtype", "equal plans"]
    columns += ["largest ‖device - cpu‖ / ‖cpu‖ of features with equal plans"]
    run.add("", "## Against the CPU", "", markdown_table(columns, rows))


@torch.no_grad()
def compared(
    run: Run, name: str, algorithm: str, dtype: torch.dtype
) -> tuple[list[bool], list[float]]:
    """Whether the plan of each image is equal, and how far features are apart where it is."""
    model = build(name, dtype=dtype)
    pitome_vlm.wrap(model, keep=0.25, algorithm=algorithm)
    vision = vision_inputs(model, 2)
    with exact_products():
        here = pitome_vlm.encode_images(model, **vision)
        model.to(run.options.device)
        moved = {key: value.to(run.options.device) for key, value in vision.items()}
        there = pitome_vlm.encode_images(model, **moved)
    same = [
        torch.equal(a, b.cpu()) for a, b in zip(here.source_maps, there.source_maps, strict=True)
    ]
    apart = [
        float((a - b.cpu()).norm() / a.norm())
        for a, b, equal in zip(here.features, there.features, same, strict=True)
        if equal
    ]
    return same, apart


@torch.no_grad()
def selection(run: Run) -> None:
    """Choosing tokens after the tower, one at a time in a loop and in one kernel.

    Both read the same distances, so every choice must be equal. On a CPU both are the loop.
    """
    device, rows, found = torch.device(run.options.device), [], []
    for batch, n_tokens, n_out in ((1, 576, 144), (8, 576, 144), (1, 4096, 1024)):
        keys = torch.randn(batch, n_tokens, 64, generator=torch.Generator().manual_seed(0))
        similarity = Similarity(keys.to(device))
        times: dict[str, list[float]] = {"loop": [], "kernel": []}
        chosen = {}
        for turn in range(3 + run.options.repeats):
            for way, in_round in times.items():
                clock = Clock(device)
                with clock.span(way):
                    chosen[way] = similarity.farthest_first(n_out, one_kernel=way == "kernel")
                clock.synchronize()
                # The first calls compile.
                if turn >= 3:
                    in_round.append(clock.total(way))
        same = torch.equal(*chosen.values())
        if not same:
            run.failed.append(f"choosing {n_out} of {n_tokens}: the kernel differs from the loop")
        cells = [f"{statistics.median(one):.2f} ±{iqr(one):.2f}" for one in times.values()]
        rows.append([str(batch), f"{n_tokens} to {n_out}", *cells, "yes" if same else "no"])
        shape = {"batch": batch, "tokens": n_tokens, "chosen": n_out}
        found.append(shape | {"ms": times, "same": same})
    run.save("selection", found)
    columns = ["images", "tokens", "loop, ms", "one kernel, ms", "equal"]
    run.add("", "## Choosing tokens after the tower", "", markdown_table(columns, rows))
