"""Drafts of answers (prompt lookup, assistant models) for a model whose prompt is shortened.

A draft is made from the caller's own prompt, as for the unwrapped model; only the columns of the
answer are handed over. The model checks every token of it, so that answers do not depend on drafts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
)
from transformers.generation.stopping_criteria import ConfidenceCriteria

from ..releases import CACHE_NAME, STEP_LENGTH, draft_cache
from .generation import CALLER, CallerPrompt, FullPromptProcessor
from .kv_cache import cached_length

# Arguments that say where the shortened prompt is; an assistant gets a prompt of its own.
OWN = (
    *("input_ids", "inputs_embeds", "prompt_images", "prompt_features"),
    *(CALLER, CACHE_NAME),
)
# Whether a column of the prompt shows an image: of use in the pass that reads the images.
MARKS = frozenset({"mm_token_type_ids"})


class FullPromptCandidates(CandidateGenerator):
    """A generator of drafts that sees the caller's prompt, not the shortened one."""

    def __init__(self, inner: CandidateGenerator, caller: CallerPrompt) -> None:
        self.inner, self.caller = inner, caller

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """A draft after [1, S + new] ids: the ids with the draft, and its scores."""
        full = self.caller.restored(input_ids)
        drafted, scores = self.inner.get_candidates(full, **kwargs)
        new = drafted[:, full.shape[1] :].to(input_ids.device)
        return torch.cat([input_ids, new], 1), scores

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Learn how many tokens of the last draft were right."""
        self.inner.update_candidate_strategy(self.caller.restored(input_ids), scores, num_matches)
        if isinstance(self.inner, AssistedCandidateGenerator):
            config = self.inner.assistant_model.generation_config
            if config.num_assistant_tokens_schedule == "heuristic":
                # Kept between calls; generate does it for classes of its own only.
                config.num_assistant_tokens = self.inner.num_assistant_tokens


class CacheOfWhole:
    """The cache of an assistant that shortens prompts too, in columns of the caller's."""

    def __init__(self, cache: Any, removed: int) -> None:
        self.cache, self.removed = cache, removed

    def get_seq_length(self) -> int:
        """Columns of the caller's conversation that are in the cache."""
        return int(self.cache.get_seq_length()) + self.removed

    def crop(self, length: int) -> None:
        """Keep this many columns, or drop as many as a negative number says."""
        self.cache.crop(length - self.removed if length > 0 else length)


class Assistant:
    """An assistant model that reads the images once, whatever is wrapped.

    The generators of transformers hand the assistant the arguments of the main model in every
    round, and count its cache in columns of the whole prompt.
    """

    def __init__(self, model: Any, vision: frozenset[str]) -> None:
        self.model, self.vision = model, vision

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def generate(self, **call: Any) -> Any:
        """A draft as the model's own generate returns it, with the whole prompt."""
        cache = call.pop(CACHE_NAME, None)
        if cache is not None:
            call = {n: value for n, value in call.items() if n not in self.vision | MARKS}
            call[CACHE_NAME] = cache.cache if isinstance(cache, CacheOfWhole) else cache
        else:
            call = self._first(call)
        output = self.model.generate(**call)
        made = output[CACHE_NAME]
        # The last token of a draft is not in the cache.
        removed = output.sequences.shape[1] - 1 - int(made.get_seq_length())
        output[CACHE_NAME] = CacheOfWhole(made, removed) if removed else made
        return output

    def _first(self, call: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the first round: with images, where the model takes them."""
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        known = inspect.signature(base.forward).parameters
        ignored = self.vision | MARKS
        call = {n: value for n, value in call.items() if n not in ignored or n in known}
        # generate reads what is marked as an assistant's as a later round, without images.
        config = copy.copy(call["generation_config"])
        config.is_assistant = False
        call["generation_config"] = config
        # ... and gives no cache of others the means to take a draft back.
        call[CACHE_NAME] = draft_cache(base.config)
        threshold = config.assistant_confidence_threshold
        if threshold:
            criterion = ConfidenceCriteria(assistant_confidence_threshold=threshold)
            call["stopping_criteria"] = StoppingCriteriaList([criterion])
        return call


def caller_candidates(
    original: Callable[..., Any], call: dict[str, Any], caller: CallerPrompt
) -> CandidateGenerator:
    """The generator of drafts that a call asks for, made for the caller's prompt.

    Args:
        original: the model's own `_get_candidate_generator`.
        call: its arguments.
        caller: the prompt.
    """
    inside, ids = call["model_kwargs"], caller.restored(call["input_ids"])
    processors = call.get("logits_processor")
    if processors and isinstance(processors[0], FullPromptProcessor):
        processors = processors[0].processors
    own = {
        name: value
        for name, value in caller.inputs.items()
        if name not in OWN and value is not None and (name in inside or name in caller.vision)
    }
    found = original(
        **call
        | {
            "generation_config": caller.limits(call["generation_config"]),
            "input_ids": ids,
            "inputs_tensor": ids,
            "logits_processor": processors,
            "model_kwargs": own,
        }
    )
    if isinstance(found, AssistedCandidateGenerator):
        found.assistant_model = Assistant(found.assistant_model, caller.vision)
    return FullPromptCandidates(found, caller)


def prepare_first_step(model: Any, ids: Tensor, inputs: dict[str, Any]) -> None:
    """See to what generate leaves out where a draft comes before the first pass.

    Its tokens are appended to the embedded prompt, as they are handed over as ids after the
    prompt's; and of a conversation that a cache holds the beginning of, only the rest is passed.

    Args:
        model: the wrapped model itself.
        ids: [B, S + new], the shortened prompt and the draft.
        inputs: arguments of `prepare_inputs_for_generation`; changed.
    """
    embeds = inputs.get("inputs_embeds")
    if embeds is not None and ids.shape[1] > embeds.shape[1]:
        table = model.get_input_embeddings()
        drafted = ids[:, embeds.shape[1] :]
        # A placeholder may lie outside of the vocabulary; a wrong draft only costs time.
        drafted = drafted.masked_fill(drafted >= table.weight.shape[0], 0)
        embeds = torch.cat([embeds, table(drafted).to(embeds)], 1)
        inputs["inputs_embeds"] = embeds
    cached = cached_length(inputs.get(CACHE_NAME))
    if cached and inputs.get(STEP_LENGTH, cached) is None:
        inputs[STEP_LENGTH] = (ids if embeds is None else embeds).shape[1] - cached
