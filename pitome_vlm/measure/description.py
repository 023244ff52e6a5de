"""`describe`: what is merged where and what it saves, for a model or a configuration alone."""

from __future__ import annotations

import copy
import os
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from ..adapters import find_adapter
from ..loading.checkpoints import check_model_type, read_config
from ..loading.encoders import empty_encoder, encoder_class
from ..loading.image_processors import find_image_processor
from ..loading.original import original_shapes
from ..merge.config import DEFAULT_KEEP, MergeConfig
from ..merge.counts import Footprint
from ..merge.schedule import Schedule
from ..wrapping.encode import planned, planned_schedule
from ..wrapping.wrap import base_model, is_wrapped, merge_config
from .accounting import costs
from .described import Description
from .encoders import EncoderDescription, describe_encoder
from .flops import merged_count
from .language_flops import layers_without_attention
from .sizes import asks_processor, pieces_of, planned_total
from .weights import weights_of


def describe(
    model: nn.Module,
    *,
    text_tokens: int = 64,
    config: MergeConfig | None = None,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
    image_processor: Any = None,
) -> Description | EncoderDescription:
    """What merging does to a model: tokens per layer, FLOPs and cache without and with it.

    Args:
        model: a LLaVA or an encoder on its own, wrapped or not, also inside a `PeftModel`. Of an
            encoder only `config` and `image_size` matter.
        text_tokens: tokens of the prompt other than the image's.
        config: describe these options instead of those in force; the model is not changed. None
            takes those in force, or keep=0.25 as an example on an unwrapped model.
        image_size: (height, width) of the image in pixels, for models whose number of tokens
            depends on it; None for a typical photo, 768 x 1024. Others ignore it.
        frames: describe a video of so many frames instead of an image.
        image_processor: the model's processor, or the image processor in it. It is asked what it
            makes of an image of that size, in tiles where it cuts images; without it, sizes are
            those after its resizing.

    Raises:
        TypeError: not a supported model.
        ValueError: `text_tokens` is negative, the budget of `config` does not fit, or the processor
            refuses the size.
    """
    if find_adapter(base_model(model)).calls == "encoder":
        return describe_encoder(model, config=config, image_size=image_size)
    return describe_llava(
        model,
        text_tokens=text_tokens,
        config=config,
        image_size=image_size,
        frames=frames,
        image_processor=image_processor,
    )


def describe_llava(
    model: nn.Module,
    *,
    text_tokens: int = 64,
    config: MergeConfig | None = None,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
    image_processor: Any = None,
) -> Description:
    """`describe` for a model with a language model."""
    adapter = find_adapter(base_model(model))
    in_force = is_wrapped(model) and (config is None or config == merge_config(model))
    if config is None:
        config = merge_config(model) if in_force else MergeConfig(keep=DEFAULT_KEEP)
    schedule = planned_schedule(model, config)
    nothing = MergeConfig(keep=1.0)
    untouched = planned_schedule(model, nothing)
    asked = adapter.sized_by_processor and image_processor is not None and not frames
    known = adapter.default_image_size or (image_size if asked else None)
    # Frames of other families have one size.
    one_size = not known or (frames and not adapter.sized_by_processor)
    size = None if one_size else image_size or known
    shown: dict[str, Any] = {
        "image_size": size,
        "frames": frames,
        "image_processor": image_processor,
    }
    pieces = pieces_of(model, **shown)
    return Description(
        config=config,
        schedule=schedule,
        pieces=pieces,
        count=planned_total(model, config, pieces),
        image_size=size,
        wrapped=in_force,
        before=costs(model, untouched, text_tokens, config=nothing, **shown),
        after=costs(model, schedule, text_tokens, config=config, **shown),
        calibration=planned(model, config).calibration,
        weights=weights_of(model),
        # Where there is a size, an image of it is described.
        unit="image" if size else adapter.counted_per,
        frames=frames,
        untold=_untold(base_model(model)),
        patch_steps=_patch_steps(base_model(model), schedule, config, pieces[0]),
        resized=adapter.sized_by_processor and not asked and bool(size or frames),
    )


def _untold(base: Any) -> tuple[str, ...]:
    found = Counter(kind for _, kind in layers_without_attention(base.config.get_text_config()))
    return tuple(f"{count} {kind} layer{'s' * (count > 1)}" for kind, count in found.items())


def _patch_steps(
    base: Any, schedule: Schedule, config: MergeConfig, piece: Footprint
) -> tuple[tuple[int, int, int], ...]:
    """See `Description`."""
    if not (schedule.typical and schedule.spread):
        return ()
    own = schedule.of_image(piece.full, merged_count(schedule, config, piece))
    compared = find_adapter(base).tower_comparisons(base, piece, own)
    return tuple((one.layer, one.entering, one.leaving) for one in compared)


def from_config(
    config_or_path: Any,
    merging: MergeConfig | None = None,
    *,
    text_tokens: int = 64,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Description | EncoderDescription:
    """`describe` for a checkpoint whose weights are not loaded (nor downloaded).

    Args:
        config_or_path: a model's config, or the folder or Hub name of a checkpoint, also of the
            original llava package (which need not be installed).
        merging: the options to describe; None for keep=0.25 as an example.
        text_tokens: tokens of the prompt other than the image's.
        image_size: see `describe`.
        frames: see `describe`.

    Of a checkpoint of which the image processor can be loaded, it is asked as in `describe`.

    Raises:
        TypeError: not the config of a supported model.
        OSError: see `pitome_vlm.loading.checkpoints.read_config`.
        ValueError: the budget does not fit the model, or the config cannot be read.
    """
    model: Any = None
    if isinstance(config_or_path, (str, os.PathLike)):
        encoder = encoder_class(config_or_path)
        if encoder is not None:
            empty = empty_encoder(config_or_path, encoder)
            return describe_encoder(empty, config=merging, image_size=image_size)
        model = original_shapes(config_or_path)
        config: Any = read_config(config_or_path) if model is None else None
    else:
        # Building a model writes a dtype into its config.
        config = copy.deepcopy(config_or_path)
        check_model_type(getattr(config, "model_type", None), type(config).__name__)
    if model is None:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    return describe_llava(
        model,
        text_tokens=text_tokens,
        config=merging,
        image_size=image_size,
        frames=frames,
        image_processor=_processor(model, config_or_path),
    )


def _processor(model: nn.Module, path: Any) -> Any:
    """The image processor of a checkpoint, where only that knows what an image becomes."""
    if not isinstance(path, (str, os.PathLike)) or not asks_processor(model):
        return None
    return find_image_processor(path)
