"""What is compared on the real tower: recipes, budgets that save equal FLOPs, and one cell.

A cell is one recipe at one level of FLOPs. Readers of the tower's features (nearest neighbours,
linear probes) are made from the unmerged tower, as for a model that is merged off the shelf.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters.encoders import encoder_layers, shape_of, size_of
from pitome_vlm.algorithms import MergeContext, MergePlan
from pitome_vlm.measure.flops import layers_flops
from pitome_vlm.merge.algorithms import pitome_plus
from pitome_vlm.merge.budget import schedule_for
from pitome_vlm.merge.presets import PRESETS
from pitome_vlm.merge.steps import every_other_layer, few_layers

LEVELS = (0.8, 0.6, 0.4)
BATCH = 16
LAYERS = 12
FEW, EVERY, OTHER = list(few_layers(LAYERS)), list(range(LAYERS)), list(every_other_layer(LAYERS))


def with_energies(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """pitome_plus as in language models: energies are added to the similarity of two tokens."""
    return pitome_plus.plan(keys, n_out, ctx=replace(ctx, tower_only=False))


ENERGIES = replace(
    pitome_plus.ALGORITHM, name="with_energies", plan=with_energies, encoder_metric=None
)
UNPROTECTED = {"algorithm": "pitome", "protect": False}
DEFAULT = "pitome_plus (default)"
# Name -> options; all layers merge unless the name says otherwise. The most telling ones first: a
# run that is stopped has these.
RECIPES: dict[str, dict[str, Any]] = {
    "tome": {"algorithm": "tome"},
    DEFAULT: {"algorithm": "pitome_plus", "layers": OTHER},
    "pitome (paper)": {"algorithm": "pitome"},
    "pitome, unprotected, hidden": UNPROTECTED | {"metric": "hidden"},
    "tome, hidden": {"algorithm": "tome", "metric": "hidden"},
    "random": {"algorithm": "random"},
    "pitome_plus, all layers": {"algorithm": "pitome_plus"},
    "pitome_plus, hidden": {"algorithm": "pitome_plus", "layers": OTHER, "metric": "hidden"},
    "pitome_plus, hidden, layers 0, 2, 4, 6": {
        "algorithm": "pitome_plus",
        "layers": [0, 2, 4, 6],
        "metric": "hidden",
    },
    "with energies, all layers": {"algorithm": "with_energies"},
    "with energies, as default": {"algorithm": "with_energies", "layers": OTHER},
    "with energies, layers 1, 3, 5, 7": {"algorithm": "with_energies", "layers": [1, 3, 5, 7]},
    "with energies, layers 2, 5": {"algorithm": "with_energies", "layers": FEW},
    "with energies, layers 4, 7": {"algorithm": "with_energies", "layers": [4, 7]},
    "with energies, keys": {"algorithm": "with_energies", "metric": "keys"},
    "pitome, unprotected": UNPROTECTED,
    "tome, as default": {"algorithm": "tome", "layers": OTHER},
    "tome, hidden, layers 2, 5": {"algorithm": "tome", "metric": "hidden", "layers": FEW},
    "released code": PRESETS["released"],
    "pitome, early matching": {"algorithm": "pitome", "early_matching": 0.5},
    "pitome, hidden": {"algorithm": "pitome", "metric": "hidden"},
    "tome, raster order": {"algorithm": "tome", "token_order": "raster"},
    "tofu": {"algorithm": "tofu"},
    "diffrate": {"algorithm": "diffrate"},
    "pitome, elu": {"algorithm": "pitome", "energy": "elu"},
    "pitome, gaussian": {"algorithm": "pitome", "energy": "gaussian"},
    "pitome, margin 0": {"algorithm": "pitome", "margin": 0.0},
    "pitome, margin 0.9": {"algorithm": "pitome", "margin": 0.9},
    "pitome, after the layer": {"algorithm": "pitome", "placement": "after_layer"},
}


def config_of(options: dict[str, Any], tokens: int) -> MergeConfig:
    """A recipe that leaves so many tokens at the end of the tower."""
    return MergeConfig.from_dict({"layers": EVERY, **options, "stage": "tower", "tokens": tokens})


def config_at(model: Any, options: dict[str, Any], level: float, images: Tensor) -> MergeConfig:
    """The recipe at the count whose FLOPs are nearest to a share of the unmerged layers'.

    Comparisons of tokens are counted.
    """
    shape, blocks = shape_of(model, size_of(images)), list(encoder_layers(model))

    def cost(config: MergeConfig) -> int:
        schedule = schedule_for(config, shape)
        return sum(
            layers_flops(blocks, schedule, config, model.config.hidden_size, has_class=True)[0]
        )

    target = level * cost(MergeConfig(keep=1.0, algorithm="none"))
    counts = range(1 + shape.leading_kept, shape.n_tokens + shape.leading_kept)
    above = bisect.bisect_left(counts, target, key=lambda count: cost(config_of(options, count)))
    around = [config_of(options, count) for count in counts[max(0, above - 1) : above + 1]]
    return min(around, key=lambda config: abs(cost(config) - target))


@dataclass(frozen=True)
class Inputs:
    """Pixels of everything that is encoded under every recipe: [B, 3, H, W].

    Attributes:
        photos: for features.
        google: emoji, the gallery.
        twitter: the same emoji in another style, the queries.
        digits: for the probe.
    """

    photos: Tensor
    google: Tensor
    twitter: Tensor
    digits: Tensor


@dataclass(frozen=True)
class Reader:
    """A linear classifier of class tokens [B, C] and the labels of the images it is tried on."""

    weight: np.ndarray
    bias: np.ndarray
    labels: np.ndarray

    def right(self, features: Tensor) -> list[int]:
        """1 or 0 for every image."""
        found = (unit(features).numpy() @ self.weight.T + self.bias).argmax(1)
        return [int(one) for one in found == self.labels]


@dataclass(frozen=True)
class Study:
    """What all cells share: inputs, readers, and the unmerged features of the photos."""

    inputs: Inputs
    groups: Reader
    digits: Reader
    photos: Tensor


def encode(model: Any, pixels: Tensor) -> Tensor:
    """The last hidden state [B, 1 + N, C], class token first."""
    with torch.no_grad():
        parts = [model(part).last_hidden_state for part in pixels.split(BATCH)]
    return torch.cat(parts)


def unit(features: Tensor) -> Tensor:
    """Rows of length one."""
    return torch.nn.functional.normalize(features, dim=-1)


def ranks(queries: Tensor, gallery: Tensor) -> list[int]:
    """The place, from 0, of every query's own row in the gallery, both [B, C]."""
    alike = unit(queries) @ unit(gallery).T
    own = alike.diagonal()[:, None]
    return [int(one) for one in (alike > own).sum(1)]


def correlation(found: Tensor, expected: Tensor) -> list[float]:
    """Pearson's, between the patch maps of every image, [B, N, C]."""
    rows = [(one.flatten(1) - one.flatten(1).mean(1, keepdim=True)) for one in (found, expected)]
    return [round(float(one), 5) for one in torch.cosine_similarity(*rows)]


def measure(model: Any, study: Study, options: dict[str, Any] | None, level: float) -> dict:
    """One cell: scores of every emoji, digit and photo.

    Args:
        model: the tower, not wrapped; it is left as it was.
        study: what all cells share.
        options: a recipe; None for no merging.
        level: share of the FLOPs.
    """
    found, used = {}, {}
    for name, images in vars(study.inputs).items():
        config = MergeConfig(keep=1.0, algorithm="none")
        if options is not None:
            config = config_at(model, options, level, images)
            used[name] = config.tokens
        with pitome_vlm.wrapped(model, config=config):
            found[name] = encode(model, images)
    google, twitter = found["google"][:, 0], found["twitter"][:, 0]
    photo = torch.cosine_similarity(found["photos"][:, 0], study.photos[:, 0])
    return {
        "options": options,
        "tokens": used,
        "ranks": [ranks(twitter, google), ranks(google, twitter)],
        "groups": study.groups.right(twitter),
        "digits": study.digits.right(found["digits"][:, 0]),
        "photo_cls": [round(float(one), 5) for one in photo],
        "photo_patches": correlation(found["photos"][:, 1:], study.photos[:, 1:]),
    }
