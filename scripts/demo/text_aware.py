"""Measure what seeing the question would be worth: a text-aware reference next to the default.

    python -m scripts.demo.text_aware --split val --output eval/results/text_aware

A reference (`text_selection.py`), not an algorithm of the package, which encodes an image once for
all questions. Every row has the same calibration. `--known eval/results/demo/results.json` takes
the rows that the demo benchmark has of the same questions (`--split test --limit 2400`), and
`--methods` measures only some. A run that was stopped resumes with the missing rows. Writes
<split>.json and <split>.md.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from pitome_vlm import MergeConfig, algorithms
from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.measure.demo_benchmark import Setting, difference_intervals, family_words
from pitome_vlm.measure.provenance import checkpoint_fingerprint, in_words

from ..command import command_line
from . import benchmark
from .report import (
    BASELINE,
    CALIBRATED,
    RECOMMENDED,
    Row,
    against_recommended,
    breakdown,
    from_raw,
    setting_values,
    table,
)
from .stored import later_words
from .text_selection import ALGORITHM, NAME, answers

BUDGETS = (36, 18, 9)
COMPARED = (RECOMMENDED, "SCOPE", "DivPrune", "random")
HOLOV = "HoloV"
BLIND = "DPP without the question"
AWARE: dict[str, dict[str, Any]] = {
    BLIND: {"relevance": "none"},
    "text-aware: words": {"relevance": "words"},
    "text-aware: words, theta 1/2": {"relevance": "words", "weight": 0.5},
    "text-aware: second layer": {"relevance": "second layer"},
    "text-aware: second layer, theta 1/2": {"relevance": "second layer", "weight": 0.5},
    "text-aware: last layer": {"relevance": "last layer"},
    "text-aware: last layer, theta 1/2": {"relevance": "last layer", "weight": 0.5},
}
ROWS = {
    HOLOV: {"algorithm": "holov"},
    **{name: {"algorithm": NAME, **options} for name, options in AWARE.items()},
}
ABOUT = f"""\
A reference for what seeing the question would be worth, after CDPruner (arXiv 2506.10967):
greedy MAP of a determinantal point process with the kernel diag(r) L diag(r), L the cosines of the
projected tokens, r their relevance to the question. **No algorithm of the package can do this**: an
image that is encoded once serves every question. "{BLIND}" is the same selection with r = 1.
"words": r is the mean cosine with the embeddings of the question's words, which is what CDPruner
takes from the text encoder of a CLIP. "second layer" and "last layer": the attention that the last
token of the unreduced prompt pays, as FastV (arXiv 2403.06764) reads it after two layers; they
read all tokens before any is dropped, so reading the second layer saves less, and reading the last
one saves nothing. r is scaled to (0, 1] in every image; "theta 1/2" softens it to exp(r / 2). All
rows have the same calibration (log-size bias, mean positions); random is the mean of three
seeds."""


def prepare(path: Path) -> tuple[Any, Any]:
    """The model of this process, which then knows the reference."""
    algorithms.register(ALGORITHM)
    return benchmark.load_model(path)


def settings() -> list[Setting]:
    """All rows: no merging, methods that see no question, the reference."""
    found = [Setting(BASELINE, benchmark.NO_MERGING)]
    for tokens in BUDGETS:
        found += [one for one in benchmark.methods(tokens) if one.name in COMPARED]
        for name, options in ROWS.items():
            config = MergeConfig.from_dict({"tokens": tokens, **CALIBRATED, **options})
            found.append(Setting(name, config))
    return found


def started(wanted: argparse.Namespace, stored: Path, checkpoint: str) -> dict[str, Any]:
    """What an earlier run left, or the rows of the demo benchmark that are in this table."""
    source = stored if stored.is_file() else wanted.known or stored
    samples = load_split(wanted.split, wanted.limit)
    old = benchmark.kept(source, samples, checkpoint, overwrite=False)
    names = {benchmark.key(setting_values(one)) for one in settings()}
    outcomes = [one for one in old["outcomes"] if benchmark.key(one) in names]
    found = {one["method"] for one in outcomes}
    later = [
        one | {"rows": [name for name in one["rows"] if name in found]}
        for one in old.get("later", [])
    ]
    later = [one for one in later if one["rows"]]
    return old | {"outcomes": outcomes, "later": later, "costs": [], "times": []}


def measure(wanted: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """Ask what is not stored yet, and store it."""
    path = checkpoint_path()
    checkpoint = checkpoint_fingerprint(str(path))
    old = started(wanted, stored, checkpoint)
    model, _ = benchmark.load_model(path)
    samples, size = load_split(wanted.split, wanted.limit), wanted.batch_size
    facts = benchmark.run_facts(wanted, model, len(samples))
    facts |= {"checkpoint": checkpoint, "command": command_line()}
    todo = [
        one
        for one in benchmark.missing(old, settings())
        if wanted.methods is None or one.name in wanted.methods
    ]
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    options = {
        "split": wanted.split,
        "batch_size": size,
        "answers_of": functools.partial(answers, path=path),
    }
    with benchmark.asking(wanted.jobs, path, parts, options, prepare) as ask:
        return benchmark.with_rows(old, settings(), todo, ask, facts, stored)


def worth(samples: list[Any], rows: list[Row]) -> list[str]:
    """The section on what the question adds to the same selection without it."""
    found = {(row.name, row.tokens): row.correct for row in rows}
    pairs = {
        (name, tokens): found[name, tokens] - found[BLIND, tokens]
        for name in AWARE
        for tokens in BUDGETS
        if name != BLIND and (name, tokens) in found and (BLIND, tokens) in found
    }
    ends = difference_intervals(samples, list(pairs.values()))
    shown = {
        pair: f"{100 * np.mean(one):+.1f} ({low:+.1f} to {high:+.1f})"
        for (pair, one), (low, high) in zip(pairs.items(), ends, strict=True)
    }
    names = dict.fromkeys(name for name, _ in pairs)
    lines = [[name, *(shown.get((name, tokens), "") for tokens in BUDGETS)] for name in names]
    columns = ["relevance", *(f"{tokens} tokens" for tokens in BUDGETS)]
    text = markdown_table(columns, lines)
    return [f"## What the question adds to {BLIND}", "", text, "", family_words(len(pairs)), ""]


def report(results: dict[str, Any]) -> str:
    """The whole page."""
    samples, rows = from_raw(results)
    facts = results["provenance"]
    parts = [
        f"# What seeing the question would be worth: demo {facts['split']} split",
        "",
        f"{len(samples)} questions. {' '.join(ABOUT.splitlines())}",
        "",
        table(samples, rows),
        "",
        *worth(samples, rows),
        *against_recommended(samples, rows),
        *breakdown(samples, rows, "question_type", "question type"),
        "\n\n".join([f"Measured on: {in_words(facts)}.", *later_words(results)]),
    ]
    return "\n".join(parts) + "\n"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = benchmark.parser_for(__doc__, limit=600)
    parser.add_argument("--known", type=Path, help="results.json of the demo benchmark")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows to measure")
    parser.set_defaults(model_name=None)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing and write the page."""
    wanted = arguments()
    prepare(checkpoint_path())
    wanted.output.mkdir(parents=True, exist_ok=True)
    stored = wanted.output / f"{wanted.split}.json"
    results = json.loads(stored.read_text()) if wanted.rewrite else measure(wanted, stored)
    text = report(results)
    write_text(stored.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
