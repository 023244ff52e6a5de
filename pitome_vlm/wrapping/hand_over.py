"""Merged features on their way into a model's own forward, which puts them into the prompt.

Used for models whose adapter says `own_scatter`. Whoever calls forward passes the shortened ids of
some columns; what belongs to placeholders in them is picked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..merge.tokens import Encoded


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """The features of a shortened prompt.

    Attributes:
        ids: [B, S] of the prompt.
        encoded: its visual tokens by kind, in the order of the placeholders.
        before: columns of the conversation before the prompt, held by a cache.
    """

    ids: Tensor
    encoded: list[Encoded]
    before: int = 0

    def of_columns(self, step_ids: Tensor, start: int) -> dict[str, Any]:
        """Outputs of the model's own functions for features, for some columns alone.

        Args:
            step_ids: [B', Q] of a pass; every row of the prompt B' / B times (beams, samples).
                Columns after the prompt hold no images.
            start: the first of these columns, counted over the whole conversation.

        Returns:
            The value of `mm_encoder_outputs` by kind; empty where the columns show no images.
        """
        copies, first = len(step_ids) // len(self.ids), start - self.before
        last = first + step_ids.shape[1]
        found = {}
        for one in self.encoded:
            places = self.ids == one.token_id
            index = places.flatten().cumsum(0).view_as(places) - 1
            places, index = (
                pad(part[:, first:last], (0, max(0, last - part.shape[1])))
                for part in (places, index)
            )
            index = index.repeat_interleave(copies, 0)[places.repeat_interleave(copies, 0)]
            if len(index):
                assert one.handed is not None
                found[one.kind] = one.handed.rows(one.visual.features, index)
        return found
