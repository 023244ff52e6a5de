"""What every served model has in common: batches by budget, and a calibrated language model.

A mixin that goes before the class of a vLLM model. How images become tokens is said by the class
that uses it; caches and scheduling are vLLM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..merge.merge_pass import MergePass
from ..merge.tokens import VisualTokens
from .budgets import as_numbers, from_numbers
from .calibration import Calibration, with_numbers
from .options import OPTIONS_KEY, plan_serving

if TYPE_CHECKING:
    # What stands after the mixin.
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration as Base
else:
    Base = object

_TOWER_PREFIXES = ("model.vision_tower.", "vision_tower.")
# From the inputs of images (or videos) of one budget to their tokens.
Encoder = Callable[[dict[str, Any], MergePass], VisualTokens]


class MergedModel(Base):
    """Mixin: visual tokens are merged, and the language model is told about it.

    Next to it, and last, a class names `SupportsMRoPE`: that is how a model of vLLM gives its
    tokens positions. They are asked for where `startup.py` marked the model's config.
    """

    # vLLM would hand the LoRA layers of tower and projector only as many tokens as come out.
    supports_tower_connector_lora = False
    # Numbers that say where a token is.
    axes = 1

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        # Before weights are allocated, so that a refusal costs nothing.
        plan = plan_serving(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._plan = plan
        self.calibration = None
        if plan.is_calibrated:
            self.calibration = Calibration(
                plan,
                self.language_model,
                vllm_config,
                width=self.feature_width(vllm_config),
                axes=self.axes,
            )

    def feature_width(self, vllm_config: Any) -> int:
        """Channels of a visual token as it leaves the encoder."""
        width: int = vllm_config.model_config.get_inputs_embeds_size()
        return width

    def cells(self, inputs: dict[str, Any], visual: VisualTokens) -> Sequence[Tensor]:
        """Of every image [full, D] float32, its tokens without merging from its first place on."""
        del inputs
        return [torch.arange(full).float()[:, None] for full in visual.full_counts]

    def count(self, inputs: Mapping[str, Any], name: str) -> int:
        """How many images (or videos) there are in `inputs`, whose pixels are in `name`."""
        return len(inputs[name])

    def only(self, inputs: Mapping[str, Any], members: list[int]) -> dict[str, Any]:
        """The inputs of some of the images."""
        return {
            name: value[members] if isinstance(value, Tensor) else [value[one] for one in members]
            for name, value in inputs.items()
            if value is not None
        }

    def encoders(self) -> Mapping[str, Encoder]:
        """By the input that holds their pixels, how images and videos become tokens."""
        raise NotImplementedError

    def embed_multimodal(self, **inputs: Any) -> Any:
        """[n_i, C] of every image or video; with channels for sizes and places if calibrated."""
        numbers = inputs.pop(OPTIONS_KEY, None)
        known = self.encoders()
        name = next((one for one in known if inputs.get(one) is not None), None)
        if name is None or not self._plan.merges:
            return super().embed_multimodal(**inputs)
        if numbers is None:
            # Somebody calls the model itself.
            numbers = as_numbers(self._plan, 0).expand(self.count(inputs, name), -1)
        found: list[Any] = [None] * len(numbers)
        for budget, members in _by_budget(torch.as_tensor(numbers)).items():
            merge_pass = from_numbers(self._plan, *budget).new_pass()
            own = self.only(inputs, members)
            visual = known[name](own, merge_pass)
            tokens = visual.features
            if self.calibration is not None:
                cells = self.cells(own, visual)
                tokens = with_numbers(visual, cells, self._plan.config.positions)
            for index, one in zip(members, tokens, strict=True):
                found[index] = one
        return found

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Where every token of a prompt would be without merging; of an image its first place.

        Returns:
            [3, prompt] int64, three equal rows, and what later tokens are moved by.
        """
        positions, moved = torch.arange(len(input_tokens)), 0
        for item in sorted(mm_features, key=lambda one: one.mm_position.offset):
            full, done = int(item.data[OPTIONS_KEY].data[0]), 0
            runs = _runs(item.mm_position)
            kept = sum(end - start for start, end in runs)
            for start, end in runs:
                # Tiles are as large as each other and are merged alike, and so are runs of them.
                own = full * (end - start) // kept
                positions[start:end] = start + moved - done
                moved, done = moved + own - (end - start), done + own
                positions[end:] = torch.arange(end, len(input_tokens)) + moved
        return positions.expand(3, -1).contiguous(), moved

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """As the model does, without the channels."""
        if self.calibration is not None:
            count = len(input_ids)
            multimodal_embeddings = self.calibration.cut(
                count, multimodal_embeddings, is_multimodal
            )
        embedded: Tensor = super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model does, at the places of merged tokens."""
        if self.calibration is not None:
            positions = self.calibration.prepare(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights with the names of published checkpoints or of transformers 5."""
        if hasattr(getattr(self, "vision_tower", None), "vision_model"):
            weights = _published_names(weights)
        loaded: set[str] = super().load_weights(weights)
        return loaded


def _by_budget(numbers: Tensor) -> dict[tuple[float, ...], list[int]]:
    """Which images have which budget, by (keep, tokens)."""
    found: dict[tuple[float, ...], list[int]] = {}
    for index, (_, *budget) in enumerate(numbers.tolist()):
        found.setdefault(tuple(budget), []).append(index)
    return found


def _runs(place: Any) -> list[tuple[int, int]]:
    """Where in a prompt the tokens of an image are: from one place up to before another."""
    if place.is_embed is None:
        return [(place.offset, place.offset + place.length)]
    shown = torch.as_tensor(place.is_embed).long()
    steps = torch.diff(shown, prepend=shown.new_zeros(1), append=shown.new_zeros(1))
    begins, ends = ((steps == sign).nonzero()[:, 0] + place.offset for sign in (1, -1))
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def _published_names(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Towers saved by transformers 5 lack the level `vision_model`, which vLLM expects."""
    for name, weight in weights:
        for prefix in _TOWER_PREFIXES:
            rest = name.removeprefix(prefix)
            if rest != name and not rest.startswith("vision_model."):
                name = f"{prefix}vision_model.{rest}"
                break
        yield name, weight
