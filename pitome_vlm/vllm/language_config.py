"""Which language models vLLM can tell about merged tokens, from their configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Rotary embeddings whose angles grow evenly with the position, so that places between two whole
# ones can be had: names in the config of the language model.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "ntk")
# The same where a place has a time, a row and a column.
SECTION_TYPES = ("default", "mrope", "yarn")
UNCALIBRATED = "size_bias=false and positions='compact'"
# Language models whose attention logits are more than scaled products, by `model_type`.
_OTHER_LOGITS = {
    "gpt_oss": "its attention has sinks",
    "bloom": "its attention has ALiBi slopes",
    "mpt": "its attention has ALiBi slopes",
}


def check_language_model(
    text_config: Any, *, size_bias: bool, places: bool, sections: bool = False
) -> None:
    """Refuse language models whose attention or positions vLLM computes in another way.

    Args:
        text_config: of the language model.
        size_bias: whether its attention has to add log sizes.
        places: whether it has to take places between two positions.
        sections: whether a place is a time, a row and a column.

    Raises:
        ValueError: this is one.
    """
    name = getattr(text_config, "model_type", "unknown")
    reason = _OTHER_LOGITS.get(name) if size_bias else None
    if size_bias and getattr(text_config, "attn_logit_softcapping", None):
        reason = "its attention logits are capped after the bias"
    if size_bias and getattr(text_config, "alibi", False):
        reason = "its attention has ALiBi slopes"
    rotary = _rope_parameters(text_config)
    if places and not rotary:
        reason = "it has no rotary positions, which places of merged tokens need"
    for parameters in rotary if places else ():
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        known = SECTION_TYPES if sections else ROPE_TYPES
        if kind not in known or ("mrope_section" in parameters) is not sections:
            reason = (
                f"its rope_type {kind!r} has no places between two positions (supported: "
                f"{', '.join(known)})"
            )
    if places and getattr(text_config, "llama_4_scaling", None):
        reason = "it scales queries by their positions (llama_4_scaling)"
    if reason is not None:
        advice = "" if sections else f"; serve it with {UNCALIBRATED}"
        raise ValueError(f"language model {name!r} cannot be calibrated in vLLM: {reason}{advice}")


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
