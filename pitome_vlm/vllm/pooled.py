"""Models whose projector pools or shuffles the patches of tiles of one size.

Every tile is merged for itself and brought to its own exact count (`merge_grids`), as in the
library; an image is its tiles one after the other. Two mixins that go before the classes of a vLLM
model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..adapters.grids import item_of
from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.tiles import PackedItem, merge_grids
from ..merge.tokens import VisualTokens
from .language import Encoder, MergedModel
from .processing import MergedProcessor
from .served import record_of
from .tower import mean_over_ranks


class PooledProcessor(MergedProcessor):
    """Mixin: images of one tile or several, and videos whose frames are tiles."""

    @override
    def footprints(self, modality: str, full: int, items: Any, index: int) -> list[Footprint]:
        tile = self._plan.schedule.tokens_in
        if not full or full % tile:
            raise ValueError(
                f"vLLM makes {full} visual tokens of an image where tiles of {tile} were expected; "
                "the model's config.json does not fit its processor"
            )
        return [Footprint(tile)] * (full // tile)


class PooledModel(MergedModel):
    """Mixin: tiles are read, merged and joined to images."""

    # By the input that holds pixels, the one that says how many tiles every image has.
    tiles: ClassVar[Mapping[str, str]]

    @override
    def encoders(self) -> Mapping[str, Encoder]:
        return {name: functools.partial(self._tokens, name) for name in self.tiles}

    @override
    def count(self, inputs: Mapping[str, Any], name: str) -> int:
        return len(inputs[self.tiles[name]])

    @override
    def only(self, inputs: Mapping[str, Any], members: list[int]) -> dict[str, Any]:
        name = next(one for one in self.tiles if inputs.get(one) is not None)
        lengths = inputs[self.tiles[name]]
        parts = torch.split(inputs[name], lengths.tolist())
        chosen = torch.cat([parts[one] for one in members])
        return {name: chosen, self.tiles[name]: lengths[members]}

    def projected(
        self, pixels: Tensor, merge_pass: MergePass, items: Sequence[PackedItem]
    ) -> Tensor:
        """Tower and projector: [tiles, N, C] of tiles [tiles, 3, H, W].

        Args:
            pixels: of all tiles.
            merge_pass: what is merged in the tower.
            items: the tiles.
        """
        raise NotImplementedError

    def _tokens(self, name: str, inputs: dict[str, Any], merge_pass: MergePass) -> VisualTokens:
        pixels = inputs[name]
        grids = record_of(self.config).family.grids(self.config, {"pixel_values": pixels}, "image")
        items = [item_of(grid, "image") for grid in grids]
        # What is merged next must be the same everywhere.
        projected = mean_over_ranks(self.projected(pixels, merge_pass, items))
        visual = merge_grids(list(projected), items, merge_pass)
        return visual.glued(inputs[self.tiles[name]].tolist())
