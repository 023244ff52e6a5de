"""Merging against smaller images of as many tokens, and on the questions these get wrong.

The comparison of VTC-Bench (arXiv 2510.07143), from two sweeps:

    pitome-vlm eval --suite vtc --output out/vtc
    pitome-vlm eval --suite vtc --algorithms none --model-args image_share=0.25 --output out/vtc-25
    python -m scripts.hard_questions --suite vtc --merged out/vtc --keep 0.25 --smaller out/vtc-25

Both sweeps have every answer; nothing is asked again. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.measure.evaluate import suites
from pitome_vlm.measure.evaluate.records import Folder
from pitome_vlm.measure.stats import LEVEL, difference_interval

# A score from here on is right: VQA's lie between 0 and 1.
RIGHT = 0.5


def scores_of(folder: Folder, cell: suites.Cell) -> tuple[np.ndarray, list[str]] | None:
    """[questions] scores of a cell and their images; None where it is missing or has none."""
    record = folder.load(cell)
    if record is None or record.scores is None:
        return None
    return record.scores, record.clusters


def table(tasks: Iterable[str], setting: suites.Setting, merged: Folder, smaller: Folder) -> str:
    """One line per task that both sweeps have.

    Args:
        tasks: lmms-eval task names.
        setting: how tokens were merged.
        merged: sweep with the unreduced model and the setting.
        smaller: sweep of the unreduced model with images of as many tokens.

    Raises:
        ValueError: a task's questions differ between the two.
    """
    found = {}
    for task in tasks:
        plain = suites.Cell(task, suites.baseline())
        three = [
            scores_of(merged, plain),
            scores_of(smaller, plain),
            scores_of(merged, suites.Cell(task, setting)),
        ]
        known = [one for one in three if one is not None]
        if len(known) < len(three):
            continue
        if any(images != known[0][1] for _, images in known):
            raise ValueError(
                f"{task}: the two sweeps asked different questions; give the same limit"
            )
        found[task] = [scores for scores, _ in known], known[0][1]
    # All intervals hold together (Bonferroni): tasks are independent of each other.
    level = 1 - (1 - LEVEL) / max(1, len(found))
    lines = []
    for task, ((whole, small, own), images) in found.items():
        low, high = difference_interval(own, small, images, level=level)
        hard = (small < RIGHT) & (whole >= RIGHT)
        right = f"{100 * own[hard].mean():.1f}" if hard.any() else "-"
        difference = f"{100 * (own - small).mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        means = [f"{100 * one.mean():.1f}" for one in (whole, small, own)]
        lines.append([task, *means, difference, str(hard.sum()), right])
    head = ["task", "unreduced %", "smaller images %", f"{setting.name} %", "merged minus smaller"]
    return markdown_table([*head, "hard questions", "right of these %"], lines)


def main() -> None:
    """Read two sweeps and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="vtc", help="suite of both sweeps")
    parser.add_argument("--merged", type=Path, required=True, help="folder of the suite's sweep")
    parser.add_argument("--smaller", type=Path, required=True, help="folder of smaller images")
    parser.add_argument("--keep", type=float, required=True, help="share of tokens and of pixels")
    wanted = parser.parse_args()
    suite = suites.read_suite(wanted.suite)
    chosen = [one for one in suite.settings if one.config.keep == wanted.keep and one.budget]
    if not chosen:
        shares = ", ".join(str(one.config.keep) for one in suite.settings if one.budget)
        raise SystemExit(f"--keep must be a share of the suite, {shares}, got {wanted.keep}")
    print(table(suite.tasks, chosen[0], Folder(wanted.merged), Folder(wanted.smaller)))


if __name__ == "__main__":
    main()
