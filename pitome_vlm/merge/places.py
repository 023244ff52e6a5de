"""What a language model is told about merged tokens, and where they sit."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MergeConfig, Positions


def told(config: MergeConfig, *, wanted: bool) -> tuple[bool, Positions]:
    """`size_bias` and `positions` of a config with what is None decided.

    Each follows the other one, because each alone hurts.

    Args:
        config: the merge options.
        wanted: what to do with both None (`Algorithm.calibrated`).
    """
    bias, positions = config.size_bias, config.positions
    if bias is None:
        bias = wanted if positions is None else positions != "compact"
    if positions is None:
        positions = "mean" if bias else "compact"
    return bias, positions


def group_places(values: Tensor, source: Tensor, anchors: Tensor, how: Positions) -> Tensor:
    """Places of merged tokens.

    Args:
        values: [P, D] places of the tokens before, D numbers each.
        source: [P] int64, the merged token of every one of them.
        anchors: [n] int64, the token that every merged one is named after.
        how: the "mean" of a group's places; their "median", each of the D numbers for itself and
            the lower one of two in the middle; or the "original" place of the token that the
            group is named after.

    Returns:
        [n, D] in the dtype of `values`.
    """
    source, anchors = source.to(values.device), anchors.to(values.device)
    if how == "original":
        return values[anchors]
    sizes = torch.bincount(source, minlength=len(anchors))
    if how == "mean":
        total = values.new_zeros(len(anchors), values.shape[1]).index_add(0, source, values)
        return total / sizes[:, None]
    middle = sizes.cumsum(0) - sizes + (sizes - 1) // 2
    found = []
    for column in values.T:
        order = column.argsort(stable=True)
        order = order[source[order].argsort(stable=True)]
        found.append(column[order[middle]])
    return torch.stack(found, 1)
