"""Bytes of a model's weights, part by part, quantised or not.

Nothing is run; the model may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters import find_adapter
from ..wrapping.peft_record import quantization_of
from ..wrapping.wrap import base_model


@dataclass(frozen=True)
class Weights:
    """Bytes that weights take: parameters, buffers, and the scales of quantised layers.

    Attributes:
        language_model: layers and embeddings, with their adapters.
        vision_tower: the tower, with its adapters.
        projector: the projector between the two.
        other: everything else, for instance an lm_head that is not the embedding table.
        quantisation: "nf4", "fp4", "int8", or empty.
    """

    language_model: int
    vision_tower: int
    projector: int
    other: int
    quantisation: str = ""

    @property
    def total(self) -> int:
        """Bytes of all parts; shared weights are counted once."""
        return self.language_model + self.vision_tower + self.projector + self.other


def weights_of(model: nn.Module) -> Weights:
    """The bytes of a LLaVA's weights, also inside a `PeftModel`."""
    base: Any = base_model(model)
    seen: set[Any] = set()
    parts = find_adapter(base).parts(base)
    language = sum(_bytes(part, seen) for part in parts.language_model)
    tower = sum(_bytes(part, seen) for part in parts.towers)
    projector, other = (_bytes(part, seen) for part in (parts.projector, base))
    return Weights(language, tower, projector, other, _kind(base))


def _bytes(module: nn.Module, seen: set[Any]) -> int:
    """Bytes of a module's tensor storages that are not in `seen` yet."""
    total = 0
    for tensor in _tensors(module):
        storage = tensor.untyped_storage()
        # Tensors on the meta device have no address.
        key = storage.data_ptr() or id(tensor)
        if (tensor.device, key) not in seen:
            seen.add((tensor.device, key))
            total += storage.nbytes()
    return total


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        for tensor in own:
            yield tensor
            yield from _attached(getattr(tensor, "quant_state", None))
            yield from _attached({"scales": getattr(tensor, "SCB", None)})
        # LLM.int8 moves its scales here in the first forward pass.
        state = part.__dict__.get("state")
        if type(state).__name__ == "MatmulLtState":
            yield from _attached({name: getattr(state, name) for name in ("CB", "SCB")})


def _attached(holder: Any) -> Iterator[Tensor]:
    """Tensors among the attributes of a quantisation state, nested states included."""
    values = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__name__ == "QuantState":
            yield from _attached(value)


def _kind(base: Any) -> str:
    config = quantization_of(base)
    if config is None:
        return ""
    return "int8" if config.load_in_8bit else str(config.bnb_4bit_quant_type)
