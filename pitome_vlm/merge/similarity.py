"""All pairs of tokens compared, without ever holding all pairs where there are very many.

Up to `PairLimits.whole_up_to` tokens the matrix [B, N, N] is made once, where all pairs are asked
for; partners in one set are found from the products with that set alone. Beyond (video, many tiles)
its rows are made piece by piece and image by image in one buffer, used and forgotten: 16384 tokens
would take 1 GiB per image and take `PairLimits.piece_bytes`. Which way it goes, and how the pieces
are cut, depends on N alone, so that batching changes no answer. Both ways compute the same numbers
up to rounding; a near tie may fall otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .algorithm import PairLimits, unit_vectors
from .plan import take_tokens

USUAL = PairLimits()


class Similarity:
    """Cosines between the tokens of every image of a batch.

    Args:
        keys: [B, N, D] floating point.
        limits: how many pairs may be held at once, None for `USUAL`.
    """

    def __init__(self, keys: Tensor, limits: PairLimits | None = None) -> None:
        limits = limits or USUAL
        self.n_tokens = keys.shape[1]
        self._in_pieces = self.n_tokens > limits.whole_up_to
        # Detached: results written into a buffer have no gradient, and decisions need none.
        self._unit = unit_vectors(keys.detach() if keys.requires_grad else keys)
        self._piece_bytes = limits.piece_bytes
        self._known: Tensor | None = None

    @property
    def _whole(self) -> Tensor:
        """[B, N, N], made when it is asked for."""
        if self._known is None:
            self._known = torch.bmm(self._unit, self._unit.mT)
        return self._known

    def tokens(self) -> Tensor:
        """The numbers of all tokens, [B, N] int64."""
        index = torch.arange(self.n_tokens, device=self._unit.device)
        return index.expand(self._unit.shape[0], -1)

    def by_row(self, score: Callable[[Tensor, int], Tensor], *, last: bool = False) -> Tensor:
        """One number per token from its cosines to all tokens: [B, N].

        Args:
            score: (rows [b, r, N], number of the first row) to [b, r]. The rows are lent: they
                are overwritten once it has returned.
            last: nobody asks for all pairs afterwards, so `score` may write over the rows.
        """
        if not self._in_pieces:
            whole = self._whole
            self._known = None if last else whole
            return score(whole, 0)
        found = torch.empty_like(self._unit[:, :, 0])
        for image, first, rows in self._row_pieces():
            found[image, first : first + rows.shape[1]] = score(rows, first)[0]
        return found

    def best(
        self, side_a: Tensor, side_b: Tensor, worth: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best partner in B of every token in A; ties go to the earlier one of B.

        Args:
            side_a: [B, a] token indices, a >= 0.
            side_b: [B, b] token indices, b >= 1 unless a = 0.
            worth: of both sides, [B, a] and [B, b]; the mean of both ends is added to their
                similarity. None for nothing.

        Returns:
            scores [B, a], places in `side_b` [B, a] int64.
        """
        if side_a.shape[1] == 0:
            return self._unit.new_empty(side_a.shape), side_a
        if not self._in_pieces:
            edges = self._between(side_a, side_b)
            if worth is not None:
                edges = _with_worth(edges, *worth)
            scores, places = edges.max(-1)
            return scores, places
        scores, places = self._unit.new_empty(side_a.shape), torch.empty_like(side_a)
        for image, own in enumerate(self._unit):
            first = 0
            others = own.index_select(0, side_b[image])
            for edges in self._pieces(own, others, side_a[image]):
                last = first + len(edges)
                if worth is not None:
                    edges = _with_worth(edges, worth[0][image, first:last], worth[1][image])
                scores[image, first:last], places[image, first:last] = edges.max(-1)
                first = last
        return scores, places

    def farthest_first(self, n_out: int, *, one_kernel: bool = False) -> Tensor:
        """Greedy max-min selection by the distance 1 - cosine, in the order of choice.

        Args:
            n_out: 1..N.
            one_kernel: where the matrix is made whole on a CUDA device, choose in one Triton kernel
                (which needs a C compiler) instead of three kernels for every token.

        Returns:
            [B, n_out] int64, distinct; ties go to the earlier token.
        """
        if not self._in_pieces:
            return _farthest_first(1 - self._whole, n_out, one_kernel)
        unit = self._unit
        to_chosen = torch.full_like(unit[:, :, 0], math.inf)
        row = torch.empty_like(to_chosen)
        choice = _first_of_largest(self.by_row(_isolation))
        chosen = [choice]
        for _ in range(n_out - 1):
            # As a row: a batch of matrix-vector products in columns takes several times as long.
            torch.bmm(take_tokens(unit, choice), unit.transpose(1, 2), out=row[:, None])
            torch.minimum(to_chosen, row.neg_().add_(1), out=to_chosen)
            # What is chosen stays at minus infinity and is never the farthest again.
            choice = to_chosen.scatter_(1, choice, -math.inf).argmax(-1, keepdim=True)
            chosen.append(choice)
        return torch.cat(chosen, 1)

    def most_covering(self, n_out: int, worth: Tensor) -> Tensor:
        """Greedy selection by coverage gain times worth, in the order of choice.

        What is chosen covers a token by its largest cosine with it, at least 0. The gain of a token
        is how much better all tokens together are covered with it.

        Args:
            n_out: 1..N.
            worth: [B, N], not negative.

        Returns:
            [B, n_out] int64, distinct; ties go to the earlier token.
        """
        # Two tokens that cover only each other gain the same, computed in two ways.
        # Of each by its own worth: what is little next to the largest worth is still not equal.
        rounding = self.n_tokens * torch.finfo(self._unit.dtype).eps * worth
        covered, taken = torch.zeros_like(worth), torch.zeros_like(worth, dtype=torch.bool)
        chosen = []
        for _ in range(n_out):
            # No gain is negative, so what is taken is never chosen again.
            score = (self._gain(covered) * worth).masked_fill_(taken, -1.0)
            largest = (score + rounding >= score.amax(-1, keepdim=True)) & ~taken
            choice = largest.view(torch.uint8).argmax(-1, keepdim=True)
            taken.scatter_(1, choice, True)
            covered = torch.maximum(covered, self._between(choice, self.tokens())[:, 0])
            chosen.append(choice)
        return torch.cat(chosen, 1)

    def _gain(self, covered: Tensor) -> Tensor:
        """By how much every token is closer to all tokens than `covered`, together: [B, N]."""
        if not self._in_pieces:
            return (self._whole - covered[:, None]).clamp_(min=0).sum(-1)
        found = torch.empty_like(covered)
        for image, first, rows in self._row_pieces():
            closer = rows[0].sub_(covered[image]).clamp_(min=0)
            found[image, first : first + len(closer)] = closer.sum(-1)
        return found

    def _between(self, side_a: Tensor, side_b: Tensor) -> Tensor:
        """Cosines of tokens [B, a] with tokens [B, b]: [B, a, b]."""
        if self._known is not None:
            return take_similarity(self._known, side_a, side_b)
        return torch.bmm(take_tokens(self._unit, side_a), take_tokens(self._unit, side_b).mT)

    def _row_pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """(image, first row, [1, rows, N]) from the top to the bottom, image by image."""
        for image, own in enumerate(self._unit):
            first = 0
            for rows in self._pieces(own, own, None):
                yield image, first, rows[None]
                first += len(rows)

    def _pieces(self, unit: Tensor, others: Tensor, side_a: Tensor | None) -> Iterator[Tensor]:
        """Cosines of tokens of A (None for all) with others [b, D], [r, b] at a time.

        One buffer for all pieces: memory taken and given back for each may stay with the process.
        """
        n_rows = len(unit) if side_a is None else len(side_a)
        fit = max(1, self._piece_bytes // (len(others) * unit.element_size()))
        # Equal pieces: a last one of few rows would go through another kernel, whose sums differ
        # in their last bit.
        n_pieces = math.ceil(n_rows / fit)
        cuts = [n_rows * piece // n_pieces for piece in range(n_pieces + 1)]
        edges = unit.new_empty(math.ceil(n_rows / n_pieces), len(others))
        for first, last in pairwise(cuts):
            some = unit[first:last] if side_a is None else unit.index_select(0, side_a[first:last])
            yield torch.mm(some, others.T, out=edges[: last - first])


def take_similarity(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, N, N] at rows [B, a] and columns [B, b]: [B, a, b]."""
    if similarity.shape[0] == 1:
        return similarity[0].index_select(0, rows[0]).index_select(1, columns[0])[None]
    taken = take_tokens(similarity, rows)
    return taken.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def _with_worth(edges: Tensor, worth_a: Tensor, worth_b: Tensor) -> Tensor:
    """Edges [..., a, b] plus the mean worth of their ends [..., a] and [..., b], in place."""
    return edges.add_(worth_a[..., :, None] + worth_b[..., None, :], alpha=0.5)


def _isolation(rows: Tensor, first: int) -> Tensor:
    """Distance of every token to its nearest neighbour; the rows' own places are overwritten."""
    rows.diagonal(first, -2, -1).fill_(-math.inf)
    return 1 - rows.amax(-1)


def _first_of_largest(isolation: Tensor) -> Tensor:
    """The earliest token of the largest isolation up to rounding: [B, N] to [B, 1].

    Two tokens that are each other's nearest have the same one, computed in two ways.
    """
    rounding = 32 * torch.finfo(isolation.dtype).eps
    largest = isolation.amax(-1, keepdim=True) - rounding
    return (isolation >= largest).view(torch.uint8).argmax(-1, keepdim=True)


def _has_numbers_on_cpu(x: Tensor) -> bool:
    """Whether NumPy can read a tensor: not while it is traced, where it has no numbers yet."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _farthest_first(distance: Tensor, n_out: int, one_kernel: bool) -> Tensor:
    """`Similarity.farthest_first` on all distances [B, N, N], whose diagonal is overwritten."""
    own = distance.diagonal(0, -2, -1)
    own.fill_(math.inf)
    choice = _first_of_largest(distance.amin(-1))[:, 0]
    # What is chosen stays at minus infinity and is never the farthest again.
    own.fill_(-math.inf)
    if one_kernel and distance.is_cuda:
        from .greedy_kernel import farthest_first

        return farthest_first(distance, choice, n_out)
    batch, n_tokens = own.shape
    rows = distance.flatten(0, 1)
    if not _has_numbers_on_cpu(distance):
        first = None if batch == 1 else torch.arange(batch, device=own.device) * n_tokens
        found = _in_turn(
            torch,
            lambda one: rows.index_select(0, one if first is None else one + first),
            choice,
            n_out,
        )
        return torch.stack(found, 1)
    # On so few numbers a call takes longer than what it computes, and NumPy's calls are shorter,
    # those on the rows of one image above all.
    pairs, starts = rows.numpy(), np.arange(batch) * n_tokens
    if batch == 1:
        chosen = _in_turn(np, pairs.__getitem__, int(choice), n_out)
        return torch.from_numpy(np.array([chosen]))
    found = _in_turn(np, lambda one: pairs.take(one + starts, 0), choice.numpy(), n_out)
    return torch.from_numpy(np.stack(found, 1))


def _in_turn(
    library: Any, distances_of: Callable[[Any], Any], choice: Any, n_out: int
) -> list[Any]:
    """What `_farthest_first` chooses, `n_out` times [B], in arrays of NumPy or PyTorch.

    Args:
        library: the module of either.
        distances_of: tokens [B] of every image to the distances [B, N] of those tokens.
        choice: [B], the first token of every image.
        n_out: tokens to choose.

    For one image all of them may be without their axis B.
    """
    chosen, to_chosen = [choice], distances_of(choice)
    for _ in range(n_out - 1):
        choice = to_chosen.argmax(-1)
        chosen.append(choice)
        to_chosen = library.minimum(to_chosen, distances_of(choice))
    return chosen
