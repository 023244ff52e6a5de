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

# Rotary embeddings whose angles grow evenly with the position, so that places between two whole
# ones can be had: names in the config of the language model.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "ntk")
UNCALIBRATED = "size_bias=false and positions='compact'"
# Language models whose attention logits are more than scaled products, by `model_type`.
_OTHER_LOGITS = {
    "gpt_oss": "its attention has sinks",
    "bloom": "its attention has ALiBi slopes",
    "mpt": "its attention has ALiBi slopes",
}


@dataclass(frozen=True)
class PlannedServing:
    """What a vLLM server does with the images of one model.

    Attributes:
        config: the merge options in force, with `size_bias` and `positions` decided.
        schedule: token counts of every image.
        grid: (rows, columns) of the patches, None where the tokens are not a whole grid.
    """

    config: MergeConfig
    schedule: Schedule
    grid: tuple[int, int] | None

    @property
    def size_bias(self) -> bool:
        """Whether attention of the language model adds log sizes."""
        return bool(self.config.size_bias) and not self.schedule.is_identity

    @property
    def places(self) -> bool:
        """Whether tokens keep their unreduced positions."""
        return self.config.positions != "compact" and not self.schedule.is_identity

    @property
    def is_calibrated(self) -> bool:
        """Whether the language model is told anything about merged tokens."""
        return self.size_bias or self.places

    @property
    def salt(self) -> str:
        """Hex digest of the options, to add to the name of whatever is cached of an image."""
        text = json.dumps(self.config.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        counts = f"{self.schedule.tokens_in} -> {self.schedule.tokens_out}"
        return f"{self.config.summary()}: {counts} visual tokens per image"


def served_config(config: MergeConfig) -> MergeConfig:
    """A config as vLLM carries it out: the same merges, `size_bias` and `positions` decided.

    Raises:
        ValueError: it asks for what vLLM cannot do; the message says what to write instead.
    """
    # Late, because it imports torch, which a process that only registers the model does not need.
    from ..merge import algorithms
    from ..merge.places import told

    if config.is_adaptive:
        raise ValueError(
            "keep='auto' cannot be served: vLLM has to know the number of visual tokens before "
            "it sees the image; give a fixed keep or tokens"
        )
    bias, positions = told(config, wanted=algorithms.get(config.algorithm).calibrated)
    return config.replace(size_bias=bias, positions=positions)


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
    from ..merge.budget import schedule_for

    served = served_config(_given(hf_config) if config is None else config)
    shape = _tower_shape(hf_config)
    plan = PlannedServing(served, schedule_for(served, shape), shape.grid)
    if plan.is_calibrated:
        _check_language_model(hf_config.text_config, plan)
    return plan


def _check_language_model(text_config: Any, plan: PlannedServing) -> None:
    """Refuse language models whose attention or positions vLLM computes in another way.

    Raises:
        ValueError: this is one.
    """
    name = getattr(text_config, "model_type", "unknown")
    reason = _OTHER_LOGITS.get(name) if plan.size_bias else None
    if plan.size_bias and getattr(text_config, "attn_logit_softcapping", None):
        reason = "its attention logits are capped after the bias"
    if plan.size_bias and getattr(text_config, "alibi", False):
        reason = "its attention has ALiBi slopes"
    rotary = _rope_parameters(text_config)
    if plan.places and not rotary:
        reason = "it has no rotary positions, which places of merged tokens need"
    for parameters in rotary if plan.places else ():
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ROPE_TYPES or "mrope_section" in parameters:
            reason = (
                f"its rope_type {kind!r} has no places between two positions (supported: "
                f"{', '.join(ROPE_TYPES)})"
            )
    if plan.places and getattr(text_config, "llama_4_scaling", None):
        reason = "it scales queries by their positions (llama_4_scaling)"
    if reason is not None:
        raise ValueError(
            f"language model {name!r} cannot be calibrated in vLLM: {reason}; serve it with "
            f"{UNCALIBRATED}"
        )


def _rope_parameters(text_config: Any) -> list[Mapping[str, Any]]:
    """Parameters of every rotary embedding of a language model, by whatever release wrote them."""
    found = getattr(text_config, "rope_parameters", None)
    if found:
        parts = list(found.values())
        # One for each type of layer, or just one.
        return parts if all(isinstance(part, Mapping) for part in parts) else [found]
    scaling = getattr(text_config, "rope_scaling", None)
    if scaling or getattr(text_config, "rope_theta", None) is not None:
        return [scaling or {}]
    return []


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
