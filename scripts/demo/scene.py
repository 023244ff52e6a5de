"""Choose the scene of the README and of `pitome-vlm demo` by a rule on val, and draw it.

    python -m scripts.demo.scene --output docs/assets

The rule: among scenes with several objects whose questions the model answers right both unmerged
and under the default at a quarter of the tokens, the one with the most questions that ToMe or
PiToMe as published gets wrong; the lowest number where several are level. Of its questions, the
one that most of them get wrong; one that counts where several are level, because its answer can be
checked in the image, then the first.

Stores the choice in pitome_vlm/demo/shown.json and writes the images of the demo. About 100 s of
CPU; `--keep-choice` draws the stored scene again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from pitome_vlm.cli.demo import IMAGES
from pitome_vlm.cli.demo_page import write_images
from pitome_vlm.cli.demo_run import (
    SCENE_METHODS,
    SHOWN_KEEP,
    SHOWN_KINDS,
    Demo,
    chosen_scene,
    load_demo,
    settings,
)
from pitome_vlm.common import write_text
from pitome_vlm.demo import Sample, load_split
from pitome_vlm.demo.shown import SHOWN_FILE, Shown
from pitome_vlm.measure.demo_benchmark import run

SPLIT = "val"
COUNTING = "count"


def choose(samples: list[Sample], right: np.ndarray) -> Shown:
    """What the rule chooses.

    Args:
        samples: questions of `SPLIT` about scenes with several objects.
        right: [settings, questions] bool, unmerged and the default first, then ToMe and PiToMe as
            published.
    """
    numbers: dict[int, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        numbers[sample.scene_id].append(number)
    answered = {scene: own for scene, own in numbers.items() if right[:2, own].all()}
    scene = min(answered, key=lambda one: (right[2:, answered[one]].sum(), one))
    question = min(
        answered[scene],
        key=lambda one: (right[2:, one].sum(), samples[one].question_type != COUNTING, one),
    )
    return Shown(SPLIT, scene, samples[question].question)


def apply_rule(demo: Demo) -> Shown:
    """Ask every question that the rule looks at."""
    samples = [sample for sample in load_split(SPLIT) if sample.kind in SHOWN_KINDS]
    compared = settings(SCENE_METHODS, SHOWN_KEEP)
    outcomes = run(demo.model, demo.processor, compared, samples, split=SPLIT)
    return choose(samples, np.stack([outcome.correct for outcome in outcomes]))


def main() -> None:
    """Choose, store and draw; print what is asked and answered."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--keep-choice", action="store_true", help="draw the stored scene")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    demo = load_demo()
    if not wanted.keep_choice:
        choice = json.dumps(dataclasses.asdict(apply_rule(demo)), indent=2)
        write_text(SHOWN_FILE, choice + "\n")
    scene = chosen_scene(None)
    outcomes = demo.answers(scene)
    for index, sample in enumerate(scene.samples):
        given = {outcome.setting.name: outcome.answers[index] for outcome in outcomes}
        print(f"{sample.question} {sample.answer}: {given}")
    for path in write_images([wanted.output / name for name in IMAGES], demo, scene, outcomes):
        print(path)


if __name__ == "__main__":
    main()
