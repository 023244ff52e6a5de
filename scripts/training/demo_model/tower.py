"""Stage "tower": dense supervision of the patches, captions for CLS.

Knows what each patch of the feature layer should tell and how CLS is matched with captions, as
CLIP does, so that attention from CLS is not trained to mark objects. Leaves the language
model to `language.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pitome_vlm.demo.processor import GRID
from pitome_vlm.demo.scenes import BACKGROUNDS, COLOURS, SIZES

from . import parallel
from .build import FEATURE_LAYER, build_model
from .data import ALL_SHAPES, Arrays

COMBINATIONS = len(COLOURS) * len(ALL_SHAPES)
PARTS = (COMBINATIONS + 1, 10, len(SIZES), GRID, GRID, 1)
CAPTION = COMBINATIONS + len(COLOURS) + len(ALL_SHAPES) + len(SIZES) + 10 + len(BACKGROUNDS)


class TowerHeads(nn.Module):
    """Linear read-outs that are thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(PARTS))
        self.cls = nn.Linear(width, 128, bias=False)
        self.caption = nn.Linear(CAPTION, 128, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))


@dataclass
class Batch:
    """Images and what each patch of them shows."""

    pixels: Tensor
    present: Tensor
    weight: Tensor
    combination: Tensor
    digit: Tensor
    size: Tensor
    row: Tensor
    column: Tensor
    centre: Tensor
    caption: Tensor


def to_pixels(images: np.ndarray) -> Tensor:
    """What the processor makes of 8-bit images of the model's size."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_batch(arrays: Arrays, indices: np.ndarray) -> Batch:
    objects = torch.from_numpy(arrays.objects[indices]).long()
    patches = torch.from_numpy(arrays.patch_object[indices]).long()
    present = patches >= 0
    shown = objects.gather(1, patches.clamp(min=0)[..., None].expand(-1, -1, objects.shape[-1]))
    colour, shape, size, digit, row, column = shown.unbind(-1)
    combination = torch.where(present, colour * len(ALL_SHAPES) + shape, COMBINATIONS)
    exists = objects[..., 0] >= 0
    # Large things cover many patches; without this, tiny ones hardly count.
    covered = (patches[..., None] == torch.arange(objects.shape[1])).sum(1)
    weight = covered.gather(1, patches.clamp(min=0)).clamp(min=1).float() ** -0.7
    centre = torch.from_numpy(arrays.density[indices])
    background = torch.from_numpy(arrays.background[indices]).long()
    return Batch(
        to_pixels(arrays.images[indices]),
        present,
        weight,
        combination,
        torch.where(present, digit, -1),
        size,
        row,
        column,
        centre,
        captions(objects, exists, background),
    )


def captions(objects: Tensor, exists: Tensor, background: Tensor) -> Tensor:
    """A bag of words of each scene: how often each colour, shape, pair, size and digit occurs."""
    colour, shape, size, digit = objects.clamp(min=0)[..., :4].unbind(-1)
    weight = exists.float()[..., None]
    bags = [
        (functional.one_hot(colour * len(ALL_SHAPES) + shape, COMBINATIONS) * weight).sum(1),
        (functional.one_hot(colour, len(COLOURS)) * weight).sum(1),
        (functional.one_hot(shape, len(ALL_SHAPES)) * weight).sum(1),
        (functional.one_hot(size, len(SIZES)) * weight).sum(1),
        (functional.one_hot(digit, 10) * (objects[..., 3:4] >= 0)).sum(1).float(),
        functional.one_hot(background, len(BACKGROUNDS)).float(),
    ]
    return torch.cat(bags, -1).clamp(max=3)


def tower_outputs(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features of the layer LLaVA reads, and the pooled CLS output."""
    out = tower(pixels, output_hidden_states=True)
    return out.hidden_states[FEATURE_LAYER][:, 1:], out.pooler_output


def weighted(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()


def _caption_loss(heads: TowerHeads, pooled: Tensor, captions_of: Tensor) -> Tensor:
    image = functional.normalize(heads.cls(pooled), dim=-1)
    text = functional.normalize(heads.caption(captions_of), dim=-1)
    logits = image @ text.T * heads.scale.exp().clamp(max=50)
    target = torch.arange(len(logits))
    rows = functional.cross_entropy(logits, target)
    return (rows + functional.cross_entropy(logits.T, target)) / 2


def tower_loss(
    heads: TowerHeads, features: Tensor, pooled: Tensor, b: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    combination, digit, size, row, column, centre = heads.patch(heads.norm(features)).split(
        PARTS, -1
    )
    on = b.present
    per_patch = functional.cross_entropy(
        combination.flatten(0, 1), b.combination.flatten(), reduction="none"
    )
    flat_on = on.flatten()
    losses = {
        "object": weighted(per_patch[flat_on], b.weight[on]),
        "ground": per_patch[~flat_on].mean(),
        "size": weighted(
            functional.cross_entropy(size[on], b.size[on], reduction="none"), b.weight[on]
        ),
        "row": functional.cross_entropy(row[on], b.row[on]),
        "column": functional.cross_entropy(column[on], b.column[on]),
        "centre": functional.binary_cross_entropy_with_logits(
            centre[..., 0], b.centre.clamp(max=1), reduction="none"
        )
        .sum(-1)
        .mean(),
    }
    written = on & (b.digit >= 0)
    losses["digit"] = (
        functional.cross_entropy(digit[written], b.digit[written])
        if bool(written.any())
        else digit.sum() * 0
    )
    losses["clip"] = _caption_loss(heads, pooled, b.caption)
    weights = {"size": 0.3, "row": 0.2, "column": 0.2, "centre": 0.1, "clip": 0.1}
    total = torch.stack([value * weights.get(name, 1.0) for name, value in losses.items()]).sum()
    return total, losses


@torch.no_grad()
def tower_scores(
    tower: nn.Module, heads: TowerHeads, arrays: Arrays, count: int
) -> dict[str, float]:
    """Accuracies on object patches (and how many ground patches are taken for objects)."""
    tally: dict[str, list[float]] = {}
    for first in range(0, min(count, len(arrays)), 32):
        b = make_batch(arrays, np.arange(first, min(first + 32, len(arrays))))
        features, _ = tower_outputs(tower, b.pixels)
        combination, digit, size, row, _, centre = heads.patch(heads.norm(features)).split(
            PARTS, -1
        )
        on, written = b.present, b.present & (b.digit >= 0)
        tiny = on & (b.size == 0)
        hits = {
            "object": (combination.argmax(-1) == b.combination)[on],
            "tiny": (combination.argmax(-1) == b.combination)[tiny],
            "ground": (combination.argmax(-1) == b.combination)[~on],
            "digit": (digit.argmax(-1) == b.digit)[written],
            "size": (size.argmax(-1) == b.size)[on],
            "row": (row.argmax(-1) == b.row)[on],
            # Whether the density, summed over the image, rounds to the number of objects.
            "counted": centre[..., 0].sigmoid().sum(-1).round() == b.centre.sum(-1).round(),
        }
        for name, hit in hits.items():
            entry = tally.setdefault(name, [0.0, 0.0])
            entry[0] += float(hit.sum())
            entry[1] += hit.numel()
    return {name: round(right / max(1.0, seen), 3) for name, (right, seen) in tally.items()}


def train_tower(
    folder: Path,
    minutes: float,
    batch: int,
    sizes: dict[str, int],
    rates: tuple[float, float],
    seed: int = 0,
) -> None:
    """Train the tower for `minutes` of processor time; resumes from tower.pt if it exists."""
    rank, _ = parallel.start()
    torch.manual_seed(seed)
    tower = build_model(**sizes).model.vision_tower
    heads = TowerHeads(tower.config.hidden_size)
    data = folder / "data"
    arrays, val = Arrays.load(data / f"train{rank}"), Arrays.load(data / "val")
    loop = parallel.Loop(folder / "tower.pt", {"tower": tower, "heads": heads}, rates)

    def loss(scenes: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        b = make_batch(arrays, scenes)
        return tower_loss(heads, *tower_outputs(tower, b.pixels), b)

    def score(final: bool) -> dict[str, float]:
        return tower_scores(tower, heads, val, 400 if final else 64)

    loop.run(minutes, batch, len(arrays), loss, score)
