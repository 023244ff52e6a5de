"""The GPU benchmark's part on correctness: plans and features of the device against the CPU's.

The other steps are in `gpu_bench.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import pitome_vlm
from pitome_vlm.common import markdown_table
from pitome_vlm.measure.bench import build

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
