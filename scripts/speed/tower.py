"""The vision tower of LLaVA-1.5 (CLIP-L/336) with and without merging, in turns.

Time against FLOPs, and what merging itself costs: plan, apply, and the log-size mask of
proportional attention. Random weights of the real shape; nothing is downloaded.

    python -m scripts.speed.tower --dtype float32 --threads 1 --output eval/results/performance

Two limits are checked for the algorithms named in --gate: merging takes at most 3 % of
the tower it runs in, and the tower takes at most its share of FLOPs (those of merging left out)
plus 3 points of the unmerged one's time. The exit code is 1 where one is missed.

The column "truncation only" is the same tower with as many tokens in every layer, the rest cut off:
no decision, no means, no sizes. Where that already takes more than its share of the
FLOPs, no way of merging can meet the second limit: layers of few tokens are slower than of many.
The order of the rows is drawn anew in every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.bench import configuration
from pitome_vlm.measure.bench.clock import Clock
from pitome_vlm.measure.provenance import provenance
from pitome_vlm.merge.algorithm import log_size_bias
from pitome_vlm.merge.merge_pass import MergePass
from pitome_vlm.wrapping.wrap import merging_of, schedule_of

from ..command import command_line

KEEPS = (0.5, 0.25, 0.11)
MERGE_LIMIT, TIME_LIMIT = 0.03, 0.03
FREE = "truncation only: "


@dataclasses.dataclass
class Row:
    """One way to run the tower."""

    name: str
    config: MergeConfig | None = None
    tower: list[float] = dataclasses.field(default_factory=list)
    merge: list[float] = dataclasses.field(default_factory=list)
    flops: int = 0
    merge_flops: int = 0
    other: float = 0.0
    free: bool = False


class FreePass(MergePass):
    """As many tokens in every layer, but cut off: what is left of the time if merging were free."""

    @classmethod
    def of(cls, other: MergePass) -> FreePass:
        """The same pass, free."""
        given = {f.name: getattr(other, f.name) for f in dataclasses.fields(MergePass) if f.init}
        return cls(**given)

    @property
    def compares_keys(self) -> bool:
        """Nothing is compared, so no keys are averaged."""
        return False

    def wants_attention(self, layer: int) -> bool:
        """Nothing is ranked."""
        del layer
        return False

    def merge_in_layer(
        self,
        layer: int,
        hidden: torch.Tensor,
        metric: torch.Tensor,
        cls_attention: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The first tokens, as the layout after a merge; records nothing."""
        del metric, cls_attention
        left = dict(self.schedule.tower).get(layer)
        if left is None:
            return hidden
        return hidden[:, : self.schedule.n_leading + left].contiguous()

    def tower_map(self, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Nobody went anywhere; for what follows on the features only the shape counts."""
        every = torch.zeros(batch, self.schedule.tokens_in, dtype=torch.int64, device=device)
        return every, every[:, : self.schedule.tower_out]


def clip_l(dtype: torch.dtype) -> Any:
    """LLaVA-1.5's tower and projector with one small language layer."""
    tower = configuration("llava-1.5-7b").vision_config
    words = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    config = LlavaConfig(vision_config=tower, text_config=words, image_token_index=31999)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def rows_to_measure(algorithms: list[str], keeps: list[float]) -> list[Row]:
    """The untouched tower, it without the layer nobody reads, and every algorithm and budget."""
    rows = [
        Row("unmerged"),
        Row("unmerged, last layer skipped", MergeConfig(1.0, skip_unused_layers=True)),
    ]
    for name in algorithms:
        for keep in keeps:
            # Where it merges by default; what is left to do after the tower is not timed.
            rows.append(Row(f"{name} {keep}", MergeConfig(keep, algorithm=name)))
    for row in rows[2:]:
        rows.append(dataclasses.replace(row, name=FREE + row.name, free=True, tower=[], merge=[]))
    return rows


@torch.no_grad()
def other_ms(model: Any, row: Row, options: argparse.Namespace) -> float:
    """What merging adds to a layer's own attention: the log-size mask, and mean keys.

    Attention alone, with and without, in turns: within a whole tower the difference is smaller
    than the noise.
    """
    assert row.config is not None
    base, merging = merging_of(pitome_vlm.wrap(model, config=row.config))
    schedule, by_keys = schedule_of(model), merging.plan(base).new_pass().compares_keys
    pitome_vlm.unwrap(model)
    vision, after, total = model.config.vision_config, dict(schedule.tower), 0.0
    count, masked = schedule.n_tokens, False
    for layer in range(schedule.used_layers):
        merges = layer in after
        if masked or (merges and by_keys):
            n, heads = count + schedule.n_leading, vision.num_attention_heads
            shape = (options.batch, n, heads, vision.hidden_size // heads)
            parts = [torch.randn(shape, dtype=model.dtype).transpose(1, 2) for _ in range(3)]
            sizes = torch.randint(1, 9, (options.batch, n)).float() if masked else None
            total += _added_ms(parts, sizes, merges and by_keys, options.repeats)
        masked, count = masked or merges, after.get(layer, count)
    return total


def _added_ms(
    parts: list[torch.Tensor], sizes: torch.Tensor | None, mean_keys: bool, repeats: int
) -> float:
    attend, added = torch.nn.functional.scaled_dot_product_attention, []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        attend(*parts)
        middle = time.perf_counter()
        bias = None if sizes is None else log_size_bias(sizes, parts[0].dtype)
        attend(*parts, attn_mask=bias)
        if mean_keys:
            parts[1].mean(1)
        end = time.perf_counter()
        if turn >= 2:
            added.append(((end - middle) - (middle - start)) * 1e3)
    return statistics.median(added)


@torch.no_grad()
def run(model: Any, row: Row, pixels: torch.Tensor) -> tuple[float, float]:
    """Seconds in the tower, and of them in merging."""
    clock: list[float] = []
    tower = model.model.vision_tower
    hooks = [
        tower.register_forward_pre_hook(lambda *_: clock.append(time.perf_counter())),
        tower.register_forward_hook(lambda *_: clock.append(time.perf_counter())),
    ]
    merge = 0.0
    try:
        if row.config is None:
            model.model.get_image_features(pixel_values=pixels)
        else:
            base, merging = merging_of(pitome_vlm.wrap(model, config=row.config))
            watch, plain = Clock(pixels.device), merging.plan(base).new_pass()
            own = FreePass.of(plain) if row.free else dataclasses.replace(plain, watch=watch.span)
            merging.adapter.encode(base, {"pixel_values": pixels}, own)
            merge = watch.total("merge in tower") / 1e3
    finally:
        for hook in hooks:
            hook.remove()
        pitome_vlm.unwrap(model)
    return clock[1] - clock[0], merge


def measure(model: Any, rows: list[Row], options: argparse.Namespace) -> None:
    """Fill the rows, all of them once per round."""
    for row in rows:
        if row.config is not None:
            pitome_vlm.wrap(model, config=row.config)
        found = costs(model)
        row.flops, row.merge_flops = found.tower_flops, found.merge_flops
        pitome_vlm.unwrap(model)
        if row.merge_flops and not row.free:
            row.other = other_ms(model, row, options)
    pixels = torch.randn(options.batch, 3, 336, 336, dtype=model.dtype)
    rounds, order = range(options.warmup + options.repeats), random.Random(0)
    for number in tqdm(rounds, unit="round", disable=not sys.stderr.isatty()):
        # So that no row always follows the same one.
        for row in order.sample(rows, len(rows)):
            tower, merge = run(model, row, pixels)
            if number >= options.warmup:
                row.tower.append(tower * 1e3)
                row.merge.append(merge * 1e3)


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Medians; ratios are medians of the ratios within a round."""
    found = []
    by_name = {row.name: in_turns(row, rows[0]) for row in rows}
    for row in rows:
        if row.free:
            continue
        by_round = by_name[row.name]
        low, _, high = statistics.quantiles(by_round, n=4)
        one = {
            "name": row.name,
            "tower_ms": statistics.median(row.tower),
            "time_ratio": statistics.median(by_round),
            "time_ratio_iqr": [low, high],
            "flops_ratio": (row.flops - row.merge_flops) / rows[0].flops,
            "merge_ms": statistics.median(row.merge),
        }
        if row.flops and row.merge_flops:
            one["other_ms"] = row.other
            # What costs less than nothing is noise.
            cost = one["merge_ms"] + max(0.0, row.other)
            one["overhead_share"] = cost / one["tower_ms"]
            free = by_name[FREE + row.name]
            low, middle, high = statistics.quantiles(free, n=4)
            one["free_ratio"], one["free_ratio_iqr"] = middle, [low, high]
        found.append(one)
    return found


def in_turns(row: Row, base: Row) -> list[float]:
    """Time over that of another row in the same round."""
    return [a / b for a, b in zip(row.tower, base.tower, strict=True)]


def missed(found: list[dict[str, Any]], gated: list[str]) -> list[str]:
    """The limits that do not hold, as sentences."""
    lines = []
    for one in found:
        if "overhead_share" not in one or one["name"].split()[0] not in gated:
            continue
        if one["overhead_share"] > MERGE_LIMIT:
            lines.append(f"{one['name']}: merging takes {one['overhead_share']:.1%} of the tower")
        over = one["time_ratio"] - one["flops_ratio"]
        if over > TIME_LIMIT:
            free = one["free_ratio"] - one["flops_ratio"]
            lines.append(
                f"{one['name']}: time is {100 * over:.1f} points above the FLOPs, "
                f"{100 * free:.1f} if merging were free"
            )
    return lines


def markdown(found: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{about['hardware']} ({about['instructions']}), {about['threads']} thread(s), "
        f"{about['dtype']}, batch {about['batch']}, "
        f"{about['repeats']} rounds in turns, torch {about['torch']}, "
        f"transformers {about['transformers']}",
        "",
        "| | tower ms | time / unmerged time (quartiles) | truncation only | FLOPs ratio | "
        "plan + apply ms | mask, mean keys ms | merging / tower |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        low, high = one["time_ratio_iqr"]
        own, free = "| | |", ""
        if "overhead_share" in one:
            own = f"{one['merge_ms']:.1f} | {one['other_ms']:.1f} | {one['overhead_share']:.1%} |"
            least, most = one["free_ratio_iqr"]
            free = f"{one['free_ratio']:.3f} ({least:.3f} to {most:.3f})"
        lines.append(
            f"| {one['name']} | {one['tower_ms']:.1f} | {one['time_ratio']:.3f} "
            f"({low:.3f} to {high:.3f}) | {free} | {one['flops_ratio']:.3f} | {own}"
        )
    return "\n".join(lines)


def main(say: Callable[[str], Any] = print) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--algorithms", default="pitome,pitome_plus")
    parser.add_argument("--gate", default="pitome_plus", help="algorithms the limits are for")
    parser.add_argument("--keep", default=",".join(map(str, KEEPS)))
    parser.add_argument("--output", type=Path, help="folder of tower_<dtype>_<threads>.json, .md")
    options = parser.parse_args()
    algorithms, gated = options.algorithms.split(","), options.gate.split(",")
    if not set(gated) <= set(algorithms):
        parser.error(f"--gate {options.gate}: only what --algorithms names is measured")
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2 (quartiles are shown), got {options.repeats}")
    torch.set_num_threads(options.threads)
    model = clip_l(getattr(torch, options.dtype))
    rows = rows_to_measure(algorithms, [*map(float, options.keep.split(","))])
    measure(model, rows, options)
    found = summary(rows)
    about = {
        "command": command_line(),
        **provenance(),
        **{n: v for n, v in vars(options).items() if n not in ("output", "keep", "algorithms")},
    }
    text, failed = markdown(found, about), missed(found, gated)
    say(text)
    say("\n".join(["", *failed]) if failed else f"\nlimits hold for {options.gate}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"tower_{options.dtype}_{options.threads}"
        name += "" if options.batch == 1 else f"_batch_{options.batch}"
        rounds = {row.name: {"tower": row.tower, "merge": row.merge} for row in rows}
        values = {"about": about, "rows": found, "missed": failed, "rounds_ms": rounds}
        target = options.output / f"{name}.json"
        target.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
