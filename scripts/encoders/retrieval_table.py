"""Retrieval and zero-shot scores of an encoder with and without merging, as a table.

Knows the scores that mteb reports and nothing of mteb itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pitome_vlm.common import markdown_table

# What the paper calls R@k. mteb's own main score is nDCG@10, and its recall_at_k counts how many of
# the right captions are found, of which an image has five.
RETRIEVAL = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10")
CLASSES = ("accuracy",)


def scores_of(found: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a task that are shown, in percent.

    Args:
        found: all scores that mteb gives for one split.

    Raises:
        ValueError: none of them are there.
    """
    # Of retrieval mteb reports an accuracy, too, which is R@1 by another name.
    names = RETRIEVAL if RETRIEVAL[0] in found else CLASSES
    if not set(names) <= found.keys():
        raise ValueError(
            f"expected {', '.join(RETRIEVAL)} or {CLASSES[0]} among the scores of a task, got "
            f"{', '.join(sorted(found))[:100]}"
        )
    return {name: 100 * float(found[name]) for name in names}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; one row per task and setting.

    Args:
        results: `task`, `setting`, `scores` (as `scores_of` gives them), `gflops` of the encoder
            for an image (multiply-adds count 2).
    """
    columns = [name for name in (*RETRIEVAL, *CLASSES) if any(name in r["scores"] for r in results)]
    titles = [name.replace("hit_rate_at_", "R@") for name in columns]
    rows = [
        [
            one["task"],
            one["setting"],
            *(_percent(one["scores"].get(name)) for name in columns),
            f"{one['gflops']:.4g}",
        ]
        for one in results
    ]
    return markdown_table(["task", "merging", *titles, "encoder, GFLOP per image"], rows)


def _percent(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"
