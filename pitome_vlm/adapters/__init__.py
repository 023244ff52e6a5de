"""Which models can be wrapped, and where their parts are.

One adapter class per family of models and one entry in `ADAPTERS` (docs/adding-a-model.md).
Adapters know nothing of algorithms.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Adapter
from .encoder import ENCODER_ADAPTER
from .encoders import part_of, why_no_encoder
from .families import FAMILIES
from .family import Family, image_sizes, patch_grids, rounded, tiles
from .generic import GenericAdapter
from .hf_anyres import HFAnyResAdapter
from .hf_llava import HFLlavaAdapter
from .hf_video import HFNextVideoAdapter, HFVideoAdapter, HFVideoLlavaAdapter
from .original_anyres import OriginalAnyResAdapter
from .original_llava import OriginalLlavaAdapter
from .qwen_vl import QwenVLAdapter
from .refused import REFUSED

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Family",
    "HFLlavaAdapter",
    "find_adapter",
    "image_sizes",
    "model_types",
    "patch_grids",
    "register",
    "rounded",
    "tiles",
]

# Of two adapters of one model type the first that matches serves a model: one of a certain tower
# comes before one of any.
ADAPTERS: list[Adapter] = [
    *(GenericAdapter(family) for family in FAMILIES if family.of_tower is not None),
    HFLlavaAdapter(),
    HFAnyResAdapter(),
    HFVideoAdapter(),
    HFNextVideoAdapter(),
    HFVideoLlavaAdapter(),
    OriginalLlavaAdapter(),
    OriginalAnyResAdapter(),
    QwenVLAdapter(),
    *(GenericAdapter(family) for family in FAMILIES if family.of_tower is None),
]


def register(adapter: Adapter | Family) -> Adapter:
    """Let models of a further family be wrapped.

    Registering the same again changes nothing.

    Args:
        adapter: a record of a family, or an instance of a subclass of `Adapter`.

    Returns:
        The adapter that serves the family.

    Raises:
        TypeError: neither of them.
        ValueError: another adapter serves one of its model types.
    """
    given: Any = GenericAdapter(adapter) if isinstance(adapter, Family) else adapter
    if not isinstance(given, Adapter):
        shown = given.__name__ if isinstance(given, type) else repr(given)
        raise TypeError(
            "register takes a pitome_vlm.adapters.Family, or an instance of a subclass of "
            f"pitome_vlm.adapters.Adapter, got {shown}"
        )
    adapter = given
    for known in ADAPTERS:
        if known.is_same(adapter):
            return known
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
    if isinstance(model, nn.Module) and model_type not in model_types():
        if ENCODER_ADAPTER.matches(model):
            return ENCODER_ADAPTER
        why = why_no_encoder(model)
        if why is not None:
            raise TypeError(f"cannot wrap {kind}: {why}")
    if model_type in model_types():
        raise TypeError(
            f"cannot wrap {kind} alone: it lacks parts that merging needs; pass the whole model "
            f"of type {model_type!r}, for instance a ...ForConditionalGeneration"
        )
    shown = f"{kind} (model_type {model_type!r})" if model_type else kind
    inside = part_of(model) if isinstance(model, nn.Module) else None
    more = f"; its encoder can be wrapped on its own, wrap(model.{inside}, ...)" if inside else ""
    raise TypeError(f"cannot wrap {shown}: {why_not(model_type)}{more}")


def why_not(model_type: Any) -> str:
    """Why models of a type cannot be wrapped, or, where nothing is known of it, which can."""
    if model_type in REFUSED:
        return f"{REFUSED[model_type]} (docs/models.md)"
    return what_is_supported()


def what_is_supported() -> str:
    """Which models can be wrapped, in a line."""
    return (
        "pass a LlavaForConditionalGeneration or another model of docs/models.md (LLaVA, Qwen-VL, "
        "InternVL, Gemma 3, Mistral 3, SmolVLM ...), one of the original llava package, or a "
        "PeftModel of one; pitome_vlm.adapters.register() takes further families"
    )
