"""Batches shortened before the model sees them, as the wrapped model would shorten them.

A wrapped model shortens its inputs itself, and its logits are then shorter than the labels it was
given. Code that compares both (label smoothing, token accuracy, `Trainer.predict`, custom losses)
needs a batch shortened beforehand. The number of visual tokens is known in advance, so this takes
no pixels; `pitome_vlm.compact_inputs` embeds the images as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..wrapping.columns import IGNORED_LABEL, compaction, surplus_placeholders
from ..wrapping.prompt import pad_id
from ..wrapping.wrap import is_wrapped, merging_of


def shorten(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without the placeholders that merging makes superfluous.

    `model(**shorten(model, batch))` computes the same as `model(**batch)`, and its logits have the
    length of the shortened labels.

    Args:
        model: a LLaVA, wrapped or not, also inside a `PeftModel`.
        batch: `input_ids` [B, T] and other tensors per token (`attention_mask`, `labels`, token
            types); `pixel_values`, `image_sizes` and others are passed through. `position_ids` must
            be left to the model.

    Returns:
        A new mapping with tensors [B, S]. Unchanged are: batches without images, batches of an
        unwrapped model or of one that `can_shorten` denies (use `compact_inputs`), and the rare
        case that adjacent merged images have together as many tokens as unmerged ones, so that the
        model could not tell them apart.

    Raises:
        ValueError: placeholders and images do not match, or `position_ids` are given.
    """
    given = dict(batch)
    ids = given.get("input_ids")
    if ids is None or not is_wrapped(model):
        return given
    base, merging = merging_of(model)
    if not merging.has_pixels(given) or not can_shorten(model):
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
    short, fills = dict(given), {"labels": IGNORED_LABEL, "input_ids": pad_id(base)}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape and value.dim() == 2:
            short[name] = moves.take(value, fills.get(name, 0))
    if mask is None and moves.padded:
        short["attention_mask"] = moves.valid.long()
    return short


def can_shorten(model: nn.Module) -> bool:
    """Whether batches of a wrapped model can be shortened before images are encoded.

    Not with keep="auto", where the count depends on the pixels; nor where the model places tokens
    by the whole prompt (Qwen-VL), or its own forward puts features into it (docs/models.md).
    """
    _, merging = merging_of(model)
    adapter = merging.adapter
    return not (merging.config.is_adaptive or adapter.own_positions or adapter.own_scatter)


class ShorteningCollator:
    """Any collator, followed by `shorten`; for your own `Trainer`, or TRL's."""

    def __init__(self, model: nn.Module, collate: Callable[[Any], Mapping[str, Any]]) -> None:
        """Take the model, whose merge settings are read at every batch, and the collator."""
        self.model, self.collate = model, collate

    def __call__(self, examples: Any) -> dict[str, Any]:
        """The batch, shortened."""
        return shorten(self.model, self.collate(examples))
