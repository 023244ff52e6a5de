"""Batches as short as the wrapped model makes them, before the model sees them.

Knows: that the number of visual tokens is known in advance, so that surplus placeholders can go
without looking at a picture. Does not know: pixels, chat templates or training.

A wrapped model shortens its inputs itself, and its logits are then shorter than the labels it was
given. Whoever compares both (label smoothing, token accuracy, `Trainer.predict`, losses of one's
own) gives it a batch from here, or one from `pitome_vlm.compact_inputs`, which embeds the pictures
as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..wrapping.columns import IGNORED_LABEL, compaction, surplus_placeholders
from ..wrapping.wrap import is_wrapped, merging_of


def shorten(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without the placeholders that merging makes superfluous.

    `model(**shorten(model, batch))` computes what `model(**batch)` does, and its logits are as long
    as the labels of the shortened batch.

    Args:
        model: a LLaVA, wrapped or not, also inside a `PeftModel`.
        batch: `input_ids` [B, T] and what else is per token (`attention_mask`, `labels`, token
            types); `pixel_values`, `image_sizes` and others are passed through. `position_ids` must
            be left to the model.

    Returns:
        A new mapping with tensors [B, S]. Unchanged: batches without pictures, of an unwrapped
        model, with keep="auto" (only looking at a picture tells its count; `compact_inputs`
        does), and (rare) where merged pictures that touch each other would fill the room of
        unmerged ones exactly, so that nobody could tell which they are.

    Raises:
        ValueError: placeholders and pictures do not match, or `position_ids` are given.
    """
    given = dict(batch)
    ids = given.get("input_ids")
    if ids is None or not is_wrapped(model):
        return given
    base, merging = merging_of(model)
    if not merging.has_pixels(given) or merging.config.is_adaptive:
        return given
    plan = merging.plan(base, given)
    if plan.is_identity():
        return given
    if given.get("position_ids") is not None:
        raise ValueError(
            "position_ids cannot be shortened beforehand; leave them out, or use "
            "pitome_vlm.compact_inputs(model, **batch)"
        )
    placeholders, drop = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids) != 0
    kinds = []
    for kind, found in plan.counts().items():
        places = ids == merging.adapter.placeholder_ids(base)[kind]
        counts = [one.full for one in found], [one.out for one in found]
        kinds.append((places, *counts, kind))
        placeholders |= places
        drop |= surplus_placeholders(*kinds[-1])
    mask = given.get("attention_mask")
    moves = compaction(placeholders, drop, mask)
    try:
        for places, full, out, kind in kinds:
            surplus_placeholders(moves.take(places, False), full, out, kind)
    except ValueError:
        return given
    short = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape and value.dim() == 2:
            fill = IGNORED_LABEL if name == "labels" else _pad(base) if name == "input_ids" else 0
            short[name] = moves.take(value, fill)
    if mask is None and not bool(moves.valid.all()):
        short["attention_mask"] = moves.valid.long()
    return short


class ShorteningCollator:
    """Any collator, followed by `shorten`; for a `Trainer` (or TRL) of one's own."""

    def __init__(self, model: nn.Module, collate: Callable[[Any], Mapping[str, Any]]) -> None:
        """Take the model, whose settings are looked up at every batch, and the collator."""
        self.model, self.collate = model, collate

    def __call__(self, examples: Any) -> dict[str, Any]:
        """The batch, shortened."""
        return shorten(self.model, self.collate(examples))


def _pad(base: Any) -> int:
    text = base.config.get_text_config()
    value = text.pad_token_id if text.pad_token_id is not None else base.config.pad_token_id
    return int(value or 0)
