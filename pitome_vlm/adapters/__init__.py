"""Which models can be wrapped, and where their parts are.

Knows: model families. Does not know: algorithms. A new family is one adapter class and one entry
in `ADAPTERS` (docs/adding-a-model.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tokens import Encoded
from .hf_anyres import HFAnyResAdapter
from .hf_llava import HFLlavaAdapter
from .hf_video import HFNextVideoAdapter, HFVideoAdapter, HFVideoLlavaAdapter
from .original_llava import OriginalAnyResAdapter, OriginalLlavaAdapter
from .parts import ModelParts
from .qwen_vl import QwenVLAdapter


class Adapter(Protocol):
    """What the wrapper asks of a model family. Adapters hold no state.

    Attributes:
        model_types: values of `config.model_type`.
        calls: the calling convention, which decides what is put in front of the model's class
            (`wrapping.wrap.MIXINS`).
        counted_per: what the numbers of `tower_shape` are about, "image", "tile" or "frame".
        pixel_inputs: arguments of the model that hold pixels, and the kind each is encoded to.
        vision_inputs: all arguments that `encode` consumes, those included; the language model
            does not see them.
        feature_options: arguments that change how features are read.
        default_image_size: (height, width) of a typical picture, for what is only printed; None
            where every picture is brought to one size.
        videos_pooled_first: videos are pooled and merged in front of the projector.
        own_positions: the model places tokens by the grid of their picture (`prompt_places`).
        place_inputs: of `vision_inputs`, those that only say where tokens stand; features are the
            same whatever they are.
    """

    model_types: tuple[str, ...]
    calls: str
    counted_per: str
    pixel_inputs: Mapping[str, str]
    vision_inputs: tuple[str, ...]
    feature_options: tuple[str, ...]
    default_image_size: tuple[int, int] | None
    videos_pooled_first: bool
    own_positions: bool
    place_inputs: tuple[str, ...]

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

    def placeholder_ids(self, model: Any) -> dict[str, int]:
        """The id of the placeholder of every kind that the model knows."""
        ...

    def footprint(
        self,
        model: Any,
        *,
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        **feature_options: Any,
    ) -> Footprint:
        """Counts of one picture (height, width) in pixels or of a video; nothing is run.

        No size is `default_image_size`. Models that bring every picture to one size ignore it.

        Raises:
            ValueError: `frames` of a model that takes no videos.
        """
        ...

    def prompt_places(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor | None:
        """[B, T, D] places of every token of the unmerged prompt; None where they count up.

        Args:
            model: the model.
            inputs: of a call, before anything is merged.
            mask: [B, T] over the prompt, or None.
        """
        ...

    def tower_flops(self, model: Any, footprint: Footprint) -> int | None:
        """FLOPs of a tower that merging leaves alone; None where its layers are counted."""
        ...

    def opening_token(self, model: Any) -> int | None:
        """The id that has to stand in front of every picture's placeholders; None for none."""
        ...

    def random_pictures(
        self,
        model: Any,
        ids: Tensor,
        n_pictures: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """What a processor would return beside `input_ids`, with noise for pixels.

        Args:
            model: the model.
            ids: [B, T] int64 with all placeholders in place.
            n_pictures: in all rows together.
            image_size: (height, width) of every picture, None for `default_image_size`.
            generator: of the pixels.

        Returns:
            Arguments of the model by name, on the CPU.

        Raises:
            TypeError: inputs of this family are not made up.
        """
        ...

    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        """Counts of every picture of a call by kind, in the order of the placeholders.

        Args:
            model: the model.
            inputs: of `vision_inputs` and `feature_options` what the call has.

        Raises:
            ValueError: an input is missing, or inputs do not belong together.
        """
        ...

    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        """Tower, merging and projector for everything there is to see in a call.

        Args:
            model: an installed model.
            inputs: as for `footprints`.
            merge_pass: a fresh pass, for the first kind; `merge_pass.fresh()` for each further.

        Returns:
            One entry per kind; every picture has the count that `merge_pass.count` promises.
        """
        ...


ADAPTERS: list[Adapter] = [
    HFLlavaAdapter(),
    HFAnyResAdapter(),
    HFVideoAdapter(),
    HFNextVideoAdapter(),
    HFVideoLlavaAdapter(),
    OriginalLlavaAdapter(),
    OriginalAnyResAdapter(),
    QwenVLAdapter(),
]


def register(adapter: Adapter) -> Adapter:
    """Let models be wrapped that `adapter` knows.

    Raises:
        ValueError: another adapter serves one of its model types.
    """
    for known in ADAPTERS:
        taken = set(known.model_types) & set(adapter.model_types)
        if taken and type(known) is not type(adapter):
            raise ValueError(
                f"model type {min(taken)!r} is already served by {type(known).__name__}"
            )
    if not any(type(known) is type(adapter) for known in ADAPTERS):
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
    shown = f"{kind} (model_type {model_type!r})" if model_type else kind
    raise TypeError(
        f"cannot wrap {shown}: looked for a model of type {', '.join(model_types())} "
        "with the parts that its adapter names (a vision tower, a projector, a language model); "
        "pass a LlavaForConditionalGeneration or one of its relatives, a model of the original "
        "llava package, or a PeftModel of one"
    )
