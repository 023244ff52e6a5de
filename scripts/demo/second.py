"""Ask second questions, about another part of the same image, and write what merging does to them.

    python -m scripts.demo.second --split val --output eval/results/ablation

The first question and its right answer stay in the prompt. The language model is told the
positions of merged tokens in four ways, at the budgets of the ablation. The same questions asked
alone are taken from the ablation's results in the same folder (`scripts.demo.ablation`). A run
that was stopped resumes with the missing rows. Writes second_<split>.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pitome_vlm import MergeConfig
from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.demo.dataset import Sample
from pitome_vlm.demo.second import SecondQuestion, second_questions
from pitome_vlm.measure.demo_benchmark import (
    Setting,
    accuracy_interval,
    difference_intervals,
    family_words,
)
from pitome_vlm.measure.provenance import checkpoint_fingerprint

from .ablation_rows import BASELINE, BUDGETS, ROWS
from .ablation_table import TOLD
from .benchmark import ROWS_BETWEEN_SAVES, asking, load_model, parser_for, run_facts
from .stored import CHANGES, holds, later_words, with_run

UNREDUCED = "unreduced"


def settings() -> dict[str, Setting]:
    """What is asked, by the ablation's keys, the unreduced model first."""
    options = {row[:2]: row[2] for row in ROWS}
    asked = {UNREDUCED: Setting("no reduction", BASELINE)}
    for name, row in TOLD:
        for tokens in BUDGETS:
            config = MergeConfig.from_dict({"tokens": tokens, **options[row]})
            asked[key_of(row, tokens)] = Setting(name, config)
    return asked


def key_of(row: Sequence[str], tokens: int) -> str:
    """The ablation's key of a row at a budget."""
    return "/".join((*row, str(tokens)))


def measure(wanted: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """Ask what is not stored yet, and store it.

    Raises:
        SystemExit: the stored rows are of other questions or of another model.
    """
    samples = second_questions(load_split(wanted.split, wanted.limit))
    results: dict[str, Any] = {"cells": {}}
    if stored.is_file():
        results = json.loads(stored.read_text())
    model, _ = load_model(wanted.model)
    same = {"limit": wanted.limit, "checkpoint": checkpoint_fingerprint(str(wanted.model))}
    facts = run_facts(wanted, model, len(samples)) | same
    for name, value in same.items():
        found = results.get("provenance", facts)[name]
        if found != value:
            raise SystemExit(f"{stored} was made with {name} {found}, not {value}; give --output")
    known = results["cells"]
    todo = {
        key: one
        for key, one in settings().items()
        if not (key in known and holds(known[key], one.config))
    }
    keys = list(todo)
    size = wanted.batch_size
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    options = {"split": wanted.split, "batch_size": size}
    with asking(wanted.jobs, wanted.model, parts, options) as ask:
        for begin in tqdm(range(0, len(keys), ROWS_BETWEEN_SAVES), unit="save"):
            part = keys[begin : begin + ROWS_BETWEEN_SAVES]
            for key, outcome in zip(part, ask([todo[key] for key in part]), strict=True):
                known[key] = {
                    "config": outcome.setting.config.to_dict(),
                    "changes": len(CHANGES),
                    "tokens": outcome.tokens,
                    "correct": "".join("01"[int(right)] for right in outcome.correct),
                }
            results |= with_run(results, facts, [todo[key].name for key in part])
            write_text(stored, json.dumps(results, separators=(",", ":")) + "\n")
    return results


def bits(cell: dict[str, Any]) -> np.ndarray:
    """[questions] 1.0 where the answer was right."""
    return np.array([int(bit) for bit in cell["correct"]], dtype=float)


def asked_alone(
    samples: list[Sample], seconds: list[SecondQuestion], alone: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The same questions without a first one, by key, as far as the ablation has them."""
    places = {(one.scene_id, one.question): place for place, one in enumerate(samples)}
    chosen = [places[one.scene_id, one.question] for one in seconds]
    known = alone["cells"]
    return {
        key: bits(known[key])[chosen]
        for key, setting in settings().items()
        if key in known and holds(known[key], setting.config)
    }


def by_positions(samples: list[Any], differences: dict[str, np.ndarray], first: str) -> str:
    """Differences in points with intervals that hold together, by positions and budget."""
    ends = difference_intervals(samples, list(differences.values()))
    shown = {
        key: f"{100 * one.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        for (key, one), (low, high) in zip(differences.items(), ends, strict=True)
    }
    lines = [
        [name, *(shown.get(key_of(row, tokens), "") for tokens in BUDGETS)] for name, row in TOLD
    ]
    return markdown_table([first, *(f"{tokens} tokens" for tokens in BUDGETS)], lines)


def losses_of(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Differences to no reduction, by key."""
    return {key: right - found[UNREDUCED] for key, right in found.items() if key != UNREDUCED}


def report(results: dict[str, Any], alone: dict[str, Any] | None) -> str:
    """The whole page.

    Args:
        results: what was measured.
        alone: results of the ablation on the same questions, None if there are none.
    """
    facts = results["provenance"]
    samples = load_split(facts["split"], facts["limit"])
    seconds = second_questions(samples)
    found = {key: bits(cell) for key, cell in results["cells"].items()}
    losses, one = losses_of(found), seconds[0]
    low, high = accuracy_interval(seconds, found[UNREDUCED])
    parts = [
        f"# Second questions on the demo {facts['split']} split",
        f"{len(seconds)} questions, each after one about another part of the same image (the two "
        "share no colour, shape or size by name) and its right answer, which stay in the prompt: "
        f"*{one.first_question} {one.first_answer}. {one.question}* The default of the ablation, "
        "with the positions that its rows name. Made by `python -m scripts.demo.second --split "
        f"{facts['split']} --limit {facts['limit']} --output eval/results/ablation`.",
        f"Without reduction {100 * found[UNREDUCED].mean():.1f} % ({low:.1f} to {high:.1f}) are "
        f"right. Points, minus that. {family_words(len(losses))}",
        by_positions(seconds, losses, "positions"),
    ]
    single = asked_alone(samples, seconds, alone) if alone else {}
    if UNREDUCED in single:
        before = losses_of(single)
        more = {key: losses[key] - before[key] for key in losses if key in before}
        parts += [
            "## The same questions asked alone",
            f"Without reduction {100 * single[UNREDUCED].mean():.1f} % are right. "
            + family_words(len(before)),
            by_positions(seconds, before, "asked alone"),
            "## What a first question adds",
            "The difference to no reduction as a second question minus that asked alone, paired; "
            f"below 0 merging costs a second question more. {family_words(len(more))}",
            by_positions(seconds, more, "second minus alone"),
        ]
    shown = ", ".join(f"{name} {value}" for name, value in facts.items())
    return "\n\n".join([*parts, f"{shown}.", *later_words(results)]) + "\n"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__, limit=600)
    parser.add_argument("--model", type=Path, default=checkpoint_path(), help="checkpoint folder")
    parser.add_argument("--model-name", help="how to call it in the report")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing and write the page."""
    wanted = arguments()
    wanted.output.mkdir(parents=True, exist_ok=True)
    stored = wanted.output / f"second_{wanted.split}.json"
    results = json.loads(stored.read_text()) if wanted.rewrite else measure(wanted, stored)
    alone = wanted.output / f"ablation_{wanted.split}.json"
    known = json.loads(alone.read_text()) if alone.is_file() else None
    checkpoint = results["provenance"]["checkpoint"]
    same = known and known["provenance"].get("checkpoint") == checkpoint
    text = report(results, known if same else None)
    write_text(stored.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
