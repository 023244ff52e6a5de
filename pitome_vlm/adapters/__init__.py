"""Which models can be wrapped, and where their parts are.

Knows: model families. Does not know: algorithms. A new family is one adapter class and one entry
in `ADAPTERS`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..merge_pass import MergePass, VisualTokens
from ..schedule import TowerShape
from .hf_llava import HFLlavaAdapter
from .original_llava import OriginalLlavaAdapter
from .parts import ModelParts


class Adapter(Protocol):
    """What the wrapper asks of a model family. Adapters hold no state.

    Attributes:
        name: for messages.
        calls: the calling convention, which decides what is put in front of the model's class
            (`wrapper.MIXINS`).
    """

    name: str
    calls: str

    def matches(self, model: Any) -> bool:
        """Whether this adapter serves the model."""
        ...

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """Numbers of the vision tower, from the configuration alone."""
        ...

    def install(self, model: Any, *, inside_tower: bool) -> None:
        """Prepare the vision tower; all or nothing."""
        ...

    def uninstall(self, model: Any) -> None:
        """Undo `install`, leaving nothing behind."""
        ...

    def text_config(self, model: Any) -> Any:
        """Configuration of the language model, the object its attention layers read."""
        ...

    def parts(self, model: Any) -> ModelParts:
        """Where the weights are."""
        ...

    def encode_images(
        self, model: Any, pixel_values: Tensor, merge_pass: MergePass, **feature_options: Any
    ) -> VisualTokens:
        """Tower, merging and projector for a batch of images."""
        ...


ADAPTERS: tuple[Adapter, ...] = (HFLlavaAdapter(), OriginalLlavaAdapter())


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
    shown = f"{kind} (model_type {model_type!r})" if model_type else kind
    raise TypeError(
        f"cannot wrap {shown}: looked for a model of type {', '.join(a.name for a in ADAPTERS)} "
        "with a vision_tower, a multi_modal_projector and a language_model; pass a "
        "LlavaForConditionalGeneration or VipLlavaForConditionalGeneration, a model of the original "
        "llava package, or a PeftModel of one"
    )
