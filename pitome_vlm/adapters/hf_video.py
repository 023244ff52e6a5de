"""Hugging Face models that take videos: LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA.

A frame goes through the tower like an image. Its groups are spread over its grid again, the
model's own pooling (before the projector or after it) makes fewer cells of them, and these are
merged to the video's exact count, window by window where that is asked for (`merge/tiles.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.tiles import PackedItem, merge_packed
from ..merge.tokens import Encoded, VisualTokens
from .base import Adapter
from .features import checked_pixels, feature_choice, frame_canvases, read_features
from .hf_anyres import HFAnyResAdapter
from .hf_llava import HFLlavaAdapter
from .parts import ModelParts

VIDEOS = "pixel_values_videos"
_LAYOUT = "[videos, frames, 3, height, width]"
# The frames [t, N, C] of a video and a separator [C] to its packed sequence [L, C].
PackFrames = Callable[[Tensor, Tensor], Tensor]


def _frames_of(inputs: Mapping[str, Any]) -> tuple[Tensor, int, int]:
    """[videos x frames, 3, H, W], and how many videos of how many frames these are."""
    pixels = checked_pixels(inputs[VIDEOS], _LAYOUT, (5,), name=VIDEOS)
    return pixels.flatten(0, 1), pixels.shape[0], pixels.shape[1]


def _merged_videos(
    features: Tensor,
    item: PackedItem,
    videos: int,
    pack: PackFrames,
    merge_pass: MergePass,
    newline: Tensor | None = None,
) -> VisualTokens:
    """Videos of one length, [videos x frames, M, C] each as `item` says, merged to their counts."""

    def pack_all(tiles: list[Tensor], newline: Tensor) -> Sequence[Tensor]:
        return [pack(one, newline) for one in tiles]

    newline = features.new_zeros(features.shape[-1]) if newline is None else newline
    return merge_packed(features, [item] * videos, pack_all, newline, merge_pass)


def _video_footprints(
    adapter: Adapter, model: Any, inputs: Mapping[str, Any]
) -> dict[str, list[Footprint]]:
    """Counts of the videos of a call, which all have the same number of frames."""
    if inputs.get(VIDEOS) is None:
        return {}
    _, videos, frames = _frames_of(inputs)
    one = adapter.footprint(model, frames=frames, **adapter.options_of(inputs))
    return {"video": [one] * videos}


def _videos_looked_at(inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Pixels [frames, 3, H, W] of every video; empty without videos."""
    if inputs.get(VIDEOS) is None:
        return {}
    _frames_of(inputs)
    return {"video": list(inputs[VIDEOS])}


def _selected_videos(
    adapter: Adapter, inputs: Mapping[str, Any], members: list[int]
) -> dict[str, Any]:
    """The inputs of some of the videos alone."""
    return {**adapter.options_of(inputs), VIDEOS: inputs[VIDEOS][members]}


class HFVideoAdapter(HFAnyResAdapter):
    """LlavaOnevisionForConditionalGeneration: images of any size, and videos.

    Inputs: those of `HFAnyResAdapter`, and `pixel_values_videos` [videos, frames, 3, height,
    width].
    """

    model_types: tuple[str, ...] = ("llava_onevision",)
    pixel_inputs: Mapping[str, str] = {"pixel_values": "image", VIDEOS: "video"}
    vision_inputs: tuple[str, ...] = (*HFAnyResAdapter.vision_inputs, VIDEOS, "image_sizes_videos")

    @override
    def video_footprint(
        self, model: Any, frames: int, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        shape = self.tower_shape(model, **options)
        blank = torch.empty(frames, shape.n_tokens, 1, device="meta")
        bare, newlines = len(self._pooled(model, blank).flatten(0, 1)), self._newlines()
        return Footprint(bare + newlines, frames, newlines, frames)

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        return super().footprints(model, inputs) | _video_footprints(self, model, inputs)

    @override
    def looked_at(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        return super().looked_at(model, inputs) | _videos_looked_at(inputs)

    @override
    def select(
        self, model: Any, inputs: Mapping[str, Any], kind: str, members: list[int]
    ) -> dict[str, Any]:
        if kind == "image":
            return super().select(model, inputs, kind, members)
        return _selected_videos(self, inputs, members)

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        encoded = []
        if inputs.get("pixel_values") is not None:
            encoded = super().encode(model, inputs, merge_pass)
            merge_pass = merge_pass.fresh()
        if inputs.get(VIDEOS) is not None:
            visual = self._videos(model, inputs, merge_pass)
            encoded.append(Encoded("video", self.placeholder_ids(model)["video"], visual))
        return encoded

    def _videos(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> VisualTokens:
        """Projected frames are pooled, and a newline follows the last one."""
        core = model.model
        features, item, videos = self._frame_features(model, inputs, merge_pass)
        projected = core.multi_modal_projector(features)

        def pack(frames: Tensor, newline: Tensor) -> Tensor:
            return torch.cat([self._pooled(model, frames).flatten(0, 1), newline[None]])

        return _merged_videos(projected, item, videos, pack, merge_pass, core.image_newline)

    def _frame_features(
        self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass
    ) -> tuple[Tensor, PackedItem, int]:
        """[videos x frames, M, C] of the tower, what each video is, and how many there are."""
        pixels, videos, frames = _frames_of(inputs)
        choice, grid = feature_choice(model.config, inputs), merge_pass.grid
        assert grid is not None
        features = read_features(self.parts(model).vision_tower, pixels, merge_pass, choice)
        footprint = self.footprints(model, {**inputs, "pixel_values": None})["video"][0]
        return features, PackedItem(footprint, *frame_canvases(frames, grid)), videos

    def _pooled(self, model: Any, frames: Tensor) -> Tensor:
        """Frames [t, N, C] after the model's own pooling, [t, n, C]."""
        pooled: Tensor = model.model.apply_pooling(frames)
        return pooled

    def _newlines(self) -> int:
        return 1


class HFNextVideoAdapter(HFVideoAdapter):
    """LlavaNextVideoForConditionalGeneration: pools before the projector, no newline."""

    model_types: tuple[str, ...] = ("llava_next_video",)
    videos_pooled_first = True

    def _videos(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> VisualTokens:
        features, item, videos = self._frame_features(model, inputs, merge_pass)

        def pack(frames: Tensor, newline: Tensor) -> Tensor:
            del newline
            return self._pooled(model, frames).flatten(0, 1)

        visual = _merged_videos(features, item, videos, pack, merge_pass)
        # Projectors work token by token: videos of different length go through as one row.
        projected = model.model.multi_modal_projector(torch.cat(visual.features))
        return dataclasses.replace(visual, features=list(torch.split(projected, visual.counts)))

    def _pooled(self, model: Any, frames: Tensor) -> Tensor:
        pool = model.model.vision_resampler
        inner = pool.pool
        if isinstance(inner, nn.Conv2d) and inner.in_channels != frames.shape[-1]:
            # Coordinates and shapes do not have the channels that a convolution takes; it reads
            # the same cells as a mean does.
            side = round(frames.shape[1] ** 0.5)
            square = frames.transpose(1, 2).reshape(len(frames), -1, side, side)
            pooled = nn.functional.avg_pool2d(square, inner.kernel_size, inner.stride)
            return pooled.flatten(2).transpose(1, 2)
        resampled: Tensor = pool(frames)
        return resampled

    def _newlines(self) -> int:
        return 0


class HFVideoLlavaAdapter(HFLlavaAdapter):
    """VideoLlavaForConditionalGeneration: a tower for images, one for videos, no pooling.

    Frames keep their class token, images do not. After the tower it is a token like others.
    Inputs: `pixel_values` or `pixel_values_images` [images, 3, height, width],
    `pixel_values_videos` [videos, frames, 3, height, width].
    """

    model_types: tuple[str, ...] = ("video_llava",)
    part_names: Mapping[str, str] = {
        **HFLlavaAdapter.part_names,
        "vision_tower": "image_tower",
        "video_tower": "video_tower",
    }
    # Images have one name or the other, depending on the release.
    pixel_inputs: Mapping[str, str] = {
        "pixel_values": "image",
        "pixel_values_images": "image",
        VIDEOS: "video",
    }
    vision_inputs: tuple[str, ...] = ("pixel_values", "pixel_values_images", VIDEOS)
    videos_pooled_first = True

    @override
    def parts(self, model: Any) -> ModelParts:
        return dataclasses.replace(super().parts(model), video_tower=model.model.video_tower)

    @override
    def video_footprint(
        self, model: Any, frames: int, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        shape = self.tower_shape(model, **options)
        return Footprint(frames * (shape.n_tokens + shape.n_leading), frames, 0, frames)

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        images = super().footprints(model, self._named(inputs))
        return images | _video_footprints(self, model, inputs)

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        encoded, named = [], self._named(inputs)
        if named.get("pixel_values") is not None:
            encoded = super().encode(model, named, merge_pass)
            merge_pass = merge_pass.fresh()
        if named.get(VIDEOS) is not None:
            visual = self._videos(model, named, merge_pass.with_leading())
            encoded.append(Encoded("video", self.placeholder_ids(model)["video"], visual))
        return encoded

    def _videos(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> VisualTokens:
        pixels, videos, frames = _frames_of(inputs)
        choice = dataclasses.replace(feature_choice(model.config, inputs), strategy="full")
        features = read_features(model.model.video_tower, pixels, merge_pass, choice)
        footprint = self.footprints(model, inputs)["video"][0]
        item = PackedItem(footprint, *_planes_with_class_token(frames, merge_pass))

        def pack(tiles: Tensor, newline: Tensor) -> Tensor:
            del newline
            return tiles.flatten(0, 1)

        visual = _merged_videos(features, item, videos, pack, merge_pass)
        projected = model.model.multi_modal_projector(torch.cat(visual.features))
        return dataclasses.replace(visual, features=list(torch.split(projected, visual.counts)))

    @override
    def looked_at(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        return super().looked_at(model, self._named(inputs)) | _videos_looked_at(inputs)

    @override
    def select(
        self, model: Any, inputs: Mapping[str, Any], kind: str, members: list[int]
    ) -> dict[str, Any]:
        if kind == "image":
            named = self._named(inputs) | {VIDEOS: None}
            return super().select(model, named, kind, members)
        return _selected_videos(self, inputs, members)

    def _named(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with images under one name.

        Raises:
            ValueError: images are given twice.
        """
        named = dict(inputs)
        images = named.pop("pixel_values_images", None)
        if images is not None and named.get("pixel_values") is not None:
            raise ValueError(
                "both pixel_values and pixel_values_images are given; pass the images once"
            )
        return named if images is None else named | {"pixel_values": images}


def _planes_with_class_token(
    frames: int, merge_pass: MergePass
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Planes of frames whose first cells are leading tokens, and the frame of each."""
    leading, patches = merge_pass.schedule.n_leading, merge_pass.schedule.n_tokens
    rows = merge_pass.grid or (1, patches)
    planes, frame_of = [], []
    for frame in range(frames):
        start = frame * (leading + patches)
        planes.append(torch.arange(start, start + leading)[None])
        planes.append(torch.arange(start + leading, start + leading + patches).view(rows))
        frame_of += [frame, frame]
    return tuple(planes), tuple(frame_of)
