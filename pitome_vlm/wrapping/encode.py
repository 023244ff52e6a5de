"""What a model's images become: planned from numbers alone, or encoded.

For models with and without merging on them. How merging gets on a model is left to `wrap.py`, what
happens in a forward pass to `forward.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import find_adapter
from ..common import whole_number
from ..merge.budget import schedule_for
from ..merge.config import MergeConfig
from ..merge.counts import Footprint, TokenCount
from ..merge.schedule import Schedule
from ..merge.tokens import VisualTokens
from .image_cache import IMAGE_CACHE
from .merging import CallPlan, Merging
from .original import WrappedOriginalLlava
from .placeholders import PromptImage, images_of
from .positions import as_model_positions
from .prompt import prepare
from .wrap import base_model, merging_of


def planned(model: nn.Module, config: MergeConfig) -> CallPlan:
    """What `wrap(model, config=config)` would lead to; nothing is run or changed.

    Args:
        model: a supported model, wrapped or not, also inside a `PeftModel`.
        config: the options.

    Raises:
        TypeError: not a supported model.
        ValueError: the budget does not fit, or the language model cannot be told what the config
            asks for.
    """
    base = base_model(model)
    return Merging(config, find_adapter(base)).plan(base)


def planned_schedule(model: nn.Module, config: MergeConfig) -> Schedule:
    """The schedule of `planned`, also where the language model cannot be calibrated as asked."""
    base = base_model(model)
    return schedule_for(config, find_adapter(base).tower_shape(base))


def planned_count(
    model: nn.Module,
    config: MergeConfig,
    *,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> tuple[Footprint, TokenCount]:
    """Tokens of one image or video under `wrap(model, config=config)`; nothing is run or changed.

    Args:
        model: a supported model, wrapped or not.
        config: the options.
        image_size: (height, width) in pixels, None for a typical image; models that bring every
            image to one size ignore it.
        frames: of a video, None for an image.

    Raises:
        TypeError: not a supported model.
        ValueError: the budget does not fit, a size below one pixel, or frames of a model that
            takes no videos.
    """
    base = base_model(model)
    adapter = find_adapter(base)
    if image_size is not None:
        image_size = checked_size(image_size)
    footprint = adapter.footprint(base, image_size=image_size, frames=frames)
    return footprint, Merging(config, adapter).plan(base).new_pass().count(footprint)


def checked_size(image_size: Any) -> tuple[int, int]:
    """(height, width) as whole numbers of pixels.

    Raises:
        TypeError: no two whole numbers.
        ValueError: below one pixel.
    """
    try:
        height, width = image_size
    except (TypeError, ValueError):
        raise TypeError(f"image_size must be (height, width), got {image_size!r}") from None
    return whole_number("image height", height, 1), whole_number("image width", width, 1)


def encode_images(model: nn.Module, pixel_values: Tensor, **inputs: Any) -> VisualTokens:
    """The visual tokens a wrapped model's language model sees, with sizes and source maps.

    Gradients are recorded as in any forward pass: without them, call it under `torch.no_grad()`.

    Args:
        model: a wrapped model.
        pixel_values: from the model's processor.
        **inputs: what else the processor gives for images (`image_sizes`, `batch_num_images`),
            `vision_feature_layer`, `vision_feature_select_strategy`; `image_cache`, an
            `ImageCache` to look into first.

    Raises:
        ValueError: the model is not wrapped, an input is missing, or pixels are integers.
    """
    base, merging = merging_of(model)
    return _encoded(base, merging, inputs | {merging.image_input: pixel_values}, "image")


def encode_videos(model: nn.Module, pixel_values_videos: Tensor, **inputs: Any) -> VisualTokens:
    """`encode_images` for videos.

    Args:
        model: a wrapped model that takes videos.
        pixel_values_videos: [videos, frames, 3, H, W] from the model's processor.
        **inputs: `vision_feature_layer`, `vision_feature_select_strategy`, `image_cache`.

    Raises:
        ValueError: the model is not wrapped, or takes no videos.
    """
    base, merging = merging_of(model)
    if "pixel_values_videos" not in merging.adapter.pixel_inputs:
        raise ValueError(f"{type(base).__name__} takes no videos")
    return _encoded(base, merging, inputs | {"pixel_values_videos": pixel_values_videos}, "video")


def _encoded(base: Any, merging: Merging, inputs: dict[str, Any], kind: str) -> VisualTokens:
    for name in merging.adapter.pixel_inputs:
        pixels = inputs.get(name)
        if isinstance(pixels, Tensor) and not pixels.is_floating_point():
            raise ValueError(
                f"{name} must be floating point as the model's processor returns it (rescaled "
                f"and normalised), got {pixels.dtype}"
            )
    found = merging.plan(base, inputs).encode(inputs.get(IMAGE_CACHE))
    return next(one.visual for one in found if one.kind == kind)


def visual_token_counts(model: nn.Module, pixel_values: Tensor, **inputs: Any) -> list[int]:
    """Visual tokens of every image of a wrapped model; the tower is run where features decide.

    Args:
        model: a wrapped model.
        pixel_values: from the model's processor.
        **inputs: as for `encode_images`.

    Raises:
        ValueError: the model is not wrapped, or an input is missing.
    """
    base, merging = merging_of(model)
    if merging.config.by_pixels or not merging.config.is_adaptive:
        plan = merging.plan(base, inputs | {merging.image_input: pixel_values})
        return [count.out for count in plan.counts()["image"]]
    with torch.no_grad():
        return encode_images(model, pixel_values, **inputs).counts


@torch.no_grad()
def prompt_images(model: nn.Module, inputs: Mapping[str, Any]) -> list[PromptImage]:
    """Row, full and merged count of every image of a batch; run only where features decide.

    Args:
        model: a wrapped model.
        inputs: a processor's batch with `input_ids` [B, T].

    Raises:
        ValueError: the model is not wrapped, or placeholders and images do not match.
    """
    base, merging = merging_of(model)
    if not merging.has_pixels(inputs):
        return []
    plan = merging.plan(base, inputs)
    if merging.config.is_adaptive and not merging.config.by_pixels:
        encoded = plan.encode(inputs.get(IMAGE_CACHE))
        counts = {
            one.kind: list(zip(one.visual.full_counts, one.visual.counts, strict=True))
            for one in encoded
        }
    else:
        counts = {
            kind: [(one.full, one.out) for one in found] for kind, found in plan.counts().items()
        }
    return images_of(plan, inputs["input_ids"], counts)


def compact_inputs(model: nn.Module, **inputs: Any) -> dict[str, Any]:
    """What `model(**inputs)` turns its inputs into, for training loops of one's own.

    Labels and logits then have the same length, so label smoothing, token accuracy and custom
    losses work on `model(**compact_inputs(model, **batch))` as they do without merging.

    Args:
        model: a wrapped model.
        **inputs: a processor's batch: images and `input_ids` or `inputs_embeds`, and
            where wanted `attention_mask`, `labels`, `position_ids`, `image_cache`; others are
            passed through.

    Returns:
        `inputs_embeds` [B, S, C] and the shortened others, without `input_ids` and what was
        encoded; of models whose own forward puts features into the prompt, `input_ids` [B, S] and
        `mm_encoder_outputs` instead. `position_ids` are float32 where tokens keep their
        unreduced places, and `token_sizes` [B, S] float32 (what every column stands for) is there
        where the model's attention uses it; the model takes both. Gradients reach projector and
        tower. A batch without images comes back unchanged.

    Raises:
        ValueError: the model is not wrapped, has no language model, or placeholders and images do
            not match.
    """
    base, merging = merging_of(model)
    if merging.adapter.calls == "encoder":
        raise ValueError(
            f"{type(base).__name__} is an encoder on its own, which has no prompt to shorten; "
            "encode_images gives its merged tokens"
        )
    if not merging.has_pixels(inputs):
        return {name: value for name, value in inputs.items() if name != IMAGE_CACHE}
    if isinstance(base, WrappedOriginalLlava):
        return base._pitome_compact_inputs(inputs)
    plan = merging.plan(base, inputs)
    prompt = prepare(plan, inputs, image_cache=inputs.get(IMAGE_CACHE))
    known = ("attention_mask", "labels", "position_ids")
    compact = {name: getattr(prompt, name) for name in known if getattr(prompt, name) is not None}
    compact |= prompt.language_inputs()
    if "position_ids" in compact:
        compact["position_ids"] = as_model_positions(compact["position_ids"])
    if plan.calibration.size_bias:
        compact["token_sizes"] = prompt.sizes
    shape = prompt.compaction.keep.shape
    adapter = plan.adapter
    consumed = {
        *known,
        "input_ids",
        "inputs_embeds",
        *adapter.vision_inputs,
        *adapter.feature_options,
        IMAGE_CACHE,
    }
    for name, value in inputs.items():
        if name in consumed:
            continue
        per_token = isinstance(value, torch.Tensor) and value.shape == shape
        compact[name] = prompt.compaction.take(value, 0) if per_token else value
    return compact
