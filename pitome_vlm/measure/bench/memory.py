"""How many prompts fit into memory: found by trying on an accelerator, computed anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ...adapters import find_adapter
from ...merge.config import MergeConfig
from ...wrapping.encode import planned_schedule
from ...wrapping.wrap import base_model
from ..accounting import kv_bytes_per_token
from ..flops import tower_lengths
from ..sizes import pieces_of
from ..weights import weights_of
from .measurement import answer, installed
from .phases import Phases
from .prompts import Budget, Case, inputs_for

MOST_TRIED = 1024
FORMULA = (
    "(memory - weights) / (KV cache of prompt and answer + the larger of: "
    "tower, its kept states and one layer's activations; prefill, one layer's activations)"
)


def largest_batch(model: Any, budget: Budget, case: Case, *, guess: int = 1) -> int:
    """The largest batch whose answers fit the device's memory, found by trying, within 1/16.

    Args:
        model: an unwrapped model on an accelerator.
        budget: what is merged.
        case: what is asked; answers are as long as it says, because their cache counts.
        guess: the batch to try first, for instance the result of `fitting_batch`.

    Raises:
        ValueError: on a CPU, where running out of memory ends the process.
    """
    if model.device.type == "cpu":
        raise ValueError(
            "the largest batch is found by trying on an accelerator only; on a CPU it is computed"
        )

    def fits(batch: int) -> bool:
        inputs = None
        try:
            with installed(model, budget), torch.no_grad():
                inputs = inputs_for(model, dataclasses.replace(case, batch=batch))
                answer(model, inputs, case.answer_tokens)
            return True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            del inputs
            torch.get_device_module(model.device).empty_cache()

    return search_largest(fits, MOST_TRIED, guess)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory is full, in the words of PyTorch or a CUDA library."""
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def is_computable(model: Any) -> bool:
    """Whether `FORMULA` covers the model's tower: only towers counted layer by layer."""
    base: Any = base_model(model)
    adapter = find_adapter(base)
    return adapter.tower_flops(base, adapter.footprint(base)) is None


def search_largest(fits: Callable[[int], bool], limit: int, guess: int = 1) -> int:
    """The largest number up to `limit` that fits, within 1/16 below it; 0 where 1 does not.

    `fits` is true up to some number and false above it; `guess` is tried first.
    """
    low, high = 0, limit + 1
    probe, factor = min(max(1, guess), limit), 1.25 if guess > 1 else 2.0
    while high - low > max(1, low // 16):
        if fits(probe):
            low = probe
            probe = max(low + 1, int(low * factor)) if high > limit else (low + high) // 2
        else:
            high = probe
            probe = min(high - 1, int(high / factor)) if not low else (low + high) // 2
        probe = min(max(1, probe), limit)
    return low


def fitting_batch(whole: Any, result: Phases, memory: int, dtype: torch.dtype) -> int:
    """The largest batch by `FORMULA`, which ignores fragmentation; 0 if the weights do not fit.

    Args:
        whole: the model at full depth; it may be on the meta device.
        result: budget and case.
        memory: bytes available for weights and everything else.
        dtype: dtype of activations and cache.
    """
    left = memory - weights_of(whole).total
    return max(0, int(left // prompt_bytes(whole, result, dtype)))


def prompt_bytes(whole: Any, result: Phases, dtype: torch.dtype) -> int:
    """Bytes that one prompt of a batch adds: its cache and the largest activations at one time."""
    base: Any = base_model(whole)
    text, vision = base.config.get_text_config(), find_adapter(base).parts(base).vision_config
    prompt = result.costs.prompt_tokens
    cache = (prompt + result.case.answer_tokens) * kv_bytes_per_token(base, dtype)
    # Residual, its norm, attention's output; gate, up and their product.
    prefill = prompt * (3 * text.hidden_size + 3 * text.intermediate_size) * dtype.itemsize
    prefill += text.vocab_size * 2 * 4  # logits are turned to float32
    tiles = sum(piece.tiles for piece in pieces_of(base, **result.case.shown))
    inner = getattr(vision, "intermediate_size", 4 * vision.hidden_size)
    schedule = planned_schedule(base, result.budget.config or MergeConfig(keep=1.0))
    # All hidden states of the tower are kept until features are read.
    lengths = tower_lengths(schedule)
    states = sum(lengths) * vision.hidden_size
    states += max(lengths) * (3 * vision.hidden_size + 2 * inner)
    tower = states * tiles * result.case.images * dtype.itemsize
    return int(cache + max(prefill, tower))
