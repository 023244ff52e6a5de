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
import functools
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pitome_vlm import algorithms
from pitome_vlm.common import write_text
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.demo.dataset import SPLIT_SCENES
from pitome_vlm.measure.demo_benchmark import concatenate
from pitome_vlm.measure.description import describe
from pitome_vlm.measure.provenance import checkpoint_fingerprint, provenance

from ..command import command_line
from .ablation_rows import OWN_ALGORITHMS, cells
from .ablation_table import report, table
from .benchmark import load_model, measure_part, parser_for
from .stored import CHANGES, holds, with_run


def prepare(path: Path) -> tuple[Any, Any]:
    """The model of this process, which then knows all algorithms of the table."""
    for algorithm in OWN_ALGORITHMS:
        algorithms.register(algorithm)
    return load_model(path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", type=Path, default=None, help="another checkpoint folder")
    parser.add_argument("--model-name", help="how to call it in the report")
    parser.add_argument("--rows", type=int, default=8, help="cells measured between two saves")
    parser.add_argument("--varied", nargs="+", help="measure only rows of these first columns")
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


def measure(wanted: argparse.Namespace, stored: Path, model: Any) -> dict[str, Any]:
    """Measure the cells that are not stored yet, saving after every few."""
    used_layers = describe(model).schedule.used_layers
    split, size = wanted.split, wanted.batch_size
    path, samples = wanted.model or checkpoint_path(), load_split(split, wanted.limit)
    same = {"questions": len(samples), "checkpoint": checkpoint_fingerprint(str(path))}
    results = started(wanted, stored, same) | {"used_layers": used_layers}
    known = results["cells"]
    todo = [
        cell
        for cell in cells(used_layers)
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
            facts = facts_of(wanted, model, same)
            results |= with_run(results, facts, [cell.setting.name for cell in piece])
            write_text(stored, json.dumps(results, separators=(",", ":")) + "\n")
    return results


def add_costs(results: dict[str, Any], model: Any) -> None:
    """Count what every measured cell costs until the first token, in place."""
    known = results["cells"]
    for cell in cells(results["used_layers"]):
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


def main() -> None:
    """Measure what is missing and write the table."""
    wanted = arguments()
    model = prepare(wanted.model or checkpoint_path())[0]
    wanted.output.mkdir(parents=True, exist_ok=True)
    stored = wanted.output / f"ablation_{wanted.split}.json"
    results = json.loads(stored.read_text()) if wanted.rewrite else measure(wanted, stored, model)
    add_costs(results, model)
    write_text(stored, json.dumps(results, separators=(",", ":")) + "\n")
    write_text(stored.with_suffix(".md"), report(results))
    print(table(results))


if __name__ == "__main__":
    main()
