"""vLLM's LLaVA-NeXT and LLaVA-OneVision with merged visual tokens.

Tiles and frames are merged in the tower, packed by vLLM's own function and brought to the exact
count of their image or video by `merge/tiles.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from typing_extensions import override
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import EmbeddingItems

from ..adapters.features import frame_canvases, tile_canvases
from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.tiles import PackedItem, merge_packed
from ..merge.tokens import VisualTokens
from .budgets import check_frames
from .language import Encoder, MergedModel
from .processing import MergedDummies, MergedInfo, MergedProcessor
from .tower import mean_over_ranks, tower_features


class TiledProcessor(MergedProcessor):
    """Mixin: images of any size, and videos."""

    @override
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Any:
        videos = mm_items.get("video")
        if videos and not isinstance(videos, EmbeddingItems):
            for number, item in enumerate(out_mm_kwargs["video"]):
                given, left = videos.get_num_frames(number), len(self.looked_at(item))
                check_frames(given, left, hf_processor_mm_kwargs)
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

    @override
    def looked_at(self, item: Any) -> Tensor:
        if "pixel_values_videos" in item:
            frames: Tensor = item["pixel_values_videos"].data
            return frames
        overview: Tensor = item["pixel_values"].data[:1]
        return overview

    @override
    def footprints(self, modality: str, full: int, items: Any, index: int) -> list[Footprint]:
        # For counting it is enough that there are newlines.
        if modality == "video":
            frames = items.get_num_frames(index)
            return [Footprint(full, frames, 1, frames)]
        return [Footprint(full, newlines=1)]


class TiledModel(MergedModel):
    """Mixin: images of several tiles."""

    # vLLM's function that packs the tiles of an image; a plain function of a stand-in for self.
    packing: Any

    @override
    def encoders(self) -> Mapping[str, Encoder]:
        return {"pixel_values": self._images}

    def _images(self, inputs: dict[str, Any], merge_pass: MergePass) -> VisualTokens:
        image = self._parse_and_validate_image_input(**inputs)
        sizes = [tuple(one) for one in image["image_sizes"].tolist()]
        shapes = [
            self._tiles(size, len(own))
            for size, own in zip(sizes, image["pixel_values"], strict=True)
        ]
        # Without the tiles that pad a batch.
        pixels = torch.cat(
            [
                own[: 1 + high * wide]
                for own, (high, wide) in zip(image["pixel_values"], shapes, strict=True)
            ]
        )
        assert merge_pass.grid is not None
        items = [
            PackedItem(
                self._footprint(size, 1 + high * wide, merge_pass),
                tile_canvases(high, wide, merge_pass.grid),
            )
            for size, (high, wide) in zip(sizes, shapes, strict=True)
        ]

        def pack(tiles: list[Tensor], newline: Tensor) -> list[Tensor]:
            return [
                self._packed(size, own, newline) for size, own in zip(sizes, tiles, strict=True)
            ]

        projected = self._projected(pixels, merge_pass)
        return merge_packed(projected, items, pack, self.image_newline, merge_pass)

    def _projected(self, pixels: Tensor, merge_pass: MergePass) -> Tensor:
        """[tiles, M, C] of tiles or frames [tiles, 3, H, W]."""
        strategy = self.config.vision_feature_select_strategy
        features = tower_features(self.vision_tower, pixels, merge_pass, strategy)
        # What is merged next must be the same everywhere.
        return mean_over_ranks(self.multi_modal_projector(features))

    def _tiles(self, size: tuple[int, int], most: int) -> tuple[int, int]:
        """(rows, columns) of the tiles of an image (height, width); (0, 0) for the overview."""
        if most == 1:
            return 0, 0
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        high, wide = get_anyres_image_grid_shape(size, pinpoints, side)
        return int(high), int(wide)

    def _packed(self, size: tuple[int, int], tiles: Tensor, newline: Tensor) -> Tensor:
        """The tiles [t, N, C] of an image to its sequence [L, C], by vLLM's own function."""
        stand_in = SimpleNamespace(config=self.config, image_newline=newline)
        packed: Tensor = type(self).packing(stand_in, torch.tensor(size), tiles)
        return packed

    def _footprint(self, size: tuple[int, int], tiles: int, merge_pass: MergePass) -> Footprint:
        """The counts of an image: newlines are what comes out as ones."""
        blank = torch.zeros(tiles, merge_pass.schedule.n_tokens, 1)
        packed = self._packed(size, blank, torch.ones(1))
        return Footprint(len(packed), tiles, int(packed.sum()))


class PiToMeLlavaNextProcessingInfo(MergedInfo, LlavaNextProcessingInfo):
    """What is merged."""


class PiToMeLlavaNextDummyInputsBuilder(MergedDummies, LlavaDummyInputsBuilder):
    """Dummy images of the largest budget."""


class PiToMeLlavaNextMultiModalProcessor(TiledProcessor, LlavaNextMultiModalProcessor):
    """Counts merged tokens."""


def _pack_next(stand_in: Any, size: Tensor, tiles: Tensor) -> Tensor:
    packed: Tensor = LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
        stand_in, size, tiles, strategy="spatial_unpad"
    )
    return packed


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeLlavaNextMultiModalProcessor,
    info=PiToMeLlavaNextProcessingInfo,
    dummy_inputs=PiToMeLlavaNextDummyInputsBuilder,
)
class PiToMeLlavaNextForConditionalGeneration(
    TiledModel, LlavaNextForConditionalGeneration, SupportsMRoPE
):
    """LLaVA-NeXT whose visual tokens are merged in the tower and where tiles are packed."""

    packing = staticmethod(_pack_next)


class PiToMeLlavaOnevisionProcessingInfo(MergedInfo, LlavaOnevisionProcessingInfo):
    """What is merged."""


class PiToMeLlavaOnevisionDummyInputsBuilder(MergedDummies, LlavaOnevisionDummyInputsBuilder):
    """Dummy images and videos of the largest budget."""


class PiToMeLlavaOnevisionMultiModalProcessor(TiledProcessor, LlavaOnevisionMultiModalProcessor):
    """Counts merged tokens."""


def _pack_onevision(stand_in: Any, size: Tensor, tiles: Tensor) -> Tensor:
    packed: Tensor = LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings(
        stand_in, size, tiles, image_newline=stand_in.image_newline, strategy="spatial_unpad"
    )
    return packed


@MULTIMODAL_REGISTRY.register_processor(
    PiToMeLlavaOnevisionMultiModalProcessor,
    info=PiToMeLlavaOnevisionProcessingInfo,
    dummy_inputs=PiToMeLlavaOnevisionDummyInputsBuilder,
)
class PiToMeLlavaOnevisionForConditionalGeneration(
    TiledModel, LlavaOnevisionForConditionalGeneration, SupportsMRoPE
):
    """LLaVA-OneVision whose visual tokens are merged; frames of a video each for themselves.

    With `temporal` frames of one window are merged together, as in the library.
    """

    packing = staticmethod(_pack_onevision)

    @override
    def encoders(self) -> Mapping[str, Encoder]:
        return {**super().encoders(), "pixel_values_videos": self._videos}

    def _videos(self, inputs: dict[str, Any], merge_pass: MergePass) -> VisualTokens:
        videos = self._parse_and_validate_video_input(**inputs)["pixel_values_videos"]
        assert merge_pass.grid is not None
        items = []
        for video in videos:
            blank = torch.zeros(len(video), merge_pass.schedule.n_tokens, 1)
            full = self.apply_pooling(blank).shape[1] * len(video) + 1
            canvases = frame_canvases(len(video), merge_pass.grid)
            items.append(PackedItem(Footprint(full, len(video), 1, len(video)), *canvases))

        def pack(tiles: list[Tensor], newline: Tensor) -> list[Tensor]:
            return [
                torch.cat([self.apply_pooling(frames).flatten(0, 1), newline[None]])
                for frames in tiles
            ]

        projected = self._projected(torch.cat(list(videos)), merge_pass)
        return merge_packed(projected, items, pack, self.image_newline, merge_pass)
