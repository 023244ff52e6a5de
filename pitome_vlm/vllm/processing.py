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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.parse import EmbeddingItems

from ..merge.counts import Footprint
from .budgets import as_numbers, largest, requested
from .options import OPTIONS_KEY, PlannedServing, plan_serving

if TYPE_CHECKING:
    # What stands after the mixins.
    from vllm.multimodal.processing import BaseDummyInputsBuilder as Dummies
    from vllm.multimodal.processing import BaseMultiModalProcessor as Processor
    from vllm.multimodal.processing import BaseProcessingInfo as Info
else:
    Dummies = Processor = Info = object


class MergedInfo(Info):
    """Mixin for a model's processing info: what is merged."""

    @functools.cached_property
    def plan(self) -> PlannedServing:
        """What the server merges where a request says nothing."""
        return plan_serving(self.get_hf_config())


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
            ValueError: its budget is not allowed here.
        """
        options = dict(inputs.hf_processor_mm_kwargs or {})
        own = copy.copy(self)
        own._plan = requested(self.info.plan, options.pop(OPTIONS_KEY, None))
        # Every release asks the inputs for their names.
        salted = copy.copy(inputs)
        salted.hf_processor_mm_kwargs = options
        salted.get_mm_hashes = functools.partial(
            _salted_names, salted.get_mm_hashes, own._plan.salt
        )
        return super(MergedProcessor, own).apply(salted, timing_ctx)

    def _hf_processor_applies_updates(self, *_: Any, **__: Any) -> bool:
        # vLLM 0.27 would look for merged placeholders where transformers wrote unmerged ones.
        return False

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Any:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if not self.info.plan.merges:
            return updates
        return [self._merged(update, mm_items, out_mm_kwargs) for update in updates]

    def _merged(self, update: Any, mm_items: Any, out_mm_kwargs: Any) -> Any:
        """An update that writes merged placeholders; budgets are put next to the pixels."""
        items = mm_items.get(update.modality)
        if not items or isinstance(items, EmbeddingItems):
            return update
        written = []
        for index, item in enumerate(out_mm_kwargs[update.modality]):
            whole = update.replacement(index)
            footprint = self.footprint(update.modality, len(whole), items, index)
            plan = self._plan.for_pixels(self.looked_at(item))
            written.append(whole[: plan.new_pass().count(footprint).out])
            # On the CPU, where vLLM asks for positions.
            field = MultiModalBatchedField(keep_on_cpu=True)
            numbers = as_numbers(plan, len(whole))
            item[OPTIONS_KEY] = MultiModalFieldElem(data=numbers, field=field)
        return dataclasses.replace(update, replacement=written.__getitem__)

    def looked_at(self, item: Any) -> Tensor:
        """[F, 3, H, W] of an image or video, what its count follows from with keep="auto"."""
        pixels: Tensor = item["pixel_values"].data
        return pixels[None]

    def footprint(self, modality: str, full: int, items: Any, index: int) -> Footprint:
        """What vLLM makes of one item, as far as counting needs it.

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
        return Footprint(full)


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
