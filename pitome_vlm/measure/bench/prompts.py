"""What a model that is timed is asked: random images and words of the right size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...adapters import find_adapter
from ...common import whole_number
from ...loading.image_processors import blank_inputs
from ...merge.config import MergeConfig
from ...wrapping.encode import checked_size
from ...wrapping.wrap import base_model
from ..sizes import asks_processor, pieces_of


@dataclass(frozen=True)
class Budget:
    """One thing to compare: its name in tables, and what is merged (None: the untouched model)."""

    name: str
    config: MergeConfig | None = None


@dataclass(frozen=True)
class Case:
    """What a model is asked.

    Attributes:
        batch: prompts at a time.
        text_tokens: text tokens of every prompt, more than `images`.
        answer_tokens: tokens of every answer.
        images: images in every prompt.
        image_size: (height, width) of every image in pixels; None for a typical image.
        image_processor: is asked what it makes of an image of that size (`sizes.pieces_of`).

    Raises:
        TypeError: a number that is no whole number.
        ValueError: a number out of range.
    """

    batch: int = 1
    text_tokens: int = 64
    answer_tokens: int = 32
    images: int = 1
    image_size: tuple[int, int] | None = None
    image_processor: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("text_tokens", 2), ("answer_tokens", 2), ("images", 1)):
            whole_number(name, getattr(self, name), least)
        if self.text_tokens <= self.images:
            raise ValueError(
                f"text_tokens must be more than images ({self.images}), because a text token comes "
                f"before every image and one after the last, got {self.text_tokens}"
            )
        if self.image_size is not None:
            checked_size(self.image_size)

    @property
    def shown(self) -> dict[str, Any]:
        """What says how many tokens an image has (`costs`)."""
        return {"image_size": self.image_size, "image_processor": self.image_processor}


def inputs_for(model: Any, case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `generate`: random images and words on the model's device.

    Every prompt of the batch has the same words.

    Args:
        model: a LLaVA of transformers or a relative, wrapped or not.
        case: what is asked.
        seed: random seed of images and words.

    Raises:
        TypeError: a model whose inputs are not known here.
    """
    base: Any = base_model(model)
    adapter = find_adapter(base)
    if adapter.calls != "transformers":
        raise TypeError(
            f"bench does not know how to ask a {type(base).__name__}; it times LLaVA, ViP-LLaVA, "
            "LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL and their relatives in transformers"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = _row(base, case, generator).expand(case.batch, -1).contiguous()
    vision = _random_images(base, case, ids, generator)
    device, dtype = base.device, _pixel_dtype(base)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **vision}
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in found.items()
    }


def _random_images(
    base: Any, case: Case, ids: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Noise in the form that the processor gives images, or that of the adapter without one."""
    adapter, processor = find_adapter(base), case.image_processor
    size = case.image_size or adapter.default_image_size
    if processor is None or size is None or not asks_processor(base):
        return adapter.random_images(
            base, ids, case.batch * case.images, image_size=case.image_size, generator=generator
        )
    made = blank_inputs(processor, base.config.model_type, size, case.images, case.batch)
    found = {name: made[name] for name in adapter.vision_inputs if name in made}
    name = next(name for name, kind in adapter.pixel_inputs.items() if kind == "image")
    found[name] = torch.randn(found[name].shape, generator=generator)
    return found | adapter.image_marks(base, ids)


def _row(base: Any, case: Case, generator: torch.Generator) -> Tensor:
    """[T] ids of one prompt: one text token before every image, the rest after the last image."""
    adapter = find_adapter(base)
    placeholders, opening = adapter.placeholder_ids(base), adapter.opening_token(base)
    special = [*placeholders.values(), *([] if opening is None else [opening])]
    limit = min(base.config.get_text_config().vocab_size, *special)
    words = torch.randint(3, limit, (case.text_tokens,), generator=generator)
    full = sum(piece.full for piece in pieces_of(base, **case.shown))
    image, parts = torch.full((full,), placeholders["image"]), []
    for index in range(case.images):
        parts += [words[index : index + 1] if opening is None else torch.tensor([opening]), image]
    return torch.cat([*parts, words[case.images :]])


def _pixel_dtype(base: Any) -> torch.dtype:
    """The tower's dtype: the tower stays unquantised when the language model is quantised."""
    for parameter in find_adapter(base).parts(base).vision_tower.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    found: torch.dtype = base.dtype
    return found
