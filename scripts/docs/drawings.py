"""Draw the images of docs/how-it-works.md: `python -m scripts.docs.drawings --output docs/assets`.

flow.svg shows the way of an image through a model, calibration-*.png what the language model is
told about the scene of the README. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

import pitome_vlm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ASSETS = Path(__file__).resolve().parents[2] / "docs/assets"
TOKENS = 36
TEXT_TOKENS = 12
STEPS = (
    ("pixels", "one image", "#e8eaf6"),
    ("vision tower", "merges between\nits layers", "#c5cae9"),
    ("projector", "last step to\nthe exact count", "#c5cae9"),
    ("short prompt", "144 tokens\nbecome 36", "#e8eaf6"),
    ("language model", "told size and place\nof every token", "#d1c4e9"),
)


@dataclass(frozen=True)
class Merged:
    """What the model made of the scene.

    Attributes:
        groups: [patches] int64, the token of every patch.
        sizes: [tokens] patches of every token.
        places: [tokens] mean raster position.
    """

    groups: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    places: npt.NDArray[np.float32]

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return round(len(self.groups) ** 0.5)

    def hues(self) -> npt.NDArray[np.float64]:
        """[tokens, 4] a colour per token, golden steps apart."""
        colours: npt.NDArray[np.float64] = plt.get_cmap("hsv")(
            np.arange(len(self.sizes)) * 0.618 % 1
        )
        return colours


def merged(scene: Path) -> Merged:
    """The scene merged to `TOKENS` by default, in float32."""
    model, processor = pitome_vlm.load("demo", tokens=TOKENS, dtype="float32")
    with Image.open(scene) as image:
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        visual = pitome_vlm.encode_images(model, pixels)
    found = visual.source_maps[0], visual.sizes()[0], visual.positions("mean")[0]
    groups, sizes, places = (one.numpy() for one in found)
    return Merged(groups, sizes.astype(np.int64), places)


def flow(path: Path) -> None:
    """Boxes from pixels to the language model, with the plan over those that merge."""
    figure, axes = _bare(11, 2.6)
    for index, (name, note, colour) in enumerate(STEPS):
        x = index * 2.0
        axes.add_patch(plt.Rectangle((x, 0), 1.55, 1, fc=colour, ec="#3f51b5", lw=1.2))
        axes.text(x + 0.775, 0.74, name, ha="center", va="center", weight="bold", fontsize=9)
        axes.text(x + 0.775, 0.34, note, ha="center", va="center", fontsize=8)
        if index:
            _arrow(axes, (x - 0.43, 0.5), (x - 0.02, 0.5))
    axes.add_patch(plt.Rectangle((2, 1.45), 3.55, 0.55, fc="#fff3e0", ec="#e65100", lw=1.2))
    words = "plan: tokens left after every layer, from the budget"
    axes.text(3.775, 1.725, words, ha="center", va="center", fontsize=8)
    for x in (2.775, 4.775):
        _arrow(axes, (x, 1.45), (x, 1.03))
    axes.set(xlim=(-0.1, 9.7), ylim=(-0.1, 2.1))
    _save(figure, path)


def sizes(shown: Merged, scene: Path, path: Path) -> None:
    """The scene, and next to it the patches that the token of every patch stands for."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
    with Image.open(scene) as image:
        left.imshow(image)
    left.set_title(f"{len(shown.groups)} patches", fontsize=10)
    counts = shown.sizes[shown.groups].reshape(shown.grid, shown.grid)
    right.imshow(np.log(counts), cmap="Purples")
    for (row, column), count in np.ndenumerate(counts):
        dark = count > counts.max() ** 0.6
        colour = "white" if dark else "black"
        right.text(column, row, count, ha="center", va="center", fontsize=7, color=colour)
    words = f"{len(shown.sizes)} tokens: how many patches each stands for\n(colour: log of it)"
    right.set_title(words, fontsize=10)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
    _save(figure, path)


def places(shown: Merged, path: Path) -> None:
    """Patches on a line, and their tokens under them at the mean of their places."""
    figure, axes = _bare(10, 2.7)
    hues = shown.hues()
    for patch, token in enumerate(shown.groups):
        axes.plot([patch, shown.places[token]], [1.9, 1.1], color=hues[token], lw=0.7, alpha=0.7)
    patches = np.arange(len(shown.groups))
    axes.scatter(patches, np.full(len(patches), 2), c=hues[shown.groups], s=14, marker="s")
    area = 10 + 6 * shown.sizes
    axes.scatter(shown.places, np.ones(len(shown.sizes)), c=hues, s=area, ec="black", lw=0.4)
    axes.scatter(np.arange(len(shown.sizes)), np.zeros(len(shown.sizes)), c="0.6", s=14)
    label = {"ha": "right", "va": "center", "fontsize": 9}
    axes.text(-3, 2, f"{len(shown.groups)} patches", **label)
    axes.text(-3, 1, f"{len(shown.sizes)} tokens,\ncalibrated", **label)
    axes.text(-3, 0, "without\ncalibration", **label)
    axes.set(xlim=(-22, len(shown.groups) + 1), ylim=(-0.5, 2.4))
    _save(figure, path)


def text(shown: Merged, path: Path) -> None:
    """Where the words after the image sit: unmerged, calibrated, without calibration."""
    figure, axes = _bare(10, 2.4)
    patches, tokens = len(shown.groups), len(shown.sizes)
    rows = (
        ("not merged", np.arange(patches), patches),
        ("calibrated", shown.places, patches),
        ("without\ncalibration", np.arange(tokens), tokens),
    )
    for index, (name, image, start) in enumerate(rows):
        y = 2 - index
        axes.text(-3, y, name, ha="right", va="center", fontsize=9)
        axes.scatter(image, np.full(len(image), y), c="#3f51b5", s=12, marker="s")
        words = start + np.arange(TEXT_TOKENS)
        axes.scatter(words, np.full(TEXT_TOKENS, y), c="#e65100", s=12, marker="s")
    axes.text(patches + TEXT_TOKENS + 2, 1, "blue: image\norange: text", va="center", fontsize=9)
    axes.set(xlim=(-22, patches + TEXT_TOKENS + 20), ylim=(-0.5, 2.5))
    _save(figure, path)


def _bare(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_axis_off()
    return figure, axes


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#37474f"})


def _save(figure: Any, path: Path) -> None:
    plain = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata=plain, facecolor="white")
    plt.close(figure)


def draw(folder: Path, scene: Path) -> list[Path]:
    """Write all drawings into `folder`; returns their paths."""
    matplotlib.rcParams["svg.hashsalt"] = "pitome_vlm"
    names = ("flow.svg", "calibration-sizes.png", "calibration-places.png", "calibration-text.png")
    paths = [folder / name for name in names]
    shown = merged(scene)
    flow(paths[0])
    sizes(shown, scene, paths[1])
    places(shown, paths[2])
    text(shown, paths[3])
    return paths


def main() -> None:
    """Draw, and print what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--scene", type=Path, default=ASSETS / "scene.png", help="image to merge")
    wanted = parser.parse_args()
    for path in draw(wanted.output, wanted.scene):
        print(path)


if __name__ == "__main__":
    main()
