r"""What merging costs where the language model cannot be told sizes and positions, as in vLLM.

    python -m scripts.serving.without_calibration --keep 0.5 0.25 \
        -o eval/results/serving/uncalibrated

The library alone, on the demo's validation questions: algorithms without calibration, and for the
default what each half of the calibration would give.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pitome_vlm import MergeConfig
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.measure.demo_benchmark import Setting, accuracy_interval, run

from ..command import command_line
from .load import environment

OFF: dict[str, Any] = {"size_bias": False, "positions": "compact"}
ALGORITHMS = ("pitome_plus", "divprune", "tome", "pitome", "visionzip", "pool")


def settings(keep: float) -> list[Setting]:
    """Everything that is asked at one budget."""
    found = [
        Setting(f"{name}, as served", MergeConfig(keep=keep, algorithm=name, **OFF))
        for name in ALGORITHMS
    ]
    halves = {
        "pitome_plus with mean positions only": {"size_bias": False, "positions": "mean"},
        "pitome_plus with the size bias only": {"size_bias": True, "positions": "compact"},
        "pitome_plus with both (the library's default)": {},
    }
    return found + [Setting(name, MergeConfig(keep=keep, **own)) for name, own in halves.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("-o", "--output", required=True, help="without suffix: .md and .json")
    options = parser.parse_args()
    path = checkpoint_path()
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    samples = load_split("val", options.limit)
    whole = Setting("nothing merged", MergeConfig(keep=1.0))
    wanted = [whole, *(one for keep in options.keep for one in settings(keep))]
    with tqdm(total=len(samples) * len(wanted), disable=None) as bar:
        outcomes = run(model, processor, wanted, samples, split="val", advance=bar.update)
    rows = {
        (one.setting.name, one.setting.config.keep): (
            one.accuracy,
            *accuracy_interval(samples, one.correct),
        )
        for one in outcomes
    }
    names = list(dict.fromkeys(one.name for one in wanted[1:]))
    lines = ["| | " + " | ".join(f"keep={keep:g}" for keep in options.keep) + " |"]
    lines.append("|---" * (len(options.keep) + 1) + "|")
    for name in names:
        cells = ["{:.1f} ({:.1f} to {:.1f})".format(*rows[name, keep]) for keep in options.keep]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine, command = environment(), command_line()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = (
        "# Merging without calibration\n\nAccuracy in % (95 % interval), "
        f"{len(samples)} validation questions, float32, batch 48; nothing merged: "
        "{:.1f} ({:.1f} to {:.1f}).\n\n".format(*rows[whole.name, 1.0])
        + "\n".join(lines)
        + f"\n\n{machine['processor']}, {versions}.\n\nCommand: `{command}`\n"
    )
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(output.name + ".md").write_text(text)
    found = [
        {"name": name, "keep": keep, "accuracy": row[0], "interval": row[1:]}
        for (name, keep), row in rows.items()
    ]
    result = {"command": command, "machine": machine, "questions": len(samples), "rows": found}
    output.with_name(output.name + ".json").write_text(json.dumps(result, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
