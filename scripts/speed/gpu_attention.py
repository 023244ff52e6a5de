"""The GPU benchmark's part on attention: the tower's kernels, and ways of proportional attention.

The other steps are in `gpu_bench.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import pitome_vlm
from pitome_vlm.common import markdown_table
from pitome_vlm.measure.bench import Case, inputs_for, median
from pitome_vlm.measure.bench.clock import Clock
from pitome_vlm.measure.stats import iqr

from .attention_ways import first_line, time_ways
from .gpu_run import Run, vision_inputs

# Of one image in CLIP-L/336: before, half way through and after merging to a quarter.
CLIP_TOKENS = (577, 300, 145)


def as_built(model: Any) -> None:
    """Nothing: models are built with sdpa."""
    del model


def eager(model: Any) -> None:
    """Attention written out."""
    model.set_attn_implementation("eager")


def compiled(model: Any) -> None:
    """The tower through torch.compile, in place."""
    model.model.vision_tower.compile(fullgraph=True, dynamic=False)


def graphs(model: Any) -> None:
    """The same, recorded as one CUDA graph."""
    model.model.vision_tower.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")


# How the tower attends: name -> what is done to a freshly built and wrapped model. Ways of
# proportional attention alone: `ways`.
ATTENTION: dict[str, Callable[[Any], None]] = {
    "sdpa": as_built,
    "eager": eager,
    "compile": compiled,
    "graphs": graphs,
}


# Those that compile the tower, every layer of which has a shape of its own.
COMPILED, COMPILE_SECONDS = ("compile", "graphs"), 120


def attention(run: Run, name: str) -> None:
    """Encoding at a quarter of the tokens, by the tower's kind of attention, and unmerged."""
    rows = []
    batch = int(run.options.batches.split(",")[-1])
    for variant in run.options.attention.split(","):
        for keep in (None, 0.25):
            if run.left < (COMPILE_SECONDS if variant in COMPILED else 10):
                rows.append([variant, "left out: out of time", ""])
                continue
            try:
                times = encode_times(run, name, ATTENTION[variant], keep, batch)
            except Exception as error:  # whatever a compiler or kernel says belongs in the report
                rows.append([variant, f"failed: {type(error).__name__}: {first_line(error)}", ""])
                continue
            what = "untouched" if keep is None else f"keep={keep}"
            rows.append([variant, what, f"{median(times):.2f} ±{iqr(times):.2f}"])
            run.save(f"attention-{name}", rows)
    title = f"## {name}: encoding {batch} images, by attention of the tower"
    run.save(f"attention-{name}", rows)
    run.add("", title, "", markdown_table(["attention", "budget", "ms"], rows))


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
    run.add("", title, "", markdown_table(["N", "way", "ms"], rows))


@torch.no_grad()
def language_kernels(run: Run, name: str) -> None:
    """Calibration by size channels under flash kernels, against the float mask of sdpa."""
    model = run.build(name)
    inputs, rows = inputs_for(model, Case(4)), []
    asked = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = None
    for kernel in ("sdpa", *run.options.kernels.split(",")):
        try:
            model.set_attn_implementation({"text_config": kernel})
            pitome_vlm.wrap(model, keep=0.25)
            logits = model(**inputs).logits[:, -1].float()
            times: dict[str, list[float]] = {"prefill": [], "answer of 16": []}
            for turn in range(3 + run.options.repeats):
                clock = Clock(torch.device(run.options.device))
                with clock.span("prefill"):
                    model(**inputs)
                with clock.span("answer of 16"):
                    model.generate(**inputs, **asked)
                clock.synchronize()
                for part, found in times.items():
                    found += [clock.total(part)] if turn >= 3 else []
        except Exception as error:  # whether a kernel is there and runs is what is asked here
            rows.append(
                [kernel, f"failed: {type(error).__name__}: {first_line(error)}", "", "", ""]
            )
            continue
        expected = logits if expected is None else expected
        apart = f"{float((logits - expected).norm() / expected.norm()):.1e}"
        told = str(pitome_vlm.describe(model).calibration)
        shown = [f"{median(found):.2f} ±{iqr(found):.2f}" for found in times.values()]
        rows.append([kernel, told, apart, *shown])
    run.save(f"language-kernels-{name}", rows)
    columns = ["kernel", "told to the language model", "logits apart from sdpa"]
    columns += ["prefill ms", "answer of 16 tokens ms"]
    title = f"## {name}: kernels of the language model, 4 images at keep=0.25"
    run.add("", title, "", markdown_table(columns, rows))
