"""Towers that the generic adapter merges inside, with and without merging, in turns.

Processor time (of all threads) against FLOPs; other processes on the machine count less than in
time by the clock. Random weights of real widths, fewer layers; nothing is downloaded.

    python -m scripts.speed.inner_towers --model siglip --output eval/results/performance/avx2

`siglip` is SigLIP-so400m under SmolVLM's projector: 27 x 27 patches of 384 pixels, 81 tokens.
`qwen2_5_vl` is Qwen2.5-VL's tower, every fourth block of which attends to the whole image of
640 x 480 pixels and the others within windows: 46 x 34 patches, 391 tokens. The order of the rows
is drawn anew in every round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters import find_adapter
from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.provenance import provenance

from ..command import command_line

ROWS = {
    "unmerged": None,
    "keep=0.25, after the tower": MergeConfig(0.25, stage="projector"),
    "keep=0.25 (default)": MergeConfig(0.25),
    "keep=0.25, all in the tower": MergeConfig(0.25, stage="tower"),
    "keep=0.25, all after layer 1": MergeConfig(0.25, stage="tower", layers=[1]),
    "keep=0.25, all in the tower, pitome": MergeConfig(0.25, stage="tower", algorithm="pitome"),
}
WORDS = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
WORDS |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}


# A model, an image, and its (height, width) where that matters.
Case = tuple[Any, dict[str, torch.Tensor], tuple[int, int] | None]


def siglip(layers: int) -> Case:
    """SigLIP-so400m's width under SmolVLM's projector."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    vision |= {"num_hidden_layers": layers, "image_size": 384, "patch_size": 14}
    config = transformers.SmolVLMConfig(
        vision_config=vision,
        text_config={"model_type": "llama", "pad_token_id": 0} | WORDS,
        scale_factor=3,
        image_token_id=127,
    )
    model = transformers.SmolVLMForConditionalGeneration(config)
    return model, {"pixel_values": torch.randn(1, 1, 3, 384, 384)}, None


def qwen2_5_vl(layers: int) -> Case:
    """The widths of Qwen2.5-VL-7B's tower."""
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": layers}
    vision |= {"out_hidden_size": 64, "fullatt_block_indexes": [*range(3, layers, 4)]}
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=WORDS | {"rope_parameters": rope}, image_token_id=127
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    rows, columns = 34, 46
    values = torch.randn(rows * columns, 3 * 2 * 14 * 14)
    inputs = {"pixel_values": values, "image_grid_thw": torch.tensor([[1, rows, columns]])}
    return model, inputs, (rows * 14, columns * 14)


MODELS: dict[str, Callable[[int], Case]] = {"siglip": siglip, "qwen2_5_vl": qwen2_5_vl}


@torch.no_grad()
def run(model: Any, inputs: dict[str, torch.Tensor], config: MergeConfig | None) -> float:
    """Milliseconds of processor time in the tower."""
    clock: list[float] = []
    tower = find_adapter(model).parts(model).vision_tower
    hooks = [
        tower.register_forward_pre_hook(lambda *_: clock.append(time.process_time())),
        tower.register_forward_hook(lambda *_: clock.append(time.process_time())),
    ]
    try:
        if config is None:
            model.model.get_image_features(**inputs)
        else:
            pitome_vlm.encode_images(pitome_vlm.wrap(model, config=config), **inputs)
    finally:
        for hook in hooks:
            hook.remove()
        pitome_vlm.unwrap(model)
    return (clock[1] - clock[0]) * 1e3


def measure(model: Any, inputs: dict[str, torch.Tensor], options: argparse.Namespace) -> Any:
    """Milliseconds of every row, all of them once per round."""
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    rounds, order = range(options.warmup + options.repeats), random.Random(0)
    for number in tqdm(rounds, unit="round", disable=not sys.stderr.isatty()):
        # So that no row always follows the same one.
        for name in order.sample(list(ROWS), len(ROWS)):
            took = run(model, inputs, ROWS[name])
            if number >= options.warmup:
                found[name].append(took)
    return found


def summary(
    model: Any, rounds: dict[str, list[float]], size: tuple[int, int] | None
) -> list[dict[str, Any]]:
    """Medians; ratios are medians of the ratios within a round."""
    whole, found = costs(model, image_size=size).tower_flops, []
    for name, config in ROWS.items():
        pairs = zip(rounds[name], rounds["unmerged"], strict=True)
        low, middle, high = statistics.quantiles((own / base for own, base in pairs), n=4)
        if config is not None:
            pitome_vlm.wrap(model, config=config)
        steps = pitome_vlm.describe(model, image_size=size).tower_steps if config else ()
        found.append(
            {
                "name": name,
                "tower_ms": statistics.median(rounds[name]),
                "time_ratio": middle,
                "time_ratio_iqr": [low, high],
                "flops_ratio": costs(model, image_size=size).tower_flops / whole,
                "steps": [list(step) for step in steps],
            }
        )
        pitome_vlm.unwrap(model)
    return found


def markdown(found: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{about['model']}, {about['layers']} layers; {about['hardware']} "
        f"({about['instructions']}), {about['threads']} thread(s), {about['dtype']}, batch 1, "
        f"{about['repeats']} rounds in turns, torch {about['torch']}, "
        f"transformers {about['transformers']}",
        "",
        "| | layer: tokens | tower, processor ms | time / unmerged time (quartiles) | "
        "FLOPs ratio |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        steps = ", ".join(f"{layer}: {a} to {b}" for layer, a, b in one["steps"])
        low, high = one["time_ratio_iqr"]
        lines.append(
            f"| {one['name']} | {steps} | {one['tower_ms']:.0f} | {one['time_ratio']:.3f} "
            f"({low:.3f} to {high:.3f}) | {one['flops_ratio']:.3f} |"
        )
    return "\n".join(lines)


def main(say: Callable[[str], Any] = print) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="siglip", choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder of inner_tower_<model>.json, .md")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2 (quartiles are shown), got {options.repeats}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, inputs, size = MODELS[options.model](options.layers)
    dtype = getattr(torch, options.dtype)
    model = model.to(dtype).eval()
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    rounds = measure(model, inputs, options)
    given = {name: value for name, value in vars(options).items() if name != "output"}
    about = {"command": command_line(), **provenance(), **given}
    found = summary(model, rounds, size)
    text = markdown(found, about)
    say(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        target = options.output / f"inner_tower_{options.model}.json"
        values = {"about": about, "rows": found, "rounds_ms": rounds}
        target.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
