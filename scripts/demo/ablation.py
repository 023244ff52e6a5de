"""Vary one merge option at a time around the recommended settings and write the table.

    python -m scripts.demo.ablation --split val --output eval/results/ablation   # for choosing
    python -m scripts.demo.ablation --split test --output eval/results/ablation  # for reporting

Every row is the default `MergeConfig` with one thing changed, at 1/2, 1/4, 1/8 and 1/16 of the
tokens; both together ("calibration") is crossed in full, because each part alone hurts. Differences
are paired with the default on the same questions, intervals resample images. A run that was
stopped resumes with the missing rows, and those that are no longer what the package does
(`stored.py`) are measured again. Writes ablation_<split>.json and .md. `--model FOLDER
--model-name NAME` takes another checkpoint that answers the same questions.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from pitome_vlm import MergeConfig, algorithms
from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.demo.dataset import HELD_OUT, SPLIT_SCENES
from pitome_vlm.measure.demo_benchmark import Setting, ask, concatenate, difference_interval
from pitome_vlm.measure.description import describe
from pitome_vlm.measure.provenance import checkpoint_fingerprint, provenance
from pitome_vlm.merge import Algorithm, MergeContext, MergePlan
from pitome_vlm.merge.algorithm import every_pair
from pitome_vlm.merge.algorithms import pitome_plus
from pitome_vlm.merge.algorithms.pitome import EnergyOptions, energies
from pitome_vlm.merge.matching import keep_only
from pitome_vlm.merge.similarity import Similarity

from ..command import command_line
from . import spread
from .benchmark import load_model, measure_part
from .stored import CHANGES, holds, later_words, with_run

BUDGETS = (72, 36, 18, 9)
# The budget whose FLOPs are printed.
COST_AT = 36
# How a model is asked: an option of rows, not of `MergeConfig`.
ASK = "ask"
# (what is varied, its value, the options that differ from the default)
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("default", "pitome_plus, hidden states, calibrated", {}),
    ("calibration", "neither", {"size_bias": False, "positions": "compact"}),
    ("calibration", "size bias alone", {"size_bias": True, "positions": "compact"}),
    ("calibration", "mean positions alone", {"size_bias": False, "positions": "mean"}),
    ("calibration", "original positions alone", {"size_bias": False, "positions": "original"}),
    ("calibration", "size bias, original positions", {"size_bias": True, "positions": "original"}),
    ("calibration", "size bias, median positions", {"size_bias": True, "positions": "median"}),
    ("calibration", "size and distance, mean positions", {ASK: spread.ask}),
    (
        "calibration",
        "size and distance, median positions",
        {"size_bias": True, "positions": "median", ASK: spread.ask},
    ),
    ("metric", "keys", {"metric": "keys"}),
    ("proportional attention", "off", {"proportional_attention": False}),
    ("means", "unweighted", {"weighted": False}),
    ("order", "energy order (tower)", {"stage": "tower", "restore_order": False}),
    ("placement", "after the layer", {"placement": "after_layer"}),
    ("stage", "tower", {"stage": "tower"}),
    ("stage", "projector", {"stage": "projector"}),
    ("tower layers", "all seven", {"layers": tuple(range(7))}),
    ("tower layers", "all seven, share 1/3", {"layers": tuple(range(7)), "tower_share": 1 / 3}),
    ("tower layers", "1, 3 and 5", {"layers": (1, 3, 5)}),
    ("tower layers", "1, 3 and 5, share 1/3", {"layers": (1, 3, 5), "tower_share": 1 / 3}),
    ("tower layers", "0 and 2", {"layers": (0, 2)}),
    ("tower layers", "1 and 3", {"layers": (1, 3)}),
    ("tower layers", "1 and 3, share 1/2", {"layers": (1, 3), "tower_share": 0.5}),
    ("tower layers", "1 and 3, share 1/3", {"layers": (1, 3), "tower_share": 1 / 3}),
    ("tower layers", "2 and 4", {"layers": (2, 4)}),
    ("tower layers", "2 and 4, in one round", {"algorithm": "one_round", "layers": (2, 4)}),
    ("tower layers", "2 and 4, share 1/2", {"layers": (2, 4), "tower_share": 0.5}),
    ("tower layers", "2 and 4, share 1/3", {"layers": (2, 4), "tower_share": 1 / 3}),
    (
        "tower layers",
        "1 and 3, share 1/3, median positions",
        {"layers": (1, 3), "tower_share": 1 / 3, "positions": "median"},
    ),
    ("tower share", "1/2", {"tower_share": 0.5}),
    ("tower share", "3/4", {"tower_share": 0.75}),
    ("energy", "elu", {"energy": "elu"}),
    ("energy", "gaussian", {"energy": "gaussian"}),
    ("margin", "0", {"margin": 0.0}),
    ("margin", "0.45", {"margin": 0.45}),
    ("margin", "0.9", {"margin": 0.9}),
    ("algorithm", "tome", {"algorithm": "tome"}),
    ("algorithm", "tome, hidden states", {"algorithm": "tome", "metric": "hidden"}),
    ("algorithm", "pitome", {"algorithm": "pitome"}),
    ("algorithm", "pitome, hidden states", {"algorithm": "pitome", "metric": "hidden"}),
    ("algorithm", "divprune", {"algorithm": "divprune"}),
    ("algorithm", "energy_select", {"algorithm": "energy_select"}),
    ("split", "pitome, random", {"algorithm": "pitome", "metric": "hidden", "split": "random"}),
    ("split", "pitome, high/low", {"algorithm": "pitome", "metric": "hidden", "split": "high_low"}),
    ("protect", "pitome, none", {"algorithm": "pitome", "metric": "hidden", "protect": False}),
)
BASELINE = MergeConfig(keep=1.0, algorithm="none")


def keep_lowest_energy(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """What the paper's energy is worth without its matching: the least redundant tokens stay.

    Args:
        keys: [B, N, D].
        n_out: 1..N tokens of lowest energy to keep, of equal ones the earlier.
        ctx: relative depth.
    """
    similarity = Similarity(keys, ctx.pairs)
    order = energies(similarity, EnergyOptions(), ctx.depth).argsort(dim=-1, stable=True)
    return keep_only(similarity, order[:, :n_out], order[:, n_out:])


ENERGY_SELECT = Algorithm(
    name="energy_select",
    plan=keep_lowest_energy,
    source="PiToMe's energy (arXiv 2405.16148, eq. 3-4) as a selection score, ours",
    pairwise=False,
    one_step=True,
    # No attention follows the one step in the last layer.
    proportional_attention=False,
    # On the bundled model (400 validation questions) it depends on the budget: 89.0 with
    # against 64.5 without at 36 of 144 tokens, 43.8 against 49.8 at 18.
    calibrated=False,
)


def in_one_round(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """What the rounds of pitome_plus are worth: half of the tokens at once, coverage beyond that.

    Args:
        keys: [B, N, D].
        n_out: 1..N.
        ctx: relative depth, and whether the tower is over.
    """
    similarity = Similarity(keys, ctx.pairs)
    if ctx.at_projector or 2 * n_out < keys.shape[1]:
        return pitome_plus.coverage(similarity, n_out)
    return pitome_plus.matching(similarity, n_out, ctx)


ONE_ROUND = dataclasses.replace(
    pitome_plus.ALGORITHM, name="one_round", plan=in_one_round, pairs_compared=every_pair
)


def prepare(path: Path) -> tuple[Any, Any]:
    """The model of this process, which then knows all algorithms of the table."""
    for algorithm in (ENERGY_SELECT, ONE_ROUND):
        algorithms.register(algorithm)
    return load_model(path)


class Cell(NamedTuple):
    """One number of the table: the key it is stored under, the options and how to ask."""

    key: str
    setting: Setting
    answers_of: Callable[..., list[str]]

    def varies(self, groups: list[str] | None) -> bool:
        """Whether it is asked for; what all are compared with always is."""
        group = self.key.split("/")[0]
        return groups is None or group in (*groups, "unreduced", "default")


def cells() -> Iterator[Cell]:
    """Every cell of the table; the unreduced model first."""
    yield Cell("unreduced", Setting("no reduction", BASELINE), ask)
    for group, value, options in ROWS:
        chosen = {name: option for name, option in options.items() if name != ASK}
        for tokens in BUDGETS:
            config = MergeConfig.from_dict({"tokens": tokens, **chosen})
            setting = Setting(f"{group}: {value}", config)
            yield Cell(f"{group}/{value}/{tokens}", setting, options.get(ASK, ask))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", choices=HELD_OUT, default="val")
    parser.add_argument("--limit", type=int, help="first questions only")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--model", type=Path, default=None, help="another checkpoint folder")
    parser.add_argument("--model-name", help="how to call it in the report")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--rows", type=int, default=8, help="cells measured between two saves")
    parser.add_argument("--varied", nargs="+", help="measure only rows of these first columns")
    parser.add_argument("--rewrite", action="store_true", help="the table again, without a run")
    return parser.parse_args()


def started(wanted: argparse.Namespace, stored: Path, same: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run left, or nothing yet.

    Args:
        wanted: the command line.
        stored: file of the results.
        same: facts that must not differ between rows; those an old file does not name are taken
            to agree.

    Raises:
        SystemExit: they differ.
    """
    if not stored.is_file():
        return {"cells": {}, "minutes": 0.0}
    results: dict[str, Any] = json.loads(stored.read_text())
    for name, value in same.items():
        found = results["provenance"].get(name, value)
        if found != value:
            raise SystemExit(
                f"{stored} was made with {name} {found}, not {value}; give the same --model and "
                f"--limit, or another --output than {wanted.output}"
            )
    return results


def measure(wanted: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """Measure the cells that are not stored yet, saving after every few."""
    split, size = wanted.split, wanted.batch_size
    path, samples = wanted.model or checkpoint_path(), load_split(split, wanted.limit)
    same = {"questions": len(samples), "checkpoint": checkpoint_fingerprint(str(path))}
    results = started(wanted, stored, same)
    known = results["cells"]
    todo = [
        cell
        for cell in cells()
        if cell.varies(wanted.varied)
        and not (cell.key in known and holds(known[cell.key], cell.setting.config))
    ]
    pieces = [
        list(found[begin : begin + wanted.rows])
        for _, group in itertools.groupby(todo, key=lambda cell: cell.answers_of)
        for found in [list(group)]
        for begin in range(0, len(found), wanted.rows)
    ]
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(wanted.jobs, initializer=prepare, initargs=(path,)) as pool:
        for piece in tqdm(pieces, unit="save"):
            start = time.time()
            worker = functools.partial(
                measure_part,
                settings=[cell.setting for cell in piece],
                split=split,
                batch_size=size,
                answers_of=piece[0].answers_of,
            )
            outcomes = concatenate(list(pool.imap(worker, parts)))
            for cell, outcome in zip(piece, outcomes, strict=True):
                correct = "".join("01"[int(right)] for right in outcome.correct)
                results["cells"][cell.key] = {
                    "config": cell.setting.config.to_dict(),
                    "changes": len(CHANGES),
                    "tokens": outcome.tokens,
                    "correct": correct,
                }
            results["minutes"] += (time.time() - start) / 60
            facts = facts_of(wanted, prepare(path)[0], same)
            results |= with_run(results, facts, [cell.setting.name for cell in piece])
            write_text(stored, json.dumps(results, separators=(",", ":")) + "\n")
    add_costs(results["cells"], prepare(path)[0])
    write_text(stored, json.dumps(results, separators=(",", ":")) + "\n")
    return results


def add_costs(known: dict[str, Any], model: Any) -> None:
    """Count what every measured cell costs until the first token, in place."""
    for cell in cells():
        if cell.key in known:
            after = describe(model, config=cell.setting.config).after
            known[cell.key]["flops"] = after.total_flops


def facts_of(wanted: argparse.Namespace, model: Any, same: dict[str, Any]) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    split, size = wanted.split, wanted.batch_size
    facts = provenance(model, split=split, scenes=SPLIT_SCENES[split], batch_size=size, **same)
    facts |= {"processes": wanted.jobs, "cores": os.cpu_count()}
    if wanted.model_name:
        facts |= {"model": wanted.model_name, "command": command_line()}
    return facts


def table(results: dict[str, Any]) -> str:
    """The cells in Markdown: accuracy of the default, then differences to it."""
    samples = load_split(results["provenance"]["split"], results["provenance"]["questions"])
    right = {
        key: np.array([int(bit) for bit in cell["correct"]], dtype=float)
        for key, cell in results["cells"].items()
    }
    whole = f"{100 * right['unreduced'].mean():.1f}"
    everything = results["cells"]["unreduced"]["flops"]
    lines = [["no reduction", "all 144 tokens", *[whole] * len(BUDGETS), "100 %"]]
    for group, value, options in ROWS:
        if f"{group}/{value}/{BUDGETS[0]}" not in right:
            continue  # the run is older than the row
        cells = [group, value]
        for tokens in BUDGETS:
            own = right[f"{group}/{value}/{tokens}"]
            default = right[f"default/{ROWS[0][1]}/{tokens}"]
            if not options:
                cells.append(f"**{100 * own.mean():.1f}**")
                continue
            low, high = difference_interval(samples, own, default)
            cells.append(f"{100 * (own - default).mean():+.1f} ({low:+.1f} to {high:+.1f})")
        costs = results["cells"][f"{group}/{value}/{COST_AT}"]["flops"]
        lines.append([*cells, f"{100 * costs / everything:.0f} %"])
    columns = ["varied", "value", *(f"{tokens} tokens" for tokens in BUDGETS), "FLOPs"]
    return markdown_table(columns, lines)


def report(results: dict[str, Any]) -> str:
    """The whole page."""
    facts = results["provenance"]
    standard = (
        f"python -m scripts.demo.ablation --split {facts['split']} --output eval/results/ablation"
    )
    shown = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command")
    later = [line for sentence in later_words(results) for line in (sentence, "")]
    text = [
        f"# Ablation on the demo {facts['split']} split",
        "",
        f"Made by `{facts.get('command', standard)}`. The first rows are percent right; every "
        "other row is its difference to the default in points, with the 95 % interval of the "
        "paired difference (bootstrap over images). An interval that holds 0 shows no difference. "
        f"FLOPs: up to the first token at {COST_AT} tokens, in percent of no reduction.",
        "",
        table(results),
        "",
        f"{shown}; {results['minutes']:.0f} minutes.",
        "",
        *later,
    ]
    return "\n".join(text)


def main() -> None:
    """Measure what is missing and write the table."""
    for algorithm in (ENERGY_SELECT, ONE_ROUND):
        algorithms.register(algorithm)
    wanted = arguments()
    wanted.output.mkdir(parents=True, exist_ok=True)
    stored = wanted.output / f"ablation_{wanted.split}.json"
    results = json.loads(stored.read_text()) if wanted.rewrite else measure(wanted, stored)
    write_text(stored.with_suffix(".md"), report(results))
    print(table(results))


if __name__ == "__main__":
    main()
