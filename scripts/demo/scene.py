"""Choose the scene of the README by a rule on val, and draw it: `--output docs/assets`.

The rule: among scenes with several objects whose questions the model answers right both unmerged
and under the default at a quarter of the tokens, the one with the most questions that ToMe or
PiToMe as published gets wrong; the lowest number where several are level.

Writes scene.png, and scene-compared.png as `pitome-vlm visualize` draws it. About 100 s of CPU;
`--scene N` skips the choice.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.cli import app
from pitome_vlm.common import write_bytes
from pitome_vlm.demo import Sample, load_split, scene_image
from pitome_vlm.measure.demo_benchmark import Setting, run
from pitome_vlm.measure.tables import png

SPLIT = "val"
TOKENS = 36
# A multiple of the 120 pixels that the model sees, large enough to look at.
SIZE = 480
# One object or a plain board leave nothing to tell methods apart by.
KINDS = ("scattered", "identical", "digits", "crowded")
UNMERGED, DEFAULT = "none", "pitome_plus"


def settings() -> list[Setting]:
    """What the rule looks at."""
    return [
        Setting(UNMERGED, MergeConfig(keep=1.0, algorithm="none")),
        Setting(DEFAULT, MergeConfig(tokens=TOKENS)),
        Setting("tome", MergeConfig(tokens=TOKENS, algorithm="tome")),
        Setting("paper", MergeConfig.preset("paper", tokens=TOKENS)),
    ]


def choose(model: Any, processor: Any) -> int:
    """The scene of the rule."""
    samples = [sample for sample in load_split(SPLIT) if sample.kind in KINDS]
    outcomes = run(model, processor, settings(), samples, split=SPLIT)
    wrong: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for index, sample in enumerate(samples):
        ours, others = wrong[sample.scene_id], outcomes[2:]
        ours[0] += sum(not outcome.correct[index] for outcome in outcomes[:2])
        ours[1] += sum(not outcome.correct[index] for outcome in others)
    return min((one for one in wrong if not wrong[one][0]), key=lambda one: (-wrong[one][1], one))


def answers(model: Any, processor: Any, scene: int) -> list[tuple[Sample, dict[str, str]]]:
    """Every question about the scene with the answer of each method."""
    about = [sample for sample in load_split(SPLIT) if sample.scene_id == scene]
    outcomes = run(model, processor, settings(), about, split=SPLIT)
    return [
        (sample, {outcome.setting.name: outcome.answers[index] for outcome in outcomes})
        for index, sample in enumerate(about)
    ]


def main() -> None:
    """Choose, write, and print what is asked and answered."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--scene", type=int, help="number of the scene, without choosing")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = pitome_vlm.load("demo", dtype="float32")
    scene = choose(model, processor) if wanted.scene is None else wanted.scene
    print(f"scene {scene} of {SPLIT}")
    for sample, given in answers(model, processor, scene):
        print(f"{sample.question} {sample.answer}: {given}")
    image = wanted.output / "scene.png"
    write_bytes(image, png(scene_image(scene, SPLIT, SIZE)))
    command = f"visualize --model demo --image {image} --keep 0.25 --algorithms {DEFAULT}"
    app([*command.split(), "--output", str(wanted.output), "--overwrite"], standalone_mode=False)


if __name__ == "__main__":
    main()
