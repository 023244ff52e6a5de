"""Models whose tower packs images of any size, and whose tokens have a time, a row and a column.

Units of patches merge in the tower, and what leaves the patch merger is brought to the exact count
of its image. Three mixins that go before the classes of a vLLM model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..adapters.grids import Grid, item_of
from ..adapters.inner_tower import Reading
from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.tiles import merge_grids
from ..merge.tokens import VisualTokens
from .budgets import largest, requested
from .language import Encoder, MergedModel
from .options import OPTIONS_KEY
from .processing import MergedInfo, MergedProcessor
from .tower import mean_over_ranks
from .unit_tower import UNIT_TOWER


class GridInfo(MergedInfo):
    """Mixin: images of any size, and no videos."""

    @override
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        own: Mapping[str, int | None] = super().get_supported_mm_limits()
        return {**own, "video": 0} if self.plan.merges else own

    @override
    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        if not self.plan.merges:
            whole: Mapping[str, int] = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
            return whole
        most = requested(self.plan, largest(self.plan)).new_pass()
        return {"image": most.count(Footprint(self.get_max_image_tokens())).out}


class GridProcessor(MergedProcessor):
    """Mixin: an image has as many tokens as its grid has cells."""

    @override
    def footprints(self, modality: str, full: int, items: Any, index: int) -> list[Footprint]:
        return [Footprint(full)]


class GridModel(MergedModel):
    """Mixin: a tower that packs images of any size, and tokens with a time, a row and a column."""

    axes = 3
    # vLLM would divide images over processes before they are counted.
    supports_encoder_tp_data = False
    visual: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self._plan.merges and not self._plan.shape.projector_only:
            UNIT_TOWER.install(self.visual)

    @override
    def feature_width(self, vllm_config: Any) -> int:
        # With the features for deeper layers of the language model, where there are any.
        width: int = self.visual.out_hidden_size
        return width

    @override
    def cells(self, inputs: dict[str, Any], visual: VisualTokens) -> list[Tensor]:
        return [
            torch.cartesian_prod(*(torch.arange(n) for n in grid)).float()
            for grid in self._grids(inputs)
        ]

    @override
    def count(self, inputs: Mapping[str, Any], name: str) -> int:
        return len(inputs["image_grid_thw"])

    @override
    def only(self, inputs: Mapping[str, Any], members: list[int]) -> dict[str, Any]:
        grids = inputs["image_grid_thw"]
        patches = torch.split(inputs["pixel_values"], grids.prod(-1).tolist())
        chosen = torch.cat([patches[one] for one in members])
        return {"pixel_values": chosen, "image_grid_thw": grids[members]}

    @override
    def encoders(self) -> Mapping[str, Encoder]:
        return {"pixel_values": self._images}

    def _grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Rows and columns of the tokens of every image."""
        side = self.visual.spatial_merge_size
        return [(t, h // side, w // side) for t, h, w in inputs["image_grid_thw"].tolist()]

    def _images(self, inputs: dict[str, Any], merge_pass: MergePass) -> VisualTokens:
        items = [item_of(grid, "image") for grid in self._grids(inputs)]
        with UNIT_TOWER.encoding(self.visual, merge_pass, items, Reading()) as found:
            output = self.visual(inputs["pixel_values"], inputs["image_grid_thw"].tolist())
        # What is merged next must be the same everywhere.
        output = mean_over_ranks(output)
        # After the features those for deeper layers of the language model (deepstack).
        levels = len(getattr(self.visual, "deepstack_merger_list", ()))
        lengths = [item.footprint.full for item in items]
        first, *deeper = (
            list(torch.split(one, lengths)) for one in output.chunk(1 + levels, dim=-1)
        )
        visual = merge_grids(first, items, merge_pass, UNIT_TOWER.groups(found, items))
        merged = zip(visual.features, *(visual.means(one) for one in deeper), strict=True)
        return dataclasses.replace(visual, features=[torch.cat(own, -1) for own in merged])

    @override
    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        if not self._plan.merges:
            positions, moved = super(MergedModel, self).get_mrope_input_positions(
                input_tokens, mm_features
            )
            return positions, moved
        # vLLM's own rule, on the prompt as it would be without merging.
        whole, features, index, seen = list[int](), [], list[int](), 0
        for item in sorted(mm_features, key=lambda one: one.mm_position.offset):
            start, length = item.mm_position.offset, item.mm_position.length
            index += range(len(whole), len(whole) + start - seen)
            whole += input_tokens[seen:start]
            full = int(item.data[OPTIONS_KEY].data[0])
            place = dataclasses.replace(item.mm_position, offset=len(whole), length=full)
            features.append(dataclasses.replace(item, mm_position=place))
            index += [len(whole)] * length
            whole += input_tokens[start : start + 1] * full
            seen = start + length
        index += range(len(whole), len(whole) + len(input_tokens) - seen)
        whole += input_tokens[seen:]
        positions, moved = super(MergedModel, self).get_mrope_input_positions(whole, features)
        return positions[:, index], moved + len(whole) - len(input_tokens)
