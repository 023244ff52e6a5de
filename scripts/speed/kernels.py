"""Kernels of LLaVA-1.5's vision tower with and without merging; no GPU is needed, nothing is timed.

    python -m scripts.speed.kernels
    python -m scripts.speed.kernels --keep 0.25,0.11 --algorithms pitome --dtype bfloat16

CLIP-L/336's 24 layers and 577 tokens, by default 16 channels wide: the width changes no count, but
the bytes (--width 1024 is the real one). A kernel is an operator that computes a tensor
(`pitome_vlm.measure.kernels`). "tower": its layers and the steps in them; "steps": plan and apply
in the tower, the most of one in brackets, and what they read and write; "after it": what is merged
on the features, the projector, and who went where. The last is counted on PyTorch's meta device,
because on a CPU the greedy selection runs in NumPy; "with one kernel": as on a CPU, with one kernel
for the selection, which is what `compile=True` runs on a GPU; "in all": tower and after it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import pitome_vlm
from pitome_vlm.common import markdown_table
from pitome_vlm.measure.kernels import KernelCount
from pitome_vlm.wrapping.wrap import is_wrapped, observed


def narrow_tower(width: int = 16) -> Any:
    """A LLaVA whose tower has CLIP-L/336's layers and tokens, and few channels."""
    tower = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=max(1, width // 64),
        num_hidden_layers=24,
        image_size=336,
        patch_size=14,
    )
    words = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    config = LlavaConfig(vision_config=tower, text_config=words, image_token_index=31999)
    return LlavaForConditionalGeneration._from_config(config).eval()


class Parts:
    """Kernels of one encoding, and of the parts of it that merge inside the tower."""

    def __init__(self, model: Any, pixels: torch.Tensor) -> None:
        self.steps: list[KernelCount] = []
        self.tower = 0
        with torch.no_grad(), KernelCount() as self.whole:
            self._run(model, pixels)

    def _run(self, model: Any, pixels: torch.Tensor) -> None:
        before, after = [], []
        tower = model.model.vision_tower
        hooks = [
            tower.register_forward_pre_hook(lambda *_: before.append(self.whole.total)),
            tower.register_forward_hook(lambda *_: after.append(self.whole.total)),
        ]
        try:
            if is_wrapped(model):
                with observed(model, self._watch):
                    pitome_vlm.encode_images(model, pixels)
            else:
                model.model.get_image_features(pixel_values=pixels)
        finally:
            for hook in hooks:
                hook.remove()
        self.tower = after[0] - before[0]

    @contextlib.contextmanager
    def _watch(self, name: str) -> Iterator[None]:
        if name != "merge in tower":
            yield
            return
        with KernelCount() as found:
            yield
        if found.total:
            self.steps.append(found)


def measured(options: argparse.Namespace) -> list[list[str]]:
    """The rows of the table."""
    model = narrow_tower(options.width).to(getattr(torch, options.dtype))
    pixels = torch.zeros(options.batch, 3, 336, 336, dtype=model.dtype)
    base = Parts(model, pixels)
    rows = [_row("unmerged", base, base, base)]
    for name in options.algorithms.split(","):
        for keep in map(float, options.keep.split(",")):
            with pitome_vlm.wrapped(model, keep=keep, algorithm=name, layers=options.layers):
                here = Parts(model, pixels)
                there = Parts(copy.deepcopy(model).to("meta"), pixels.to("meta"))
                rows.append(_row(f"{name} keep={keep}", here, there, base))
    return rows


def _row(name: str, one: Parts, on_meta: Parts, base: Parts) -> list[str]:
    steps = [step.total for step in one.steps]
    return [
        name,
        str(one.tower),
        f"{one.tower / base.tower:.2f}",
        f"{sum(steps)} ({max(steps)})" if steps else "-",
        f"{sum(step.bytes for step in one.steps) / 2**20:.1f}" if steps else "-",
        str(on_meta.whole.total - on_meta.tower),
        *_in_all(one, on_meta, base),
    ]


def _in_all(one: Parts, on_meta: Parts, base: Parts) -> list[str]:
    """Kernels after the tower if the greedy selection is one, and both ways of it in all.

    "-" where there is no such selection. NumPy's calls on a CPU are no kernels, so the selection is
    all that the two differ by.
    """
    without, loop = (parts.whole.total - parts.tower for parts in (one, on_meta))
    ratios = [f"{(one.tower + after) / base.whole.total:.2f}" for after in (loop, without + 1)]
    if loop == without:
        return ["-", ratios[0], "-"]
    return [str(without + 1), *ratios]


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", default="0.25")
    parser.add_argument("--algorithms", default="pitome_plus,pitome,tome")
    parser.add_argument("--layers", help="those that merge, as in 5,11; the default without")
    parser.add_argument("--width", type=int, default=16, help="channels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    if options.layers is not None:
        options.layers = tuple(map(int, options.layers.split(",")))
    columns = [
        "",
        "tower",
        "of unmerged",
        "steps",
        "MiB of the steps",
        "after it",
        "with one kernel",
        "in all, of unmerged",
        "with one kernel",
    ]
    print(markdown_table(columns, measured(options)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
