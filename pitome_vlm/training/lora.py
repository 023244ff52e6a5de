"""LoRA on a wrapped model: which layers get an adapter, and the model ready to train."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..adapters import find_adapter
from ..adapters.features import feature_choice
from ..adapters.tower import find_encoder_layers
from ..adapters.tower_tokens import feature_depth
from ..common import require, whole_number
from ..loading.quantization import allow_gradients
from ..merge.config import MergeConfig
from ..wrapping.wrap import base_model, is_wrapped, merge_config, wrap

PARTS = ("language_model", "projector", "vision_tower")


@dataclass(frozen=True)
class LoraOptions:
    """Size and place of the adapter.

    Attributes:
        rank: of the two matrices, >= 1.
        alpha: the update is multiplied by alpha / rank; > 0.
        dropout: of the adapter's input, in [0, 1).
        parts: some of `PARTS`; every linear layer of them gets an adapter. In the vision tower,
            only layers that the read features depend on (others never get a gradient).
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    parts: tuple[str, ...] = ("language_model",)

    def __post_init__(self) -> None:
        whole_number("rank", self.rank, 1)
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        object.__setattr__(self, "parts", tuple(self.parts))
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(
                f"parts must be some of {', '.join(PARTS)}, got {', '.join(self.parts) or 'none'}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"parts": list(self.parts)}

    def __str__(self) -> str:
        drop = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"rank {self.rank}, alpha {self.alpha:g}{drop}, on {', '.join(self.parts)}"


def target_modules(model: nn.Module, parts: tuple[str, ...] = ("language_model",)) -> str:
    """A regular expression for PEFT's `target_modules`: the linear layers of some parts.

    Plain names such as "q_proj" would also match the vision tower's layers of the same name.

    Args:
        model: a LLaVA, wrapped or not.
        parts: some of `PARTS`.

    Raises:
        TypeError: not a supported model.
        ValueError: a part has no linear layer.
    """
    base: Any = base_model(model)
    adapter = find_adapter(base)
    modules = adapter.parts(base)
    unread = _unread(base) if "vision_tower" in parts else set()
    patterns = []
    for part in parts:
        found = getattr(modules, part)
        roots = found if isinstance(found, tuple) else (found,)
        inside = {module for root in roots for module in root.modules()}
        names = [
            name
            for name, module in base.named_modules()
            if module in inside and isinstance(module, nn.Linear) and module not in unread
        ]
        if not names:
            raise ValueError(f"{part} has no linear layer that could get an adapter")
        patterns.append(_pattern(names, numbered=part == "vision_tower"))
    return "|".join(patterns)


def _unread(base: Any) -> set[nn.Module]:
    """Modules of the vision tower that the read features do not depend on.

    Raises:
        TypeError: the layers of a tower that LLaVA reads an inner layer of are unknown.
    """
    adapter = find_adapter(base)
    tower = adapter.parts(base).vision_tower
    try:
        stacks = list(find_encoder_layers(tower))
    except TypeError:
        if adapter.own_scatter or adapter.own_positions:
            return set()  # these read their towers' last layer, and what follows it
        raise
    unread: set[nn.Module] = set()
    for layers in stacks:
        for layer in layers[_used(base, len(layers)) :]:
            unread |= set(layer.modules())
        unread |= _outside(tower, layers)
    return unread


def _used(base: Any, n_layers: int) -> int:
    """Layers of the tower up to the one whose features are read."""
    adapter = find_adapter(base)
    if not adapter.own_scatter:
        return adapter.tower_shape(base).used_layers
    try:
        return max(feature_depth(feature_choice(base.config, {}).layer, n_layers))
    except ValueError:
        return n_layers  # the config names no layer: the last one is read


def prepare(model: Any, options: LoraOptions | None = None) -> Any:
    """A wrapped model with a trainable adapter, as a `PeftModel`; in place.

    The merge settings stay, and everything but the adapter is frozen. 4-bit layers are made to
    pass gradients on (`quantization.allow_gradients`). Whatever saves the result
    (`save_pretrained`, `Trainer`, `push_to_hub`) saves the merge settings with it.

    Args:
        model: a wrapped LLaVA, or a `PeftModel` of one, whose adapter is trained further.
        options: of a new adapter.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: the options are no `LoraOptions`.
        ValueError: the model is not wrapped, or has an adapter and options are given.
    """
    require("peft", "train", "training")
    import peft

    if not is_wrapped(model):
        raise ValueError(
            "the model is not wrapped; call pitome_vlm.wrap(model, keep=0.25) first (keep=1.0 to "
            "train without merging)"
        )
    if options is not None and not isinstance(options, LoraOptions):
        raise TypeError(f"LoRA options must be a LoraOptions, got {type(options).__name__}")
    config: MergeConfig = merge_config(model)
    allow_gradients(model)
    if isinstance(model, peft.PeftModel):
        if options is not None:
            raise ValueError(
                "the model already has an adapter, so new LoRA options would have no effect; leave "
                "them out"
            )
        model.base_model.set_adapter(model.active_adapters)
    else:
        chosen = options or LoraOptions()
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=chosen.rank,
                lora_alpha=chosen.alpha,
                lora_dropout=chosen.dropout,
                target_modules=target_modules(model, chosen.parts),
            ),
        )
    return wrap(model, config=config)


def save_adapter(model: Any, folder: Any) -> None:
    """Save an adapter with its merge settings, however model and adapter were put together.

    `peft_model.save_pretrained(folder)` does the same if `wrap` was called on the `PeftModel`, as
    `prepare` and `load` do. If the model was wrapped first and PEFT applied to it by hand, use
    this function, or call `wrap` again on the `PeftModel`.

    Raises:
        ValueError: the model is not wrapped.
        TypeError: not a `PeftModel`.
    """
    if not hasattr(type(model), "peft_config"):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    wrap(model, config=merge_config(model)).save_pretrained(folder)


def _outside(tower: nn.Module, layers: nn.ModuleList) -> set[nn.Module]:
    """Modules of a tower outside its encoder layers: embeddings, an unread pooling head."""
    inside = {module for layer in layers for module in layer.modules()}
    return {module for module in tower.modules() if module not in inside}


def _pattern(names: list[str], *, numbered: bool) -> str:
    """One expression for paths that differ in their last names and their layer numbers."""
    leaves: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    layers: dict[str, set[int]] = {}
    for name in names:
        shape = re.sub(r"\.\d+\.", ".#.", name)
        layers.setdefault(shape, set()).update(int(p) for p in name.split(".") if p.isdigit())
    for shape, found_in in layers.items():
        parent, _, leaf = shape.rpartition(".")
        leaves.setdefault((parent, tuple(sorted(found_in))), []).append(leaf)
    found = []
    for (parent, numbers), last in leaves.items():
        wanted = f"(?:{'|'.join(map(str, numbers))})" if numbered else r"\d+"
        path = re.escape(parent).replace(r"\#", wanted)
        found.append(rf"(?:.*\.)?{path}\.(?:{'|'.join(map(re.escape, last))})")
    return "|".join(found)
