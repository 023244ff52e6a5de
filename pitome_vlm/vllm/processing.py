"""How prompts are counted: vLLM's own placeholders, as many as are left after merging.

Two mixins that go before the classes of a vLLM model. vLLM works out what it would write into a
prompt for an image or video; here that is shortened, and what the model has to know about it is
put next to the pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMError
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.parse import EmbeddingItems

from ..merge.counts import Footprint
from ..releases import vllm_replacement
from .budgets import as_numbers, blamed, check_side, checked, largest
from .options import OPTIONS_KEY, PlannedServing, plan_serving

if TYPE_CHECKING:
    # What stands after the mixins.
    from vllm.multimodal.processing import BaseDummyInputsBuilder as Dummies
    from vllm.multimodal.processing import BaseMultiModalProcessor as Processor
    from vllm.multimodal.processing import BaseProcessingInfo as Info
else:
    Dummies = Processor = Info = object


logger = logging.getLogger("vllm.pitome_vlm")

# Inputs that hold pixels, of images and of videos.
_PIXELS = {"pixel_values", "pixel_values_videos"}


class MergedInfo(Info):
    """Mixin for a model's processing info: what is merged."""

    @functools.cached_property
    def plan(self) -> PlannedServing:
        """What the server merges where a request says nothing."""
        return plan_serving(self.get_hf_config())

    @functools.cached_property
    def exact(self) -> MergedInfo:
        """The same, for pixels as the processor makes them: vLLM rounds them to the model's dtype.

        Counts that follow from pixels would not be the library's otherwise.
        """
        own, model = copy.copy(self), copy.copy(self.ctx.model_config)
        model.dtype = torch.float32
        own.ctx = dataclasses.replace(self.ctx, model_config=model)
        return own


class MergedDummies(Dummies):
    """Mixin for a model's builder of dummy inputs: memory is set aside for the largest budget."""

    info: Any

    def get_dummy_processor_inputs(self, *args: Any, **options: Any) -> Any:
        """As in vLLM 0.27, where the builder makes them."""
        inputs = super().get_dummy_processor_inputs(*args, **options)
        return _with_largest(inputs, self.info.plan)


class MergedProcessor(Processor):
    """Mixin for a model's processor: counts merged tokens, and names images by their budgets.

    vLLM names an image after its content and the processor's options. Caches that outlive a server
    (shared encoder or KV stores) would hand features of one budget to a server with another.
    """

    info: Any
    # Of the request in hand; requests are processed by copies.
    _plan: PlannedServing

    def get_dummy_inputs(self, *args: Any, **options: Any) -> Any:
        """As in vLLM 0.32, where the processor makes them."""
        inputs = super().get_dummy_inputs(*args, **options)
        return _with_largest(inputs, self.info.plan)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one request.

        Raises:
            ValueError: its budget or another of its options is not allowed here, or the prompt has
                no place for an image.
        """
        options, own = dict(inputs.hf_processor_mm_kwargs or {}), copy.copy(self)
        own._plan = checked(self.info.plan, options, self.info.get_hf_processor())
        options.pop(OPTIONS_KEY, None)
        if own._plan.config.by_pixels:
            own.info = self.info.exact
        # Every release asks the inputs for their names.
        salted = copy.copy(inputs)
        salted.hf_processor_mm_kwargs = options
        salted.get_mm_hashes = functools.partial(
            _salted_names, salted.get_mm_hashes, own._plan.salt
        )
        try:
            return super(MergedProcessor, own).apply(salted, timing_ctx)
        except (ValueError, VLLMError, MemoryError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = blamed(error, options)
            if said is None:
                raise
            # Clients get one line; with options every error is laid to them, a fault of ours too.
            logger.exception("%s", said)
            raise ValueError(said) from error

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        found: torch.dtype = self.dummy_inputs.info.ctx.model_config.dtype
        return found

    def _hf_processor_applies_updates(self, *_: Any, **__: Any) -> bool:
        # vLLM 0.27 would look for merged placeholders where transformers wrote unmerged ones.
        return False

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Any:
        side = getattr(self.info.get_hf_config().vision_config, "image_size", None)
        for item in itertools.chain.from_iterable(out_mm_kwargs.values()):
            for name in _PIXELS & item.keys():
                check_side(item[name].data, side)
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if not self.info.plan.merges:
            return updates
        return [self._merged(update, mm_items, out_mm_kwargs) for update in updates]

    def _merged(self, update: Any, mm_items: Any, out_mm_kwargs: Any) -> Any:
        """An update that writes merged placeholders; budgets are put next to the pixels."""
        items = mm_items.get(update.modality)
        if not items or isinstance(items, EmbeddingItems):
            return update
        written, tokenizer = [], self.info.get_tokenizer()
        for index, item in enumerate(out_mm_kwargs[update.modality]):
            found = update.replacement(index)
            ids, shown, remade = vllm_replacement(found, tokenizer)
            footprints = self.footprints(update.modality, int(shown.sum()), items, index)
            plan = self._plan
            if plan.config.by_pixels:
                plan = plan.for_pixels(self.looked_at(item))
                _round(item, self.dtype)
            stays = _that_stay(shown, footprints, plan)
            left = [one for one, stay in zip(ids, stays.tolist(), strict=True) if stay]
            written.append(remade(left, shown[stays]))
            # On the CPU, where vLLM asks for positions.
            field = MultiModalBatchedField(keep_on_cpu=True)
            numbers = as_numbers(plan, int(shown.sum()))
            item[OPTIONS_KEY] = MultiModalFieldElem(data=numbers, field=field)
        return dataclasses.replace(update, replacement=written.__getitem__)

    def looked_at(self, item: Any) -> Tensor:
        """[F, 3, H, W] of an image or video, what its count follows from with keep="auto"."""
        pixels: Tensor = item["pixel_values"].data
        return pixels[None]

    def footprints(self, modality: str, full: int, items: Any, index: int) -> list[Footprint]:
        """What vLLM makes of one item (of its tiles), as far as counting needs it.

        Args:
            modality: "image" or "video".
            full: tokens without merging.
            items: all of the request's.
            index: which of them.

        Raises:
            ValueError: the schedule does not start from the number of tokens that vLLM makes.
        """
        del modality, items, index
        expected = self._plan.schedule.tokens_in
        if full != expected:
            raise ValueError(
                f"vLLM makes {full} visual tokens of an image where {expected} were expected; the "
                "model's config.json does not fit its processor"
            )
        return [Footprint(full)]


def _round(item: Any, dtype: torch.dtype) -> None:
    """Give the model its inputs in its own dtype."""
    for name, field in item.items():
        if isinstance(field.data, Tensor) and field.data.is_floating_point():
            item[name] = dataclasses.replace(field, data=field.data.to(dtype))


def _that_stay(shown: Tensor, footprints: list[Footprint], plan: PlannedServing) -> Tensor:
    """Which of a prompt's tokens for an item are left, [n] bool: the first ones of every tile."""
    merge_pass = plan.new_pass()
    kept = [torch.arange(one.full) < merge_pass.count(one).out for one in footprints]
    stays = torch.ones_like(shown)
    stays[shown] = torch.cat(kept)
    return stays


def _with_largest(inputs: Any, plan: PlannedServing) -> Any:
    budget = largest(plan)
    if budget is not None:
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, OPTIONS_KEY: budget}
    return inputs


def _salted_names(names_of: Callable[..., Any], salt: str, *args: Any, **options: Any) -> Any:
    return {
        modality: [
            None if name is None else hashlib.sha256(f"{name}/{salt}".encode()).hexdigest()
            for name in names
        ]
        for modality, names in names_of(*args, **options).items()
    }
