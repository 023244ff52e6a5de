"""wrap, unwrap, wrapped: join a model, an adapter and a merge config.

Knows all three, and how to put merging on a model all-or-nothing and take it off without a
trace. Does not know: what happens in a forward pass (`wrapped_model.py`) or how tokens are chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapters import find_adapter
from .adapters.swap import is_swapped, swap_in, swap_out
from .calibration import Calibration, as_model_positions
from .checks import whole_number
from .config import CONFIG_NAME, MergeConfig
from .counts import Footprint, TokenCount
from .image_cache import IMAGE_CACHE
from .inputs import PromptImage, images_of, prepare
from .merging import Merging, schedule_for, stage_of
from .schedule import Schedule
from .visual_tokens import VisualTokens
from .wrapped_model import WrappedLlava
from .wrapped_original import WrappedOriginalLlava
from .wrapped_peft import WrappedPeft, can_remember

Model = TypeVar("Model", bound=nn.Module)

_STATE = "_pitome"
# What is put in front of a model's class, by the calling convention that its adapter names.
MIXINS: dict[str, type] = {"transformers": WrappedLlava, "original": WrappedOriginalLlava}


def wrap(
    model: Model,
    *,
    keep: float | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    config: MergeConfig | None = None,
    **options: Any,
) -> Model:
    """Merge the visual tokens of a LLaVA before its language model sees them; in place.

    The processor, `generate`, `Trainer`, PEFT and accelerate are used as before. Wrapping again
    replaces the settings. Weights, `state_dict` keys and class names are untouched.

    Args:
        model: a LLaVA of transformers or of the original llava package (docs/models.md lists
            them), on its own or inside a `PeftModel`.
        keep: fraction of an image's visual tokens to keep, in (0, 1]; 1.0 changes nothing.
        tokens: the same as a count per image; per tile for models that cut pictures into tiles.
        ratio: the paper's r, the fraction kept at every merging layer.
        config: a ready `MergeConfig`; a budget or options beside it replace its own.
        **options: fields of `MergeConfig`, for instance `algorithm="tome"`.

    Returns:
        The same object.

    Raises:
        TypeError: not a supported model, or an option of the wrong type.
        ValueError: an option out of range, or a budget that does not fit the model. The model is
            unchanged after any error.
    """
    config = make_config(config, keep=keep, tokens=tokens, ratio=ratio, **options)
    base = base_model(model)
    if hasattr(base, "_orig_mod"):
        raise TypeError("wrap() the model first and compile it then, not the other way round")
    adapter = find_adapter(base)
    schedule_for(config, adapter.tower_shape(base))
    planned_calibration(base, config)
    fresh = not is_wrapped(base)
    try:
        adapter.install(base, inside_tower=stage_of(config) != "projector")
        swap_in(base, MIXINS[adapter.calls])
    except BaseException:
        if fresh:
            adapter.uninstall(base)
        raise
    base.__dict__[_STATE] = Merging(config, adapter)
    if can_remember(model):
        # From now on what is saved of a PeftModel says how it was merged.
        swap_in(model, WrappedPeft)
    return model


def unwrap(model: Model) -> Model:
    """Take merging off; the model is as it was before `wrap`. A no-op on an unwrapped model."""
    base = base_model(model)
    if is_wrapped(base):
        swap_out(base)
        base.__dict__.pop(_STATE).adapter.uninstall(base)
    if model is not base:
        swap_out(model)
    return model


@contextlib.contextmanager
def wrapped(
    model: Model,
    *,
    keep: float | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    config: MergeConfig | None = None,
    **options: Any,
) -> Iterator[Model]:
    """`wrap` for the length of a `with` block; what was on before comes back, error or not."""
    previous = merge_config(model) if is_wrapped(model) else None
    wrap(model, keep=keep, tokens=tokens, ratio=ratio, config=config, **options)
    try:
        yield model
    finally:
        unwrap(model) if previous is None else wrap(model, config=previous)


def make_config(config: MergeConfig | None = None, **options: Any) -> MergeConfig:
    """A `MergeConfig` from an existing one and changes to it; None means not given.

    Raises:
        TypeError: `config` is no MergeConfig.
        ValueError: see `MergeConfig`; unknown options are named with the closest known one.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("format_version", "pitome_vlm_version"):
        if name in given:
            raise ValueError(f"{name} belongs into a {CONFIG_NAME}, it is no option of wrap()")
    if config is None:
        return MergeConfig.from_dict(given)
    if not isinstance(config, MergeConfig):
        raise TypeError(f"config must be a MergeConfig, got {type(config).__name__}")
    budget = {"keep", "tokens", "ratio"}
    merged = config.to_dict()
    if budget & given.keys():
        merged |= dict.fromkeys(budget)
    return MergeConfig.from_dict(merged | given)


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, or the model itself."""
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        inner: nn.Module = model.get_base_model()  # type: ignore[operator]
        return inner
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether `wrap` is in force on this model."""
    base = base_model(model)
    return isinstance(base, nn.Module) and is_swapped(base) and _STATE in base.__dict__


def merging_of(model: nn.Module) -> tuple[nn.Module, Merging]:
    """The wrapped model itself and what is on it.

    Raises:
        ValueError: the model is not wrapped.
    """
    base = base_model(model)
    if not is_wrapped(base):
        raise ValueError(
            f"{type(base).__name__} is not wrapped; call pitome_vlm.wrap(model, keep=0.25) first"
        )
    return base, base.__dict__[_STATE]


def put_merging(model: nn.Module, merging: Merging) -> None:
    """Another `Merging` in place of the one in force, for instance one that watches its passes.

    Args:
        model: a wrapped model.
        merging: with the same config and adapter.

    Raises:
        ValueError: the model is not wrapped.
    """
    base, _ = merging_of(model)
    base.__dict__[_STATE] = merging


def merge_config(model: nn.Module) -> MergeConfig:
    """The settings in force.

    Raises:
        ValueError: the model is not wrapped.
    """
    return merging_of(model)[1].config


def schedule_of(model: nn.Module) -> Schedule:
    """Token counts layer by layer, known without running anything.

    Raises:
        ValueError: the model is not wrapped.
    """
    base, merging = merging_of(model)
    return merging.schedule(base)


def planned_schedule(model: nn.Module, config: MergeConfig) -> Schedule:
    """The counts `wrap(model, config=config)` would lead to; nothing is changed.

    Raises:
        TypeError: not a supported model.
        ValueError: the budget does not fit.
    """
    base = base_model(model)
    return schedule_for(config, find_adapter(base).tower_shape(base))


def planned_calibration(model: nn.Module, config: MergeConfig) -> Calibration:
    """What `wrap(model, config=config)` would tell the language model; nothing is changed.

    Raises:
        TypeError: not a supported model.
        ValueError: the language model cannot be told what the config asks for.
    """
    base = base_model(model)
    return Merging(config, find_adapter(base)).calibration(base)


def planned_count(
    model: nn.Module,
    config: MergeConfig,
    *,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> tuple[Footprint, TokenCount]:
    """Tokens of one picture or video under `wrap(model, config=config)`; nothing is run or changed.

    Args:
        model: a supported model, wrapped or not.
        config: the options.
        image_size: (height, width) in pixels, None for a typical picture; models that bring every
            picture to one size ignore it.
        frames: of a video, None for a picture.

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
    return footprint, Merging(config, adapter).new_pass(base).count(footprint)


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

    Args:
        model: a wrapped model.
        pixel_values: from the model's processor.
        **inputs: what else the processor gives for images (`image_sizes`, `batch_num_images`),
            `vision_feature_layer`, `vision_feature_select_strategy`; `image_cache`, an
            `ImageCache` to look into first.

    Raises:
        ValueError: the model is not wrapped, or an input is missing.
    """
    base, merging = merging_of(model)
    encoded = merging.encode(base, inputs | {merging.image_input: pixel_values})
    return next(one.visual for one in encoded if one.kind == "image")


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
    encoded = merging.encode(base, inputs | {"pixel_values_videos": pixel_values_videos})
    return next(one.visual for one in encoded if one.kind == "video")


def visual_token_counts(model: nn.Module, pixel_values: Tensor, **inputs: Any) -> list[int]:
    """Visual tokens of every image of a wrapped model; the tower is run where images differ.

    Args:
        model: a wrapped model.
        pixel_values: from the model's processor.
        **inputs: as for `encode_images`.

    Raises:
        ValueError: the model is not wrapped, or an input is missing.
    """
    base, merging = merging_of(model)
    if not merging.config.is_adaptive:
        counts = merging.counts(base, inputs | {merging.image_input: pixel_values})
        return [count.out for count in counts["image"]]
    with torch.no_grad():
        return encode_images(model, pixel_values, **inputs).counts


@torch.no_grad()
def prompt_images(model: nn.Module, inputs: Mapping[str, Any]) -> list[PromptImage]:
    """Row, full and merged count of every image of a batch; run only where images differ.

    Args:
        model: a wrapped model.
        inputs: a processor's batch with `input_ids` [B, T].

    Raises:
        ValueError: the model is not wrapped, or placeholders and images do not match.
    """
    base, merging = merging_of(model)
    if not merging.has_pixels(inputs):
        return []
    if merging.config.is_adaptive:
        encoded = merging.encode(base, inputs)
        counts = {
            one.kind: list(zip(one.visual.full_counts, one.visual.counts, strict=True))
            for one in encoded
        }
    else:
        planned = merging.counts(base, inputs)
        counts = {kind: [(one.full, one.out) for one in found] for kind, found in planned.items()}
    return images_of(base, merging, inputs["input_ids"], counts)


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
        encoded. `position_ids` are float32 where tokens keep their unreduced places, and
        `token_sizes` [B, S] float32 (what every column stands for) is there where the model's
        attention uses it; the model takes both. Gradients reach projector and tower. A
        batch without images comes back unchanged.

    Raises:
        ValueError: the model is not wrapped, or placeholders and images do not match.
    """
    base, merging = merging_of(model)
    if not merging.has_pixels(inputs):
        return {name: value for name, value in inputs.items() if name != IMAGE_CACHE}
    if isinstance(base, WrappedOriginalLlava):
        return base._pitome_compact_inputs(inputs)
    prompt = prepare(base, merging, inputs)
    known = ("inputs_embeds", "attention_mask", "labels", "position_ids")
    compact = {name: getattr(prompt, name) for name in known if getattr(prompt, name) is not None}
    if "position_ids" in compact:
        compact["position_ids"] = as_model_positions(compact["position_ids"])
    if prompt.calibration.size_bias:
        compact["token_sizes"] = prompt.sizes
    shape = prompt.compaction.keep.shape
    adapter = merging.adapter
    consumed = {*known, "input_ids", *adapter.vision_inputs, *adapter.feature_options, IMAGE_CACHE}
    for name, value in inputs.items():
        if name in consumed:
            continue
        per_token = isinstance(value, torch.Tensor) and value.shape == shape
        compact[name] = prompt.compaction.take(value, 0) if per_token else value
    return compact
