"""Table and raw answers of scripts/training/lora.py.

Compares every trained model with its own base; training itself is in `lora.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pitome_vlm import MergeConfig
from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.demo import Sample
from pitome_vlm.measure.demo_benchmark import (
    accuracy_interval,
    difference_intervals,
    family_words,
)

TITLES = {
    "base": "untrained",
    "base-nf4": "untrained, nf4",
    "lora": "LoRA, merging on",
    "lora-default": "LoRA, merging on",
    "lora-unmerged": "LoRA, trained without merging",
    "qlora-nf4": "QLoRA (nf4), merging on",
}
METHODS = {"none": "no merging", "pitome": "PiToMe (paper)", "pitome_plus": "pitome_plus (default)"}


def write_report(
    folder: Path, samples: Sequence[Sample], results: list[dict[str, Any]], recipe: dict[str, Any]
) -> None:
    """results.json and report.md."""
    raw = {"recipe": recipe, "samples": [vars(sample) for sample in samples], "trials": results}
    write_text(folder / "results.json", json.dumps(raw) + "\n")
    write_text(folder / "report.md", report(samples, results, recipe))


def rewrite_report(folder: Path) -> None:
    """report.md again, out of results.json."""
    raw = json.loads((folder / "results.json").read_text())
    samples = [Sample(**one) for one in raw["samples"]]
    write_text(folder / "report.md", report(samples, raw["trials"], raw["recipe"]))


def report(samples: Sequence[Sample], results: list[dict[str, Any]], recipe: dict[str, Any]) -> str:
    """The whole report.md."""
    rows = list(_rows(samples, results))
    facts = results[0]["facts"]
    shown = ", ".join(f"{key} {value}" for key, value in facts.items())
    steps = -(-recipe["scenes"] // recipe["batch_size"]) * recipe["epochs"]
    return "\n".join(
        [
            "# LoRA and QLoRA with merging on",
            "",
            f"The bundled model on {len(samples)} {facts['split']} questions, greedy, exact match. "
            "Intervals resample whole images (4,000 bootstrap draws). *won back* is the paired "
            "difference to the same model untrained at the same tokens; *of the loss* the share of "
            "what merging had cost (untrained without merging minus untrained with it), left out "
            "where that cost is not shown (its interval reaches 0): there is nothing to win back.",
            "",
            _table(rows),
            "",
            f"Adapters: rank {recipe['rank']}, all linear layers of the language model. Data: "
            f"{recipe['scenes']} freshly drawn scenes that are in no split, {recipe['per_scene']} "
            f"questions each as one LLaVA-format conversation, {recipe['epochs']:g} epochs, "
            f"{steps:.0f} steps of {recipe['batch_size']}, learning rate "
            f"{recipe['learning_rate']:g} (cosine), seed {recipe['seed']}. The learning rate was "
            "chosen on the validation split from 1e-3, 2e-3 and 4e-3 in short runs "
            "(docs/training.md); nothing else was tried.",
            "",
            _costs(results),
            "",
            f"Measured on: {shown}.",
            "",
            "Regenerate with `python -m scripts.training.lora --output eval/results/lora`.",
            "",
        ]
    )


def _rows(samples: Sequence[Sample], results: list[dict[str, Any]]) -> Any:
    truth = np.array([sample.answer for sample in samples])
    for trial in results:
        for outcome in trial["outcomes"]:
            config = MergeConfig.from_dict(outcome["config"])
            yield {
                "trial": trial["trial"],
                "bits": trial["bits"],
                "trained": trial["trained"] is not None,
                "method": config.algorithm,
                "tokens": outcome["tokens"],
                "right": (np.array(outcome["answers"]) == truth).astype(float),
                "samples": samples,
            }


def _table(rows: list[dict[str, Any]]) -> str:
    columns = ["visual tokens", "merging", "model", "accuracy %", "95 %", "won back", "95 %"]
    gained, lost = {}, {}
    for number, row in enumerate(rows):
        before, whole = _untrained(rows, row, row["method"]), _untrained(rows, row, "none")
        if row["trained"] and before is not None:
            gained[number] = row["right"] - before
            if whole is not None and row["method"] != "none":
                lost[number] = whole - before
    samples, family = rows[0]["samples"], [*gained.values(), *lost.values()]
    found = difference_intervals(samples, family)
    ends = dict(zip(gained, found, strict=False))
    # What merging had cost, where that is shown.
    costly = {
        number: 100 * lost[number].mean()
        for number, interval in zip(lost, found[len(gained) :], strict=True)
        if interval.low > 0
    }
    lines = []
    for number, row in enumerate(rows):
        low, high = accuracy_interval(samples, row["right"])
        cells = [
            str(row["tokens"]),
            METHODS.get(row["method"], row["method"]),
            TITLES.get(row["trial"], row["trial"]),
            f"{100 * row['right'].mean():.1f}",
            f"{low:.1f} to {high:.1f}",
        ]
        if number in gained:
            points, (low, high) = 100 * gained[number].mean(), ends[number]
            share = f"{100 * points / costly[number]:.0f} %" if number in costly else ""
            cells += [f"{points:+.1f}", f"{low:+.1f} to {high:+.1f}", share]
        else:
            cells += ["", "", ""]
        lines.append(cells)
    shown = markdown_table([*columns, "of the loss"], lines)
    return "\n".join([shown, "", family_words(len(family))])


def _untrained(rows: list[dict[str, Any]], row: dict[str, Any], method: str) -> Any:
    """The answers of the same base without an adapter, None where it was not asked."""
    found = [
        other["right"]
        for other in rows
        if not other["trained"] and other["bits"] == row["bits"] and other["method"] == method
    ]
    return found[0] if found else None


def _costs(results: list[dict[str, Any]]) -> str:
    lines = []
    for trial in results:
        parts = trial["weights"]
        total = sum(value for value in parts.values() if isinstance(value, int))
        size = trial["adapter_bytes"]
        adapter = "" if not size else f"{size / 1024:.0f} KiB"
        weights = f"{total / 1024:.0f} KiB"
        lines.append([trial["trial"], f"{trial['seconds']} s", adapter, weights])
    return markdown_table(["run", "training, one core", "adapter", "weights"], lines)
