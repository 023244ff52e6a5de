"""What log(size) in channels of the keys costs a decoded token, by where the channels are.

    python -m scripts.speed.decode_channels            # about 3 minutes on two cores

The attention of one layer for one new token is timed at several lengths of the cache: without
channels, with the channels in the cache (what the package does), with the channels added to the
whole cache at every step, and with wide keys but narrow values in the cache. PyTorch's
`scaled_dot_product_attention` without a mask stands for a flash kernel. All ways take turns in
every round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from tqdm.auto import tqdm

from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.measure.bench import median
from pitome_vlm.measure.provenance import in_words, machine, versions
from pitome_vlm.merge.size_channels import channel_width, query_channels, with_size_channels

OUT = Path(__file__).resolve().parents[2] / "eval" / "results" / "performance"
LENGTHS = (200, 2_000, 20_000)
# (heads, key heads, width of a head) of the language models of LLaVA-1.5-7B and Qwen2-7B.
SHAPES = {"Vicuna-7B, 32 key heads": (32, 32, 128), "Qwen2-7B, 4 key heads": (28, 4, 128)}
WAYS = {
    "none": "no channels",
    "cache": "in the cache",
    "call": "added at every step",
    "keys": "keys wide, values narrow",
}
Step = Callable[[], Tensor]


def steps(shape: tuple[int, int, int], length: int, dtype: torch.dtype) -> dict[str, Step]:
    """One decoded token's attention by every way, on random numbers."""
    heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, m, width, generator=generator).to(dtype)
        for n, m in ((heads, 1), (key_heads, length), (key_heads, length))
    )
    bias = torch.randint(1, 17, (1, 1, 1, length), generator=generator).log()
    scale, wide = width**-0.5, channel_width(width)
    extra = wide - width
    _, wide_key, wide_value = with_size_channels(query, key, value, bias, scale)

    def attend(*parts: Tensor) -> Tensor:
        found = scaled_dot_product_attention(*parts, scale=scale, enable_gqa=heads != key_heads)
        return found[..., :width]

    return {
        "none": lambda: attend(query, key, value),
        "cache": lambda: attend(query_channels(query, wide), wide_key, wide_value),
        "call": lambda: attend(*with_size_channels(query, key, value, bias, scale)),
        "keys": lambda: attend(query_channels(query, wide), wide_key, pad(value, (0, extra))),
    }


def measured(ways: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every way, one per round; two rounds before them are thrown away."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn >= 2:
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUT, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, stored = [], []
    cases = [(s, d, n) for s in SHAPES for d in (torch.float32, torch.bfloat16) for n in LENGTHS]
    for name, dtype, length in tqdm(cases, unit="case"):
        kind = str(dtype).removeprefix("torch.")
        times = measured(steps(SHAPES[name], length, dtype), options.rounds)
        stored.append({"shape": name, "dtype": kind, "cached": length, "milliseconds": times})
        base = median(times["none"])
        others = [f"{median(times[way]) / base:.2f}" for way in WAYS if way != "none"]
        rows.append([name, kind, f"{length:,}", f"{base:.2f} ms", *others])
    facts = machine() | versions() | {"threads": options.threads, "rounds": options.rounds}
    columns = ["language model", "dtype", "cached tokens", *WAYS.values()]
    text = (
        "# Channels for log(size): one decoded token, attention of one layer\n\n"
        "Made by `python -m scripts.speed.decode_channels`. Medians; the first column of times is "
        "milliseconds, the others are times of it. PyTorch's kernel without a mask stands for a "
        "flash kernel.\n\n"
        f"{markdown_table(columns, rows)}\n\n"
        f"Keys and values of the cache take {channel_width(128)} channels instead of 128 "
        f"(+{100 * (channel_width(128) / 128 - 1):.2f} %) where the channels are in it.\n\n"
        f"{in_words(facts)}\n"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(options.output / "decode_channels.md", text)
    write_text(
        options.output / "decode_channels.json", json.dumps(facts | {"cases": stored}) + "\n"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
