"""DCT (Fourier Transformer, ACL 2023, arXiv 2305.15099): a shorter sequence by its low frequencies.

Knows: how long the sequence is and shall be. Does not know: anything about its tokens, nor that
they come from a grid: they are one raster sequence, as in the PiToMe authors' comparison.

Followed: DCT-II along the tokens, the first M of N coefficients, inverse DCT of length M, all
orthonormal and in float32.
Different: scaled by sqrt(M / N), so that a constant sequence keeps its value (an orthonormal pair
of unequal lengths would blow it up by sqrt(N / M)); and it is one fixed [M, N] matrix
(`MergePlan.blend`) instead of two transforms, because the tokens are the same for every picture.
Sizes do not weigh here: every new token mixes all old ones, with negative shares too. For source
maps a patch is booked on the new token whose place is nearest to its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..merge import Algorithm, MergeContext, MergePlan


def cosine_basis(n_frequencies: int, n_points: int, device: torch.device) -> Tensor:
    """The first rows of the orthonormal DCT-II matrix: [n_frequencies, n_points] float32."""
    frequency = torch.arange(n_frequencies, device=device)[:, None]
    # Angles in units of pi / (2 n_points). Turns are taken off and quadrants folded in integers,
    # where that is exact: equal and opposite values then cancel, and a constant stays one.
    angle = frequency * (2 * torch.arange(n_points, device=device) + 1) % (4 * n_points)
    angle = torch.minimum(angle, 4 * n_points - angle)
    folded = torch.minimum(angle, 2 * n_points - angle)
    size = torch.cos(folded.float() * (math.pi / (2 * n_points))) * math.sqrt(2 / n_points)
    basis = torch.where(angle > n_points, -size, size)
    return torch.where(frequency == 0, 1 / math.sqrt(n_points), basis)


def resampling_matrix(n_in: int, n_out: int, device: torch.device) -> Tensor:
    """[n_out, n_in] float32: n_in tokens to their n_out lowest frequencies and back."""
    back = cosine_basis(n_out, n_out, device).T
    return math.sqrt(n_out / n_in) * (back @ cosine_basis(n_out, n_in, device))


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Resample the sequence to `n_out` tokens.

    Args:
        keys: [B, N, D]; only their shape and device are used.
        n_out: 1..N.
        ctx: not used.
    """
    del ctx
    batch, n_in = keys.shape[:2]
    old, new = (torch.arange(n, device=keys.device) for n in (n_in, n_out))
    # Token i of n lies at (i + 1/2) / n of the sequence, before and after.
    assign, middle = (2 * old + 1) * n_out // (2 * n_in), (2 * new + 1) * n_in // (2 * n_out)
    return MergePlan(
        assign.expand(batch, n_in),
        middle.expand(batch, n_out),
        blend=resampling_matrix(n_in, n_out, keys.device),
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
