"""Qwen2-VL and Qwen2.5-VL of Hugging Face: pictures and videos merged behind the tower.

Knows: `image_grid_thw`, the model's own features behind its patch merger, and that it gives every
token a place in time, rows and columns (mrope), which a merged token keeps. Does not know: how the
tower attends (it is left alone), prompts, algorithms.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common import whole_number
from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tiles import PackedItem, merge_grids
from ..merge.tokens import Encoded
from .features import token_id
from .parts import ModelParts

KINDS = {"pixel_values": "image", "pixel_values_videos": "video"}
# Behind which a kind's grids stand: (frames, rows, columns) of patches in front of the merger.
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
PLACES = ("second_per_grid_ts", "mm_token_type_ids")


class QwenVLAdapter:
    """Qwen2VLForConditionalGeneration and Qwen2_5_VLForConditionalGeneration."""

    model_types: tuple[str, ...] = ("qwen2_5_vl", "qwen2_vl")
    calls = "transformers"
    counted_per = "image"
    pixel_inputs: Mapping[str, str] = KINDS
    vision_inputs: tuple[str, ...] = (*KINDS, *GRIDS.values(), *PLACES)
    feature_options: tuple[str, ...] = ()
    # A photo.
    default_image_size: tuple[int, int] | None = (768, 1024)
    videos_pooled_first = False
    own_positions = True
    place_inputs: tuple[str, ...] = PLACES

    def matches(self, model: Any) -> bool:
        """By model type and parts."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        core = getattr(model, "model", None)
        return model_type in self.model_types and all(
            hasattr(core, name) for name in ("visual", "language_model", "get_rope_index")
        )

    def parts(self, model: Any) -> ModelParts:
        """See `Adapter`; the patch merger is counted as part of the tower."""
        core = model.model
        config = model.config.vision_config
        return ModelParts(core.visual, config, nn.Identity(), (core.language_model,))

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """See `Adapter`; the numbers of a typical picture, others have their share."""
        del feature_options
        layers = len(model.model.visual.blocks)
        full = self.footprint(model).full
        return TowerShape(full, 0, 0, layers, layers, packed=True, projector_only=True)

    def install(self, model: Any, *, inside_tower: bool) -> None:
        """Nothing: the tower is left alone."""

    def uninstall(self, model: Any) -> None:
        """Nothing was installed."""

    def text_config(self, model: Any) -> Any:
        """See `Adapter`."""
        return model.model.language_model.config

    def placeholder_ids(self, model: Any) -> dict[str, int]:
        """See `Adapter`."""
        return {kind: token_id(model.config, kind) for kind in KINDS.values()}

    def footprint(
        self,
        model: Any,
        *,
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        **feature_options: Any,
    ) -> Footprint:
        """See `Adapter`; of a picture whose sides the processor rounds to whole cells."""
        del feature_options
        rows, columns = self._cells(model, image_size)
        if frames is None:
            return Footprint(rows * columns)
        together = model.config.vision_config.temporal_patch_size
        frames = math.ceil(whole_number("frames", frames, 1) / together)
        return Footprint(frames * rows * columns, frames=frames)

    def opening_token(self, model: Any) -> int | None:
        """See `Adapter`: releases before 5 look for it to find the pictures."""
        return int(model.config.vision_start_token_id)

    def random_pictures(
        self,
        model: Any,
        ids: Tensor,
        n_pictures: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """See `Adapter`: patches in rows, and the grid they are from."""
        vision, (rows, columns) = model.config.vision_config, self._cells(model, image_size)
        side = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        patches = n_pictures * rows * columns * side**2
        found = {
            "pixel_values": torch.randn(patches, width, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows * side, columns * side]] * n_pictures),
        }
        # What tells text from pictures in releases that do not look for the opening token.
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            found["mm_token_type_ids"] = (ids == self.placeholder_ids(model)["image"]).long()
        return found

    def _cells(self, model: Any, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns behind the patch merger; sides are rounded to whole cells."""
        vision, size = model.config.vision_config, image_size or self.default_image_size
        assert size is not None
        cell = vision.patch_size * vision.spatial_merge_size
        rows, columns = (max(1, round(side / cell)) for side in size)
        return rows, columns

    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        """See `Adapter`."""
        return {
            kind: [_footprint(grid, kind) for grid in _grids(model, inputs, kind)]
            for name, kind in KINDS.items()
            if inputs.get(name) is not None
        }

    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        """`get_image_features` and `get_video_features` of the model itself, then merging.

        Args:
            model: the model.
            inputs: `pixel_values` with `image_grid_thw`, `pixel_values_videos` with
                `video_grid_thw`, as the processor makes them.
            merge_pass: a fresh pass.
        """
        encoded = []
        for name, kind in KINDS.items():
            if inputs.get(name) is None:
                continue
            grids = _grids(model, inputs, kind)
            read = getattr(model.model, f"get_{kind}_features")
            found = read(inputs[name], inputs[GRIDS[kind]])
            features = list(getattr(found, "pooler_output", found))
            items = [_item(grid, kind) for grid in grids]
            visual = merge_grids(features, items, merge_pass.fresh())
            encoded.append(Encoded(kind, self.placeholder_ids(model)[kind], visual))
        return encoded

    def prompt_places(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor | None:
        """[B, T, 3] float32, time, row and column of every token of the unmerged prompt.

        Raises:
            ValueError: there are no ids to find the pictures in.
        """
        given = inputs.get("position_ids")
        if isinstance(given, Tensor):
            own = given if given.dim() == 3 else given.expand(3, *given.shape)
            return own[-3:].permute(1, 2, 0).float()
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError(
                "input_ids are needed beside pixel_values: this model's positions follow from "
                "where its pictures stand; pass input_ids, or position_ids of your own"
            )
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None:
            kinds = torch.zeros_like(ids)
            for number, token in enumerate(self.placeholder_ids(model).values(), start=1):
                kinds = kinds.masked_fill(ids == token, number)
        values = {name: inputs.get(name) for name in (*GRIDS.values(), "second_per_grid_ts")}
        values |= {"mm_token_type_ids": kinds, "attention_mask": mask}
        taken = inspect.signature(model.model.get_rope_index).parameters
        known = {name: value for name, value in values.items() if name in taken}
        places, _ = model.model.get_rope_index(ids, **known)
        found: Tensor = places.permute(1, 2, 0).float()
        return found

    def tower_flops(self, model: Any, footprint: Footprint) -> int | None:
        """See `Adapter`: patches through all linear layers, attention in windows or in full.

        Windows are taken as full ones (the last of a row may be smaller).
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


def _linear(module: nn.Module) -> int:
    layers = (part for part in module.modules() if isinstance(part, nn.Linear))
    return 2 * sum(layer.in_features * layer.out_features for layer in layers)


def _grids(model: Any, inputs: Mapping[str, Any], kind: str) -> list[tuple[int, int, int]]:
    """(frames, rows, columns) of every picture behind the patch merger.

    Raises:
        ValueError: the grids are missing.
    """
    grids = inputs.get(GRIDS[kind])
    if grids is None:
        raise ValueError(
            f"{GRIDS[kind]} is missing: this model needs the grid of every {kind} beside its "
            "pixels; pass everything that the processor returned"
        )
    side = model.config.vision_config.spatial_merge_size
    return [(t, h // side, w // side) for t, h, w in torch.as_tensor(grids).tolist()]


def _footprint(grid: tuple[int, int, int], kind: str) -> Footprint:
    return Footprint(math.prod(grid), frames=grid[0] if kind == "video" else 0)


def _item(grid: tuple[int, int, int], kind: str) -> PackedItem:
    planes = tuple(torch.arange(math.prod(grid)).view(grid))
    frames = tuple(range(grid[0])) if kind == "video" else None
    return PackedItem(_footprint(grid, kind), planes, frames)
