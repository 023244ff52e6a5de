"""What `generate` makes of its arguments, for the caller's prompt instead of the shortened one.

The methods of transformers' generation that a wrapped model changes. What the caller's prompt is is
left to `generation.py`, drafts of answers to `candidates.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import LogitsProcessorList

from .arguments import by_name
from .candidates import caller_candidates
from .generation import CALLER, FullPromptProcessor, caller_criteria


class GenerateHooks:
    """Mixin of a wrapped model; without a shortened prompt everything is the model's own."""

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        original = super()._get_logits_processor  # type: ignore[misc]
        call = by_name(original, args, kwargs)
        inside = call.get("model_kwargs") or {}
        caller = inside.get(CALLER)
        if caller is None:
            return original(**call)
        config = caller.limits(call["generation_config"])
        call |= {
            "generation_config": config,
            "input_ids_seq_length": caller.ids.shape[1],
            "encoder_input_ids": caller.ids,
            "model_kwargs": inside | {"attention_mask": caller.copied_mask(config)},
        }
        found = original(**call)
        return LogitsProcessorList([FullPromptProcessor(found, caller)]) if len(found) else found

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        original = super()._get_stopping_criteria  # type: ignore[misc]
        call = by_name(original, args, kwargs)
        caller = getattr(call.get("stopping_criteria"), "caller", None)
        if caller is None:
            return original(**call)
        call["generation_config"] = caller.limits(call["generation_config"])
        return caller_criteria(original(**call), caller)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        original = super()._get_candidate_generator  # type: ignore[misc]
        call = by_name(original, args, kwargs)
        caller = (call.get("model_kwargs") or {}).get(CALLER)
        return original(**call) if caller is None else caller_candidates(original, call, caller)
