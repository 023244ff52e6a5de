"""All pairs of tokens compared, without ever holding all pairs where there are very many.

Knows: cosines, and in how many pieces to compute them. Does not know: which algorithm asks.

Up to `WHOLE` tokens the matrix [B, N, N] is made once. Beyond (video, many tiles) its rows are
made piece by piece, used and forgotten: 16384 tokens would take 1 GiB per image and take at most
`PIECE_BYTES` a piece. The decision depends on N alone, so that batching changes no answer. Both
ways compute the same numbers up to rounding; a near tie may fall otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..merge import cosine_similarity, unit_vectors
from ..merge_plan import take_tokens
from .matching import farthest_first, take_similarity

WHOLE = 4096
PIECE_BYTES = 16 * 2**20


class Similarity:
    """Cosines between the tokens of every image of a batch.

    Args:
        keys: [B, N, D] floating point.
    """

    def __init__(self, keys: Tensor) -> None:
        self.n_tokens = keys.shape[1]
        self.whole = cosine_similarity(keys) if self.n_tokens <= WHOLE else None
        self.unit = keys if self.whole is not None else unit_vectors(keys)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, [B, rows, N]) from the top to the bottom."""
        if self.whole is not None:
            yield 0, self.whole
            return
        first = 0
        for piece in self.unit.tensor_split(self._pieces(self.n_tokens, self.n_tokens), dim=1):
            yield first, piece @ self.unit.transpose(-1, -2)
            first += piece.shape[1]

    def best(
        self, side_a: Tensor, side_b: Tensor, worth: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best partner in B of every token in A; ties go to the earlier one of B.

        Args:
            side_a: [B, a] token indices.
            side_b: [B, b] token indices.
            worth: [B, N], the mean of both ends is added to their similarity; None for nothing.

        Returns:
            scores [B, a], places in `side_b` [B, a] int64.
        """
        if self.whole is not None:
            return _best(take_similarity(self.whole, side_a, side_b), side_a, side_b, worth)
        others = take_tokens(self.unit, side_b).transpose(-1, -2)
        pieces = side_a.tensor_split(self._pieces(side_a.shape[1], side_b.shape[1]), dim=1)
        found = [
            _best(take_tokens(self.unit, piece) @ others, piece, side_b, worth) for piece in pieces
        ]
        scores, places = zip(*found, strict=True)
        return torch.cat(scores, 1), torch.cat(places, 1)

    def farthest_first(self, n_out: int) -> Tensor:
        """`matching.farthest_first` by the distance 1 - cosine: [B, n_out] int64."""
        if self.whole is not None:
            return farthest_first(1 - self.whole, n_out)
        nearest = []
        for first, rows in self.rows():
            rows.diagonal(first, -2, -1).fill_(-math.inf)
            nearest.append(1 - rows.amax(-1))
        choice = torch.cat(nearest, 1).argmax(-1)[:, None]
        to_chosen = torch.full_like(self.unit[:, :, 0], math.inf)
        chosen = [choice]
        for _ in range(n_out - 1):
            row = 1 - (self.unit @ take_tokens(self.unit, choice).transpose(-1, -2))[:, :, 0]
            to_chosen = torch.minimum(to_chosen, row).scatter_(1, choice, -math.inf)
            choice = to_chosen.argmax(-1)[:, None]
            chosen.append(choice)
        return torch.cat(chosen, 1)

    def _pieces(self, n_rows: int, n_columns: int) -> int:
        # Equal pieces: a last one of few rows would go through another kernel, whose sums differ
        # in their last bit.
        size = self.unit.shape[0] * n_rows * n_columns * self.unit.element_size()
        return min(n_rows, math.ceil(size / PIECE_BYTES)) or 1


def _best(
    edges: Tensor, side_a: Tensor, side_b: Tensor, worth: Tensor | None
) -> tuple[Tensor, Tensor]:
    if worth is None:
        best, place = edges.max(-1)
        return best, place
    both = worth.gather(1, side_a)[:, :, None] + worth.gather(1, side_b)[:, None, :]
    best, place = both.div_(2).add_(edges).max(-1)
    return best, place
