"""What `pitome-vlm verify` measures, and the files that it writes.

How anything is measured is left to `pitome_vlm.measure.spectral`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import write_bytes, write_text
from ..demo import scene_image
from ..demo.dataset import SPLIT_SCENES
from ..measure.provenance import machine, provenance, versions
from ..measure.spectral import plots, report
from ..measure.spectral.features import TowerChange, merge_changes
from ..measure.spectral.study import (
    DEFAULT_SIZES,
    CaseResult,
    Checks,
    FeatureRow,
    Under,
    cases,
    check,
    feature_rows,
    synthetic_study,
    under_assumptions,
)
from ..measure.spectral.synthetic import Clusters, can_merge
from ..measure.store import VERIFY_FILES
from ..merge import algorithms as registry
from ..merge.config import MergeConfig
from .options import fractions, words
from .session import DEMO, load_model
from .terminal import say

if TYPE_CHECKING:
    from rich.progress import Progress

# Looked at during development and never reported as accuracy; the test split stays unseen.
SPLIT = "val"
DEFAULT_COUNT = 8


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured, and `facts` for a reader to judge or repeat it."""

    results: list[CaseResult]
    rows: list[FeatureRow]
    checks: Checks
    summary: list[Under]
    facts: dict[str, Any]


def noise_levels(text: str) -> list[float]:
    """Noise levels of `--sigma`."""
    sigmas = fractions("sigma", text)
    for sigma in sigmas:
        Clusters((1, 1), sigma=sigma)
    return list(dict.fromkeys(sigmas))


def cluster_sizes(text: str | None) -> list[tuple[int, ...]]:
    """Cluster sizes of `--sizes`."""
    if text is None:
        return list(DEFAULT_SIZES)
    found = []
    for word in words("sizes", text):
        parts = [part.strip() for part in word.split("/")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f"sizes must be like 32/16/8,20/16/12, got {text!r}")
        sizes = tuple(map(int, parts))
        Clusters(sizes)
        found.append(sizes)
    return list(dict.fromkeys(found))


def synthetic_results(
    names: Sequence[str],
    sizes: Sequence[tuple[int, ...]],
    sigmas: Sequence[float],
    seeds: int,
    progress: Progress,
) -> tuple[list[CaseResult], dict[str, Any]]:
    """Results on clusters with known labels, and facts about them."""
    chosen, shown = cases(sizes), _deciding_by_tokens(names)
    total = len(chosen) * len(sigmas) * len(shown) * seeds
    bar = progress.add_task("synthetic draws", total=total)
    results = synthetic_study(chosen, shown, sigmas, seeds, advance=lambda: progress.advance(bar))
    levels = ", ".join(f"{sigma:g}" for sigma in sigmas)
    drawn = f"seeds 0..{seeds - 1}, sigma {levels}"
    return results, {"synthetic": drawn}


def _deciding_by_tokens(names: Sequence[str]) -> list[str]:
    """The algorithms that can merge clusters; the others are named to the user."""
    able = [name for name in names if can_merge(name)]
    others = ", ".join(sorted(set(names) - set(able)))
    reason = "synthetic clusters have no class token, whose attention this needs"
    if not able:
        raise ValueError(f"{others}: {reason}; give --no-synthetic")
    if others:
        say(f"measured on real features only: {others} ({reason})")
    return able


def scene_numbers(count: int | None) -> list[int]:
    """Numbers of the demo's validation scenes to look at; their kinds take turns."""
    most = SPLIT_SCENES[SPLIT]
    wanted = DEFAULT_COUNT if count is None else count
    if not 1 <= wanted <= most:
        raise ValueError(f"count must be in 1..{most} ({SPLIT} scenes of the demo), got {wanted}")
    return list(range(wanted))


def feature_results(
    model_name: str,
    names: Sequence[str],
    budget: dict[str, Any],
    images: Sequence[Any],
    scenes: Sequence[int],
    progress: Progress,
    **loading: Any,
) -> tuple[list[FeatureRow], dict[str, Any]]:
    """Rows of a model's own features, and facts about the model and its images.

    Where there are no images, `scenes` of the demo are drawn; `loading` is for `load_model`.
    """
    if model_name == DEMO and loading.get("dtype") is None:
        loading["dtype"] = "float32"  # a CPU is slow with the half precision that is stored
    model, processor = load_model(model_name, **loading)
    configs = {name: MergeConfig(algorithm=name, stage="tower", **budget) for name in names}
    shown = list(images) or [scene_image(number, SPLIT) for number in scenes]
    bar = progress.add_task("images", total=len(shown))
    changes: list[dict[str, TowerChange]] = []
    image_processor = getattr(processor, "image_processor", processor)
    for one in shown:
        pixels = image_processor(images=one.convert("RGB"), return_tensors="pt")["pixel_values"]
        changes.append(merge_changes(model, pixels, configs))
        progress.advance(bar)
    compared = {
        name: config.metric or registry.get(name).metric for name, config in configs.items()
    }
    source = f"{len(images)} (files)"
    if not images:
        source = f"{len(scenes)} (scenes {scenes[0]}..{scenes[-1]} of the demo's {SPLIT} split)"
    return feature_rows(changes), {
        **provenance(model),
        "model": model_name,
        "compared": ", ".join(f"{metric} ({name})" for name, metric in compared.items()),
        "images": source,
    }


def outcome_of(
    names: Sequence[str],
    results: list[CaseResult],
    rows: list[FeatureRow],
    facts: dict[str, Any],
) -> Outcome:
    """Everything measured, with what follows from it and its provenance."""
    # Everything runs on one thread.
    algorithms = {"algorithms": ", ".join(names)}
    facts = {**machine(), **algorithms, **facts, "threads": 1, **versions()}
    return Outcome(results, rows, check(results, rows), under_assumptions(results), facts)


def store(outcome: Outcome, folder: Path, *, plot: bool) -> list[Path]:
    """Write report, results and plot, each whole or not at all; their paths."""
    report_file, results, drawing = (folder / name for name in VERIFY_FILES)
    drawn = plots.draw(outcome.results, outcome.rows) if plot else None
    text = report.markdown(
        outcome.results,
        outcome.rows,
        checks=outcome.checks,
        summary=outcome.summary,
        facts=outcome.facts,
        plot=drawing.name if plot else None,
    )
    values = {
        "provenance": outcome.facts,
        "checks": vars(outcome.checks) | {"passed": outcome.checks.passed},
        "under_assumptions": [vars(one) for one in outcome.summary],
        "synthetic": [result.to_dict() for result in outcome.results],
        "features": [row.to_dict() for row in outcome.rows],
    }
    files = [write_text(report_file, text), write_text(results, _dump(values))]
    if drawn is not None:
        return [*files, write_bytes(drawing, drawn)]
    # A plot of an earlier run would contradict the new numbers.
    drawing.unlink(missing_ok=True)
    return files


def _dump(values: dict[str, Any]) -> str:
    """JSON with one line per row: readable, and small changes stay small in a diff."""
    parts = []
    for name, value in values.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f'"{name}": [\n{rows}\n]' if rows else f'"{name}": []')
        else:
            parts.append(f'"{name}": {json.dumps(value, indent=2)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
