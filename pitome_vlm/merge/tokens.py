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

    def glued(self, lengths: list[int]) -> VisualTokens:
        """Tiles that follow each other as images, of so many tiles each."""
        features, sources, fulls, anchors = [], [], [], []
        start = 0
        for length in lengths:
            own = slice(start, start + length)
            counts, full = self.counts[own], self.full_counts[own]
            before = [sum(counts[:index]) for index in range(length)]
            missing = [sum(full[:index]) for index in range(length)]
            pairs = zip(self.source_maps[own], before, strict=True)
            sources.append(torch.cat([source + done for source, done in pairs]))
            pairs = zip(self.anchors[own], missing, strict=True)
            anchors.append(torch.cat([anchor + done for anchor, done in pairs]))
            features.append(torch.cat(self.features[own]))
            fulls.append(sum(full))
            start += length
        return VisualTokens(features, sources, fulls, anchors)

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

    def means(self, values: list[Tensor]) -> list[Tensor]:
        """[full_counts[i], C] of every image to [n_i, C]: plain means over the merged tokens."""
        found = []
        for own, source, count in zip(values, self.source_maps, self.counts, strict=True):
            source = source.to(own.device)
            wide = own.to(torch.promote_types(own.dtype, torch.float32))
            total = wide.new_zeros(count, own.shape[1]).index_add(0, source, wide)
            sizes = torch.bincount(source, minlength=count)[:, None]
            found.append((total / sizes).to(own.dtype))
        return found


@dataclass(frozen=True)
class HandedOver:
    """What a model's own function for features returned, to be handed back with merged ones.

    Attributes:
        output: of that function, a `ModelOutput` of transformers.
        field: of the output, the features that are put into the prompt.
        levels_field: of the output, features of the same tokens for deeper layers; None for none.
        levels: of every level one [n_i, C] tensor per image, merged.
    """

    output: Any
    field: str
    levels_field: str | None = None
    levels: tuple[list[Tensor], ...] = ()

    def with_levels(self, levels: list[list[Tensor]]) -> HandedOver:
        """The same with merged features of all levels."""
        return dataclasses.replace(self, levels=tuple(levels))

    def without_states(self) -> HandedOver:
        """The same without the states of the tower, which nobody reads again."""
        states = ("last_hidden_state", "hidden_states", "attentions")
        kept = {name: value for name, value in self.output.items() if name not in states}
        return dataclasses.replace(self, output=type(self.output)(**kept))

    def rows(self, features: list[Tensor], index: Tensor) -> Any:
        """The output with some of the merged tokens instead of its own.

        Args:
            features: one [n_i, C] tensor per image.
            index: [m] int64 into all tokens of all images.
        """
        changed = {self.field: _like(getattr(self.output, self.field), features, index)}
        if self.levels_field is not None:
            own = getattr(self.output, self.levels_field)
            pairs = zip(own, self.levels, strict=True)
            changed[self.levels_field] = [_like(old, new, index) for old, new in pairs]
        return type(self.output)(**dict(self.output.items()) | changed)


def _like(own: Any, merged: list[Tensor], index: Tensor) -> Any:
    """Chosen rows of the merged tokens in the form of a model's own features."""
    rows = torch.cat(merged)
    rows = rows[index.to(rows.device)]
    if not isinstance(own, Tensor):
        return [rows]
    return rows if own.dim() == 2 else rows[None]


@dataclass(frozen=True)
class Encoded:
    """All visual tokens of one kind in a batch.

    Attributes:
        kind: "image" or "video", as in the names of the model's outputs.
        token_id: the placeholder in the prompt that stands for one of them.
        visual: the tokens; images in the order of their placeholders.
        handed: where the model's own forward puts them into the prompt.
    """

    kind: str
    token_id: int
    visual: VisualTokens
    handed: HandedOver | None = None
