"""Visual tokens on their way from the projector to the prompt: features, and what they stand for.

Sizes and positions follow from source maps. Nothing here depends on who merged what and why,
nor which model the tokens are for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Positions
from .places import group_places


@dataclass(frozen=True, repr=False)
class VisualTokens:
    """The visual tokens of a batch of images (or videos) as the language model will see them.

    An image's input tokens are those it would have had without merging, in the order of its
    placeholders; of an any-resolution image that is the packed sequence with its newlines.

    Attributes:
        features: one [n_i, C] tensor per image, after the projector.
        source_maps: one [full_counts[i]] int64 tensor per image, the output token of every input
            one.
        full_counts: tokens each image would have had without merging.
        anchors: one [n_i] int64 tensor per image, the input token every output one is named after.
    """

    features: list[Tensor]
    source_maps: list[Tensor]
    full_counts: list[int]
    anchors: list[Tensor]

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{count} of {full}" for count, full in zip(self.counts, self.full_counts, strict=True)
        )
        if not self.features:
            return "VisualTokens(no images)"
        first = self.features[0]
        return f"VisualTokens({counts} tokens, {first.shape[-1]} channels, {first.dtype})"

    @classmethod
    def joined(cls, parts: list[VisualTokens], order: list[int]) -> VisualTokens:
        """The images of all parts one after the other, then put in `order`."""
        lists: list[Any] = [
            [value for part in parts for value in getattr(part, field.name)]
            for field in dataclasses.fields(cls)
        ]
        return cls(*([values[index] for index in order] for values in lists))

    @property
    def counts(self) -> list[int]:
        """Tokens of each image."""
        return [feature.shape[0] for feature in self.features]

    def sizes(self) -> list[Tensor]:
        """One [n_i] float32 per image: patches that each token stands for."""
        pairs = zip(self.source_maps, self.counts, strict=True)
        return [torch.bincount(source, minlength=count).float() for source, count in pairs]

    def positions(self, how: Positions) -> list[Tensor]:
        """Where the tokens of every image sit, counted from its first patch in raster order.

        Args:
            how: "mean", "median" or "original", see `group_places`.

        Returns:
            One [n_i] float32 per image.
        """
        found = []
        for source, anchors in zip(self.source_maps, self.anchors, strict=True):
            raster = torch.arange(len(source), device=source.device).float()[:, None]
            found.append(group_places(raster, source, anchors, how)[:, 0])
        return found


@dataclass(frozen=True)
class Encoded:
    """All visual tokens of one kind in a batch.

    Attributes:
        kind: "image" or "video", as in the names of the model's outputs.
        token_id: the placeholder in the prompt that stands for one of them.
        visual: the tokens; images in the order of their placeholders.
    """

    kind: str
    token_id: int
    visual: VisualTokens
