"""Which layers of the real tower merge: what is asked of its LLaVA, what a row costs, the page."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.common import markdown_table
from pitome_vlm.demo import Sample
from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.demo_benchmark import Setting, difference_intervals, family_words
from pitome_vlm.measure.provenance import in_words

from ..demo.benchmark import NO_MERGING
from ..demo.report import BASELINE, RECOMMENDED, Row
from ..speed.kernels import Parts

BUDGETS = (64, 32, 16)
# Of DINOv2-small's 12 layers; the features of the last but one are read.
USED = 11
# "2, 5 and 8": where layers 1, 3 and 5 of the demo's 7 are in a tower of 11.
LAYERS: dict[str, tuple[int, ...]] = {
    "all": tuple(range(USED)),
    "every 2nd": tuple(range(0, USED, 2)),
    "every 3rd": tuple(range(0, USED, 3)),
    "every 4th": tuple(range(0, USED, 4)),
    "2, 5 and 8": (2, 5, 8),
    "5 alone": (5,),
}


def every_row() -> list[Setting]:
    """No merging, then the default and its variants at one budget after the other."""
    found = [Setting(BASELINE, NO_MERGING)]
    for tokens in BUDGETS:
        found.append(Setting(RECOMMENDED, MergeConfig(tokens=tokens)))
        found += [
            Setting(name, MergeConfig(tokens=tokens, layers=layers))
            for name, layers in LAYERS.items()
        ]
    return found


def counted(model: Any, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """What the rows cost for one image; weights do not matter.

    Args:
        model: of `llava_model.build`, not wrapped; it is left as it was.
        settings: the rows.

    Returns:
        For each its "method", "tokens", "layers" that merge, "flops" before the first token, and
        kernels of the "tower" and "after" it (`pitome_vlm.measure.kernels`).
    """
    size, found = model.config.vision_config.image_size, []
    pixels = torch.zeros(1, 3, size, size)
    for one in settings:
        config = None if one.config == NO_MERGING else one.config
        with nullcontext() if config is None else pitome_vlm.wrapped(model, config=config):
            parts, flops = Parts(model, pixels), costs(model).total_flops
            # On a CPU the greedy selection runs in NumPy.
            there = Parts(copy.deepcopy(model).to("meta"), pixels.to("meta"))
            steps = pitome_vlm.describe(model).tower_steps if config else ()
        row = {"method": one.name, "tokens": one.budget, "layers": [step[0] for step in steps]}
        kernels = {"tower": parts.tower, "after": there.whole.total - there.tower}
        found.append(row | {"flops": flops} | kernels)
    return found


def table(samples: list[Sample], rows: list[Row], costs_of: list[dict[str, Any]]) -> str:
    """Accuracy minus that of the default at equal tokens, with what every row costs."""
    right = {(row.name, row.tokens): row.correct for row in rows}
    base, lines = costs_of[0], []
    pairs = {
        key: one - right[RECOMMENDED, key[1]]
        for key, one in right.items()
        if key[0] in LAYERS and (RECOMMENDED, key[1]) in right
    }
    ends = dict(zip(pairs, difference_intervals(samples, list(pairs.values())), strict=True))
    for cost in costs_of:
        name, tokens = cost["method"], cost["tokens"]
        key = next((k for k in right if k[0] == name and tokens in (None, k[1])), None)
        if key is None:
            continue
        minus = ""
        if key in pairs:
            low, high = ends[key]
            minus = f"{100 * pairs[key].mean():+.1f} ({low:+.1f} to {high:+.1f})"
        kernels = f"{cost['tower']} ({cost['tower'] / base['tower']:.2f})"
        flops, merging = cost["flops"] / base["flops"], ", ".join(map(str, cost["layers"]))
        cells = [str(key[1]), name, merging, f"{100 * right[key].mean():.1f}", minus]
        lines.append([*cells, f"{100 * flops:.0f}", kernels, str(cost["after"])])
    columns = ["tokens", "layers", "that merge", "right %", "minus the default", "FLOPs %"]
    shown = markdown_table([*columns, "kernels of the tower", "after it"], lines)
    return f"{shown}\n\n{family_words(len(pairs))}"


def report(
    samples: list[Sample],
    rows: list[Row],
    costs_of: list[dict[str, Any]],
    facts: dict[str, Any],
    later: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        samples: the questions.
        rows: what was measured.
        costs_of: of `counted`.
        facts: of the run.
        later: which rows other runs measured.
    """
    scenes = len({sample.scene_id for sample in samples})
    head = (
        "The LLaVA of [report.md](report.md) under the default with other layers of its tower "
        f"merging: {scenes} images of the {facts['split']} split, {len(samples)} questions. "
        "Differences are paired with the default at equal tokens. FLOPs: to the first token, in "
        "percent of no merging. Kernels: operators that compute a tensor, for one image, in "
        "brackets over those without merging; after it: merging there, projector, who went where."
    )
    told = in_words({key: value for key, value in facts.items() if key != "command"})
    foot = [told, *later, f"Made by `{facts['command']}`."]
    parts = ["# Which layers of the real tower merge", head, table(samples, rows, costs_of), *foot]
    return "\n\n".join(parts) + "\n"
