"""DCT (Fourier Transformer, ACL 2023, arXiv 2305.15099): a shorter sequence by its low frequencies.

Knows: how long the sequence is and shall be. Does not know: anything about its tokens, nor that
they come from a grid: they are one raster sequence, as in the PiToMe authors' comparison.

Followed: DCT-II along the tokens, the first M of N coefficients, inverse DCT of length M, all
orthonormal and in float32 (`MergePlan.blend`).
Different: scaled by sqrt(M / N), so that a constant sequence keeps its value (an orthonormal pair
of unequal lengths would blow it up by sqrt(N / M)); frequency 0 is the mean, added behind, so that
a constant stays one; and both transforms are products with cosines. Those of many tokens (16384 to
half: 512 MiB) are made some rows at a time, used and forgotten (autograd remembers them all).
Sizes do not weigh here: every new token mixes all old ones, with negative shares too. For source
maps a patch is booked on the new token whose place is nearest to its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm import Algorithm, MergeContext, PairLimits
from ..plan import MergePlan


def cosine_basis(first: int, last: int, n_points: int, device: torch.device) -> Tensor:
    """Rows first..last - 1 of the orthonormal DCT-II matrix: [last - first, n_points] float32.

    Row 0, the mean, is not made here: first >= 1.
    """
    frequency = torch.arange(first, last, device=device)[:, None]
    # Angles in units of pi / (2 n_points). Turns are taken off and quadrants folded in integers,
    # where that is exact: equal and opposite values then cancel.
    angle = frequency * (2 * torch.arange(n_points, device=device) + 1) % (4 * n_points)
    angle = torch.minimum(angle, 4 * n_points - angle)
    folded = torch.minimum(angle, 2 * n_points - angle)
    size = torch.cos(folded.float() * (math.pi / (2 * n_points))) * math.sqrt(2 / n_points)
    return torch.where(angle > n_points, -size, size)


@dataclass(frozen=True)
class LowFrequencies:
    """A sequence of N tokens to one of M with the same low frequencies.

    Attributes:
        n_in: N.
        n_out: M.
        piece_bytes: memory that the cosines made at once may take.
    """

    n_in: int
    n_out: int
    piece_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """[B, N, C] float32 or wider to [B, M, C]; the cosines have float32's digits."""
        mean = x.mean(1, keepdim=True)
        if self.n_out == 1:
            return mean
        # Into one buffer each: small results between large pieces would keep memory from reuse.
        rest, start = x - mean, 0
        low = torch.empty_like(rest[:, 1 : self.n_out])
        for rows in self._pieces(self.n_in, x):
            low[:, start : start + len(rows)] = rows @ rest
            start += len(rows)
        back, start = torch.zeros_like(x[:, : self.n_out]), 0
        for rows in self._pieces(self.n_out, x):
            back += rows.T @ low[:, start : start + len(rows)]
            start += len(rows)
        return back.mul_(math.sqrt(self.n_out / self.n_in)).add_(mean)

    def _pieces(self, n_points: int, x: Tensor) -> Iterator[Tensor]:
        """The cosines at so many points of frequencies 1..M - 1, as many rows at a time as fit."""
        # A cosine takes 4 bytes, and up to 28 more while it is made.
        rows = max(1, self.piece_bytes // (32 * n_points))
        for first in range(1, self.n_out, rows):
            yield cosine_basis(first, min(first + rows, self.n_out), n_points, x.device).to(x.dtype)


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Resample the sequence to `n_out` tokens.

    Args:
        keys: [B, N, D]; only their shape and device are used.
        n_out: 1..N.
        ctx: how much may be held at once.
    """
    batch, n_in = keys.shape[:2]
    old, new = (torch.arange(n, device=keys.device) for n in (n_in, n_out))
    # Token i of n lies at (i + 1/2) / n of the sequence, before and after.
    assign, middle = (2 * old + 1) * n_out // (2 * n_in), (2 * new + 1) * n_in // (2 * n_out)
    return MergePlan(
        assign.expand(batch, n_in),
        middle.expand(batch, n_out),
        blend=LowFrequencies(n_in, n_out, (ctx.pairs or PairLimits()).piece_bytes),
    )


ALGORITHM = Algorithm(
    name="dct",
    plan=plan,
    source="Fourier Transformer, arXiv 2305.15099, section 3",
    pairwise=False,
    compares=False,
    resamples=True,
    # A token of negative shares stands for no number of keys, and the source adds no log(size).
    # The language model is told all the same: places are known, sizes are nearly equal.
    proportional_attention=False,
)
