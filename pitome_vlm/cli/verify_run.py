"""How `pitome-vlm verify` is carried through: read the request, load, measure.

Knows: the order, and where pictures come from. Does not know: options, how anything is measured
(`pitome_vlm.measure.spectral`) or shown and written (`verify_show.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..demo import scene_image
from ..demo.dataset import SPLIT_SCENES
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
from ..merge import algorithms as registry
from ..merge.config import MergeConfig
from .demo_run import one_thread
from .options import LoadOptions
from .session import DEMO, load_images, load_model
from .terminal import err, quiet, say

# Chosen and looked at during development, never reported as accuracy; the test split stays unseen.
SPLIT = "val"
DEFAULT_COUNT = 8


@dataclass(frozen=True)
class Request:
    """A checked command line; `sizes` empty or `loading` None leave that half out."""

    algorithms: list[str]
    sizes: list[tuple[int, ...]]
    sigmas: list[float]
    seeds: int
    loading: LoadOptions | None
    images: list[Path]
    count: int | None
    budget: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured, and `facts` that only loading could tell."""

    results: list[CaseResult]
    rows: list[FeatureRow]
    checks: Checks
    summary: list[Under]
    facts: dict[str, Any]


def parse_sigmas(text: str) -> list[float]:
    """Noise levels of `--sigma`.

    Raises:
        ValueError: no numbers, or out of range.
    """
    sigmas = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            raise ValueError(f"sigma must be numbers separated by commas, got {text!r}") from None
        Clusters((1, 1), sigma=value)
        sigmas.append(value)
    return list(dict.fromkeys(sigmas))


def parse_sizes(text: str | None) -> list[tuple[int, ...]]:
    """Cluster sizes of `--sizes`.

    Raises:
        ValueError: no whole numbers, or out of range.
    """
    if text is None:
        return list(DEFAULT_SIZES)
    found = []
    for word in text.split(","):
        parts = [part.strip() for part in word.split("/")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f"sizes must be like 32/16/8,20/16/12, got {text!r}")
        sizes = tuple(map(int, parts))
        Clusters(sizes)
        found.append(sizes)
    return list(dict.fromkeys(found))


def measure(request: Request, *, verbose: bool) -> Outcome:
    """Run everything that was asked for.

    Raises:
        ValueError: an unknown algorithm, a picture that is none, a budget that does not fit, ...
    """
    started = time.perf_counter()
    for name in request.algorithms:
        registry.get(name)
    names = list(dict.fromkeys(request.algorithms))
    images = load_images(request.images)
    scenes = _scene_numbers(request)
    if verbose:
        say(f"measuring {', '.join(names)}")
    with quiet(verbose), one_thread(), _progress() as progress:
        # The model first: it has more ways to fail, and sooner.
        rows, model_facts = _features(request, names, images, scenes, progress)
        chosen = cases(request.sizes)
        shown = _deciding_by_tokens(names) if chosen else names
        total = len(chosen) * len(request.sigmas) * len(shown) * request.seeds
        bar = progress.add_task("synthetic draws", total=total, visible=bool(total))
        results = synthetic_study(
            chosen,
            shown,
            request.sigmas,
            request.seeds,
            advance=lambda: progress.advance(bar),
        )
    if scenes:
        source = f"{len(scenes)} (scenes {scenes[0]}..{scenes[-1]} of the demo's {SPLIT} split)"
    else:
        source = f"{len(images)} (files)"
    facts = model_facts | ({"pictures": source} if request.loading else {})
    facts["seconds"] = round(time.perf_counter() - started, 1)
    return Outcome(results, rows, check(results, rows), under_assumptions(results), facts)


def _deciding_by_tokens(names: Sequence[str]) -> list[str]:
    """The algorithms that can be shown clusters; the others are named to the user.

    Raises:
        ValueError: there are none.
    """
    able = [name for name in names if can_merge(name)]
    reason = "read the class token's attention, which drawn clusters have not"
    if not able:
        raise ValueError(f"{', '.join(names)} {reason}; give --no-synthetic")
    if len(able) < len(names):
        say(f"real features only: {', '.join(sorted(set(names) - set(able)))} {reason}")
    return able


def _scene_numbers(request: Request) -> list[int]:
    """Validation scenes to look at; their kinds take turns."""
    if request.images or request.loading is None:
        return []
    count = DEFAULT_COUNT if request.count is None else request.count
    most = SPLIT_SCENES[SPLIT]
    if not 1 <= count <= most:
        raise ValueError(f"count must be in 1..{most} ({SPLIT} scenes of the demo), got {count}")
    return list(range(count))


def _progress() -> Progress:
    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn()
    # Where nobody watches, a bar would only leave an empty line.
    hidden = not err.is_terminal
    return Progress(*columns, TimeElapsedColumn(), console=err, transient=True, disable=hidden)


def _features(
    request: Request,
    names: Sequence[str],
    images: Sequence[Any],
    scenes: Sequence[int],
    progress: Progress,
) -> tuple[list[FeatureRow], dict[str, Any]]:
    """Rows of real features, and what a reader has to know about the model."""
    if request.loading is None:
        return [], {}
    loading = request.loading
    if loading.model == DEMO and loading.dtype is None:
        loading = LoadOptions(DEMO, loading.load_4bit, loading.load_8bit, "float32", loading.device)
    model, processor = load_model(loading, {})
    configs = {name: MergeConfig(algorithm=name, stage="tower", **request.budget) for name in names}
    pictures = list(images) or [scene_image(number, SPLIT) for number in scenes]
    bar = progress.add_task("pictures", total=len(pictures))
    changes: list[dict[str, TowerChange]] = []
    image_processor = getattr(processor, "image_processor", processor)
    for one in pictures:
        pixels = image_processor(images=one.convert("RGB"), return_tensors="pt")["pixel_values"]
        changes.append(merge_changes(model, pixels, configs))
        progress.advance(bar)
    compared = {
        name: config.metric or registry.get(name).metric for name, config in configs.items()
    }
    facts = {
        "model": request.loading.model,
        "compared": ", ".join(f"{metric} ({name})" for name, metric in compared.items()),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return feature_rows(changes), facts
