"""Which models can be wrapped, and where their parts are.

One adapter class per family of models and one entry in `ADAPTERS` (docs/adding-a-model.md).
Adapters know nothing of algorithms.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Adapter
from .families import FAMILIES
from .generic import GenericAdapter
from .hf_anyres import HFAnyResAdapter
from .hf_llava import HFLlavaAdapter
from .hf_video import HFNextVideoAdapter, HFVideoAdapter, HFVideoLlavaAdapter
from .original_anyres import OriginalAnyResAdapter
from .original_llava import OriginalLlavaAdapter
from .qwen_vl import QwenVLAdapter

__all__ = ["ADAPTERS", "Adapter", "HFLlavaAdapter", "find_adapter", "model_types", "register"]

ADAPTERS: list[Adapter] = [
    HFLlavaAdapter(),
    HFAnyResAdapter(),
    HFVideoAdapter(),
    HFNextVideoAdapter(),
    HFVideoLlavaAdapter(),
    OriginalLlavaAdapter(),
    OriginalAnyResAdapter(),
    QwenVLAdapter(),
    *(GenericAdapter(family) for family in FAMILIES),
]


def register(adapter: Adapter) -> Adapter:
    """Let models of a further family be wrapped.

    Registering the same class again changes nothing.

    Raises:
        TypeError: not an instance of a subclass of `Adapter`.
        ValueError: another adapter serves one of its model types.
    """
    given: Any = adapter
    if not isinstance(given, Adapter):
        shown = given.__name__ if isinstance(given, type) else repr(given)
        raise TypeError(
            f"register takes an instance of a subclass of pitome_vlm.adapters.Adapter, got {shown}"
        )
    for known in ADAPTERS:
        if type(known) is type(adapter) and known.model_types == adapter.model_types:
            return adapter
        taken = set(known.model_types) & set(adapter.model_types)
        if taken:
            raise ValueError(
                f"model type {min(taken)!r} is already served by {type(known).__name__}"
            )
    ADAPTERS.append(adapter)
    return adapter


def model_types() -> tuple[str, ...]:
    """Model types that can be wrapped."""
    return tuple(name for adapter in ADAPTERS for name in adapter.model_types)


def find_adapter(model: Any) -> Adapter:
    """The adapter that serves a model.

    Raises:
        TypeError: none does; the message says what was looked for.
    """
    if isinstance(model, nn.Module):
        for adapter in ADAPTERS:
            if adapter.matches(model):
                return adapter
    kind = type(model).__name__
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in model_types():
        raise TypeError(
            f"cannot wrap {kind} alone: it lacks parts that merging needs; pass the whole model "
            f"of type {model_type!r}, for instance a ...ForConditionalGeneration"
        )
    shown = f"{kind} (model_type {model_type!r})" if model_type else kind
    raise TypeError(
        f"cannot wrap {shown}: looked for a model of type {', '.join(model_types())} "
        "with the parts that its adapter names (a vision tower, a projector, a language model); "
        "pass a LlavaForConditionalGeneration or one of its relatives, a model of the original "
        "llava package, or a PeftModel of one"
    )
