"""`forward` of a wrapped encoder: the usual output, fewer tokens inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..adapters.encoder_tower import EncoderPass
from ..adapters.encoders import find_encoder
from ..adapters.swap import BASE, swap_in, swap_out
from ..adapters.tower import encoding, is_encoding
from ..releases import STATES_RECORDED_AROUND
from .arguments import by_name, parameters_of
from .merging import STATE
from .wrapped_model import WrappedModel, handed_on

# The attribute of an encoder that holds the wrapped model which it is or belongs to, in a tuple, so
# that torch does not register it.
OWNER = "_pitome_owner"
# Arguments that speak of single tokens or attention maps, of which there are fewer inside.
_PER_TOKEN = ("attention_mask", "head_mask")


class WrappedEncoder:
    """Mixin before the class of an encoder."""

    _pitome_mirrored: tuple[str, ...] = ("forward",)

    _pitome_owner: tuple[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own forward, whose layers merge; its output is as long as ever."""
        if not hasattr(type(self), BASE):
            return handed_on(self, "forward", args, kwargs)
        original = super().forward  # type: ignore[misc]
        merging = self._pitome_owner[0].__dict__.get(STATE)
        call = by_name(original, args, kwargs)
        pixels = call.get("pixel_values")
        if merging is None or not isinstance(pixels, Tensor) or is_encoding(self):  # type: ignore[arg-type]
            return original(**call)
        plan = merging.plan(self, {"pixel_values": pixels})
        if plan.schedule.is_identity:
            return original(**call)
        _refuse(self, call)
        default = getattr(self.config, "return_dict", True)  # type: ignore[attr-defined]
        as_tuple = call.get("return_dict", default) is False
        if as_tuple and _takes(original, "return_dict"):
            call["return_dict"] = True
        merge_pass = EncoderPass.of(plan.new_pass())
        with encoding(self, merge_pass):  # type: ignore[arg-type]
            output = original(**call)
        if isinstance(output, ModelOutput) and output.get("hidden_states") is not None:
            output["hidden_states"] = merge_pass.spread_states(output["hidden_states"])
        return output.to_tuple() if as_tuple and isinstance(output, ModelOutput) else output


class WrappedEncoderModel(WrappedEncoder, WrappedModel):
    """Both, for an encoder that is wrapped itself."""

    _pitome_mirrored = ("forward", "save_pretrained")


def put_on(base: nn.Module) -> None:
    """Put the mixins before the classes of a model and of its encoder.

    Raises:
        RuntimeError: see `swap.swap_in`.
    """
    encoder: Any = find_encoder(base)
    encodes = encoder is base or _records_states(base)
    saves = hasattr(base, "save_pretrained")
    both = WrappedEncoderModel if saves else WrappedEncoder
    swap_in(base, both if encodes else WrappedModel)
    for module in {base, encoder} if encodes else {encoder}:
        module.__dict__[OWNER] = (base,)
    if encoder is not base:
        swap_in(encoder, WrappedEncoder)


def _records_states(base: Any) -> bool:
    """Whether a model around an encoder records the states of its layers."""
    found: bool = base.config.model_type in STATES_RECORDED_AROUND
    return found and not hasattr(base, "text_model")


def take_off(base: nn.Module) -> None:
    """Undo `put_on`, but for `base` itself; a no-op where it was not called."""
    for module in base.modules():
        if isinstance(module, WrappedEncoder) and module is not base:
            swap_out(module)
        module.__dict__.pop(OWNER, None)


def _takes(method: Any, name: str) -> bool:
    found = parameters_of(method)
    return name in found or any(one.kind is one.VAR_KEYWORD for one in found.values())


def _refuse(encoder: Any, call: dict[str, Any]) -> None:
    """Refuse what would be silently wrong with fewer tokens.

    Raises:
        ValueError: a mask over patches or heads, or attention maps are asked for.
    """
    for name in _PER_TOKEN:
        if call.get(name) is not None:
            raise ValueError(
                f"{name} is not available while patches are merged in {type(encoder).__name__}; "
                "leave it out, or unwrap the model first"
            )
    wanted = call.get("output_attentions")
    if encoder.config.output_attentions if wanted is None else wanted:
        raise ValueError(
            f"output_attentions=True is not available while patches are merged in "
            f"{type(encoder).__name__}: layers attend to fewer tokens than there are patches; "
            "leave it out, or unwrap the model first"
        )
