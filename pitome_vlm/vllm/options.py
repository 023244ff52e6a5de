"""From a merge config to vLLM's `--hf-overrides` and back; refuses what vLLM cannot do.

vLLM itself need not be installed. Options travel as
`hf_overrides={"architectures": [...], "pitome": {fields of MergeConfig}}`. vLLM hands them to every
process as an attribute of the model's config, so that the process that counts tokens and those that
merge them read the same options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..merge.config import MergeConfig
from ..merge.schedule import Schedule, TowerShape

ARCHITECTURE = "PiToMeLlavaForConditionalGeneration"
OPTIONS_KEY = "pitome"
MEDIA_CONNECTOR = "pitome_vlm"
# Class tokens before the patches, by the kind of tower that vLLM's LLaVA can have.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}

_NO_CALIBRATION = (
    "stock vLLM has no place for a bias on attention logits and counts positions in whole tokens"
)


@dataclass(frozen=True)
class PlannedServing:
    """What a vLLM server does with the images of one model.

    Attributes:
        config: the merge options in force, with calibration switched off.
        schedule: token counts of every image.
        grid: (rows, columns) of the patches, None where the tokens are not a whole grid.
        switched_off: options that the library has on by default and vLLM does not support.
    """

    config: MergeConfig
    schedule: Schedule
    grid: tuple[int, int] | None
    switched_off: tuple[str, ...] = ()

    @property
    def salt(self) -> str:
        """Hex digest of the options, to add to the name of whatever is cached of an image."""
        text = json.dumps(self.config.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        counts = f"{self.schedule.tokens_in} -> {self.schedule.tokens_out}"
        line = f"{self.config.summary()}: {counts} visual tokens per image"
        if self.switched_off:
            line += f"; {' and '.join(self.switched_off)} switched off ({_NO_CALIBRATION})"
        return line


def served_config(config: MergeConfig) -> MergeConfig:
    """A config as vLLM can carry it out: the same merges, calibration switched off.

    Raises:
        ValueError: it asks for what vLLM cannot do; the message says what to write instead.
    """
    if config.is_adaptive:
        raise ValueError(
            "keep='auto' cannot be served: vLLM has to know the number of visual tokens before "
            "it sees the image; give a fixed keep or tokens"
        )
    if config.size_bias:
        raise ValueError(
            f"size_bias=True cannot be served: {_NO_CALIBRATION}; leave size_bias out or set it "
            "to false"
        )
    if config.positions not in (None, "compact"):
        raise ValueError(
            f"positions={config.positions!r} cannot be served: {_NO_CALIBRATION}; leave positions "
            "out or set them to 'compact'"
        )
    return config.replace(size_bias=False, positions="compact")


def hf_overrides(config: MergeConfig) -> dict[str, Any]:
    """What `LLM(hf_overrides=...)` and `vllm serve --hf-overrides` take, in plain JSON values.

    Args:
        config: the merge options; written are those that differ from their defaults, the
            algorithm and the calibration.

    Raises:
        ValueError: see `served_config`.
    """
    served = served_config(config)
    values = json.loads(json.dumps({"algorithm": served.algorithm, **served.changed()}))
    return {"architectures": [ARCHITECTURE], OPTIONS_KEY: values}


def plan_serving(hf_config: Any, config: MergeConfig | None = None) -> PlannedServing:
    """Everything about a server's merging that is known before anything runs.

    Args:
        hf_config: the model's config; holds the options where `config` is None.
        config: the merge options, None to read what `--hf-overrides` brought.

    Raises:
        TypeError: a model or a vision tower that is not supported, or an option of a wrong type.
        ValueError: options that are missing, out of range, that do not fit the model, or that
            vLLM cannot carry out.
    """
    # Late, because it imports torch, which a process that only registers the model does not need.
    from ..merge import algorithms
    from ..merge.budget import schedule_for

    given = _given(hf_config) if config is None else config
    served = served_config(given)
    shape = _tower_shape(hf_config)
    schedule = schedule_for(served, shape)
    # Where nothing is merged there is nothing to calibrate.
    wanted = algorithms.get(given.algorithm).calibrated and not schedule.is_identity
    options = ("size_bias", "positions")
    off = tuple(name for name in options if wanted and getattr(given, name) is None)
    return PlannedServing(served, schedule, shape.grid, off)


def _given(hf_config: Any) -> MergeConfig:
    values = getattr(hf_config, OPTIONS_KEY, None)
    if values is None:
        raise ValueError(
            f'hf_overrides chose {ARCHITECTURE} but hold no "{OPTIONS_KEY}" options; '
            "`pitome-vlm serve-args PATH --keep 0.25` prints what to pass"
        )
    if not isinstance(values, Mapping):
        raise TypeError(
            f'hf_overrides["{OPTIONS_KEY}"] must be an object with fields of MergeConfig, got '
            f"{values!r}"
        )
    try:
        return MergeConfig.from_dict(dict(values))
    except (TypeError, ValueError) as error:
        raise type(error)(f'hf_overrides["{OPTIONS_KEY}"]: {error}') from error


def _tower_shape(hf_config: Any) -> TowerShape:
    """Numbers of the vision tower as vLLM builds it.

    Raises:
        TypeError: not a LLaVA, or a tower whose layers vLLM runs in another way.
    """
    from ..adapters.features import feature_choice, shape_from_numbers
    from ..adapters.tower_tokens import patch_grid

    model_type = getattr(hf_config, "model_type", None)
    if model_type != "llava":
        raise TypeError(
            f"cannot serve a model of type {model_type!r} with merged tokens; supported: llava "
            "(LLaVA-1.5 and its fine-tunes in the format of transformers)" + _why_not(model_type)
        )
    vision = hf_config.vision_config
    choice = feature_choice(hf_config, {})
    if not isinstance(choice.layer, int):
        raise TypeError(
            f"vision_feature_layer={choice.layer} cannot be served: vLLM's LLaVA reads one "
            "feature layer"
        )
    if vision.model_type not in CLASS_TOKENS:
        raise TypeError(
            f"vision tower {vision.model_type!r} cannot be served with merged tokens; supported: "
            f"{', '.join(CLASS_TOKENS)}"
        )
    special = CLASS_TOKENS[vision.model_type]
    return shape_from_numbers(patch_grid(vision), vision.num_hidden_layers, choice, special)


def _why_not(model_type: Any) -> str:
    if model_type in ("llava_next", "llava_onevision"):
        return (
            "; its tiles are unpadded on the grid of whole patches, which merged tokens do not have"
        )
    if model_type == "vipllava":
        return "; vLLM has no ViP-LLaVA"
    return ""
