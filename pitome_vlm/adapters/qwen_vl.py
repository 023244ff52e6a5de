"""Hugging Face Qwen2-VL and Qwen2.5-VL: images and videos merged after the tower.

The tower is left alone. Its features after the patch merger are merged on the grids that
`image_grid_thw` gives, and every merged token keeps a place in time, rows and columns (mrope).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import Schedule, TowerShape
from ..merge.tiles import merge_grids
from ..merge.tokens import Encoded
from ..releases import accepted
from .base import Adapter
from .grids import Grid, footprint_of, given_grids, item_of, rope_places
from .parts import ModelParts

KINDS = {"pixel_values": "image", "pixel_values_videos": "video"}
# The argument that holds a kind's grids: (frames, rows, columns) of patches before the merger.
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
PLACES = ("second_per_grid_ts", "mm_token_type_ids")


class QwenVLAdapter(Adapter):
    """Qwen2VLForConditionalGeneration and Qwen2_5_VLForConditionalGeneration.

    Inputs: `pixel_values` with `image_grid_thw`, `pixel_values_videos` with `video_grid_thw`, as
    the processor makes them. The patch merger counts as part of the tower.
    """

    model_types: tuple[str, ...] = ("qwen2_5_vl", "qwen2_vl")
    part_names: Mapping[str, str] = {"vision_tower": "visual", "language_model": "language_model"}
    pixel_inputs: Mapping[str, str] = KINDS
    vision_inputs: tuple[str, ...] = (*KINDS, *GRIDS.values(), *PLACES)
    # A photo.
    default_image_size: tuple[int, int] | None = (768, 1024)
    own_positions = True
    sized_by_processor = True
    place_inputs: tuple[str, ...] = PLACES

    @override
    def matches(self, model: Any) -> bool:
        return super().matches(model) and hasattr(model.model, "get_rope_index")

    @override
    def parts(self, model: Any) -> ModelParts:
        core = model.model
        config = model.config.vision_config
        return ModelParts(core.visual, config, nn.Identity(), (core.language_model,))

    @override
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """The numbers of a typical image; budgets of others follow from their own footprint."""
        layers = len(model.model.visual.blocks)
        full = self.footprint(model).full
        return TowerShape(
            full, 0, 0, layers, layers, packed=True, projector_only=True, typical=True
        )

    @override
    def install(self, model: Any, *, inside_tower: bool) -> None:
        # The tower is left alone.
        pass

    @override
    def uninstall(self, model: Any) -> None:
        pass

    @override
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        rows, columns = _cells(model, size)
        return Footprint(rows * columns)

    @override
    def video_footprint(
        self, model: Any, frames: int, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        rows, columns = _cells(model, size)
        frames = math.ceil(frames / model.config.vision_config.temporal_patch_size)
        return Footprint(frames * rows * columns, frames=frames)

    @override
    def opening_token(self, model: Any) -> int | None:
        # Releases of transformers before 5 look for it to find the images.
        return int(model.config.vision_start_token_id)

    @override
    def random_images(
        self,
        model: Any,
        ids: Tensor,
        n_images: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        vision = model.config.vision_config
        rows, columns = _cells(model, image_size or self.default_image_size)
        side = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        patches = n_images * rows * columns * side**2
        return {
            "pixel_values": torch.randn(patches, width, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows * side, columns * side]] * n_images),
            **self.image_marks(model, ids),
        }

    @override
    def image_marks(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        # What tells text from images in releases that do not look for the opening token.
        kinds = (ids == self.placeholder_ids(model)["image"]).long()
        return accepted(model.forward, {"mm_token_type_ids": kinds})

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        return {
            kind: [footprint_of(grid, kind) for grid in _grids(model, inputs, kind)]
            for name, kind in KINDS.items()
            if inputs.get(name) is not None
        }

    @override
    def image_planes(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        return [item_of(grid, "image").canvases for grid in _grids(model, inputs, "image")]

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        encoded = []
        for name, kind in KINDS.items():
            if inputs.get(name) is None:
                continue
            grids = _grids(model, inputs, kind)
            read = getattr(model.model, f"get_{kind}_features")
            found = read(inputs[name], inputs[GRIDS[kind]])
            features = list(getattr(found, "pooler_output", found))
            items = [item_of(grid, kind) for grid in grids]
            visual = merge_grids(features, items, merge_pass.fresh())
            encoded.append(Encoded(kind, self.placeholder_ids(model)[kind], visual))
        return encoded

    @override
    def prompt_places(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor | None:
        return rope_places(model, self.placeholder_ids(model), inputs, mask)

    @override
    def tower_flops(
        self, model: Any, footprint: Footprint, schedule: Schedule | None = None
    ) -> int | None:
        """Patches through all linear layers, and attention in windows or over the whole frame.

        All windows count as full ones, although the last of a row may be smaller.
        """
        visual, vision = model.model.visual, model.config.vision_config
        merged = vision.spatial_merge_size**2
        patches = footprint.full * merged
        blocks, width = visual.blocks, visual.blocks[0].attn.qkv.in_features
        total = patches * _linear(blocks) + footprint.full * _linear(visual.merger)
        total += patches * 2 * visual.patch_embed.proj.weight.numel()
        everywhere = getattr(vision, "fullatt_block_indexes", None)
        window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
        frame = patches // max(1, footprint.frames)
        for index in range(len(blocks)):
            whole = everywhere is None or index in everywhere
            total += 4 * patches * (frame if whole else min(frame, window)) * width
        return int(total)


def _cells(model: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns after the patch merger; the processor rounds sides to whole cells."""
    assert size is not None
    vision = model.config.vision_config
    cell = vision.patch_size * vision.spatial_merge_size
    rows, columns = (max(1, round(side / cell)) for side in size)
    return rows, columns


def _linear(module: nn.Module) -> int:
    layers = (part for part in module.modules() if isinstance(part, nn.Linear))
    return 2 * sum(layer.in_features * layer.out_features for layer in layers)


def _grids(model: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """(frames, rows, columns) of every image or video after the patch merger."""
    side = model.config.vision_config.spatial_merge_size
    return [(t, h // side, w // side) for t, h, w in given_grids(inputs, kind)]
