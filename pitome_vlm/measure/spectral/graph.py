"""Token graphs, their coarse and lifted versions, and the distance between their spectra.

Definitions: PiToMe (arXiv 2405.16148) eq. 3 and section 3.3, after Jin, Loukas and JaJa
(arXiv 1802.04447). All matrices are float64.

Axes: N tokens, n groups; leading axes (a batch) are allowed everywhere and have to agree.
A partition is `assign` [..., N] int64 with values 0..n-1, every one of them taken, as in
`MergePlan.assign`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...merge.algorithm import cosine_similarity
from ...merge.plan import MergePlan

CoarseWeights = Literal["sum", "average"]
COARSE_WEIGHTS: tuple[str, ...] = ("sum", "average")


def token_graph(features: Tensor) -> Tensor:
    """W[i, j] = 1 - cos(v_i, v_j), a distance, with zeros on the diagonal (paper eq. 3).

    Args:
        features: [..., N, D], any floating dtype, at least one token.

    Returns:
        [..., N, N] float64, values in [0, 2].

    Raises:
        ValueError: no tokens, or a value that is not finite.
    """
    if features.dim() < 2 or features.shape[-2] < 1 or features.shape[-1] < 1:
        raise ValueError(f"features must be [..., N, D], got shape {tuple(features.shape)}")
    exact = features.detach().to(torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("features must be finite, but some are inf or nan")
    # Rounding may leave a cosine just above one; a negative weight would spoil the degrees.
    weights = (1 - cosine_similarity(exact)).clamp(min=0)
    # A token is at no distance from itself, also a zero one, which has no direction.
    weights.diagonal(dim1=-2, dim2=-1).zero_()
    return weights


def _members(assign: Tensor, n_groups: int) -> Tensor:
    """[..., N, n] float64, one where a token belongs to a group; refuses an empty group."""
    low, high = int(assign.min()), int(assign.max())
    if low < 0 or high >= n_groups:
        raise ValueError(f"assign must name groups 0..{n_groups - 1}, got {low}..{high}")
    members = torch.nn.functional.one_hot(assign, n_groups).to(torch.float64)
    if bool((members.sum(-2) == 0).any()):
        raise ValueError(f"assign must use every one of its {n_groups} groups, but one is empty")
    return members


def coarse_graph(
    weights: Tensor, assign: Tensor, n_groups: int, how: CoarseWeights = "sum"
) -> Tensor:
    """The graph whose nodes are the groups.

    Args:
        weights: [..., N, N].
        assign: [..., N].
        n_groups: n.
        how: "sum" adds the weights between two groups (Jin et al.; Lemma 1 needs it), "average"
            divides by the number of pairs (the paper's own definition). Either way the diagonal
            holds the weights inside a group.

    Returns:
        [..., n, n].

    Raises:
        ValueError: no partition, or an unknown `how`.
    """
    if how not in COARSE_WEIGHTS:
        raise ValueError(f"how must be one of {', '.join(COARSE_WEIGHTS)}, got {how!r}")
    members = _members(assign, n_groups)
    total = members.mT @ weights @ members
    if how == "sum":
        return total
    sizes = members.sum(-2)
    return total / (sizes[..., :, None] * sizes[..., None, :])


def lifted_graph(weights: Tensor, assign: Tensor, n_groups: int) -> Tensor:
    """The coarse graph on the original nodes: every weight replaced by its block's average.

    The average over a diagonal block includes the zeros of the diagonal (paper section 3.3).

    Args:
        weights: [..., N, N].
        assign: [..., N].
        n_groups: n.

    Returns:
        [..., N, N]; equal to `weights` where every token is its own group.
    """
    members = _members(assign, n_groups)
    return members @ coarse_graph(weights, assign, n_groups, "average") @ members.mT


def normalised_laplacian(weights: Tensor) -> Tensor:
    """L = I - D^-1/2 W D^-1/2, [..., N, N].

    A node of degree zero (all tokens identical) keeps its one on the diagonal, as if 0^-1/2 were
    0: so Lemma 1 holds for it as well.
    """
    degree = weights.sum(-1)
    scale = torch.where(degree > 0, degree, torch.ones_like(degree)).rsqrt() * (degree > 0)
    eye = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return eye - scale[..., :, None] * weights * scale[..., None, :]


def spectrum(weights: Tensor) -> Tensor:
    """Eigenvalues of the normalised Laplacian, ascending, [..., N]."""
    values: Tensor = torch.linalg.eigvalsh(normalised_laplacian(weights))
    return values


@dataclass(frozen=True)
class SpectralChange:
    """What a merge did to the spectrum.

    Attributes:
        distance: [...] SD = ||lambda - lambda_lifted||_1, spectra sorted (paper eq. 7).
        bound: [...] N ||L - L_lifted||_2, which SD cannot exceed (Weyl's inequality).
        n_tokens: N.
        n_groups: n.
    """

    distance: Tensor
    bound: Tensor
    n_tokens: int
    n_groups: int


def spectral_change(weights: Tensor, assign: Tensor, n_groups: int) -> SpectralChange:
    """Compare a graph with the lifted graph of a partition.

    Args:
        weights: [..., N, N] float64, see `token_graph`.
        assign: [..., N] int64.
        n_groups: n.

    Raises:
        ValueError: the shapes do not fit, or `assign` is no partition into n groups.
    """
    n_tokens = weights.shape[-1]
    if weights.shape[:-1] != assign.shape:
        raise ValueError(
            f"assign must have shape {tuple(weights.shape[:-1])} for a graph of shape "
            f"{tuple(weights.shape)}, got {tuple(assign.shape)}"
        )
    before = normalised_laplacian(weights)
    after = normalised_laplacian(lifted_graph(weights, assign, n_groups))
    gap = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)
    # The difference is symmetric, so its spectral norm is its largest eigenvalue in size.
    norm = torch.linalg.eigvalsh(before - after).abs().amax(-1)
    return SpectralChange(gap.abs().sum(-1), n_tokens * norm, n_tokens, n_groups)


def kept_eigenspace(features: Tensor, assign: Tensor, n_groups: int, leading: int = 8) -> Tensor:
    """How much of the leading eigenspace of the similarity graph is constant within groups.

    The graph's weights are cosines, centred (an edge says how much more alike two tokens are than
    usual). A group hands all its members one value, so of an eigenvector only what is constant
    within groups is left: the share of its square, averaged over the leading eigenvectors. Unlike
    SD, which compares eigenvalues of a graph of distances, it tells groups of like tokens from
    blind ones, which keep about n / N. (After the subspaces of restricted spectral approximation,
    Loukas, arXiv 1808.10650.)

    Args:
        features: [..., N, D], any floating dtype.
        assign: [..., N] int64.
        n_groups: n.
        leading: eigenvectors, of the largest eigenvalues; fewer where there are not as many.

    Returns:
        [...] in [0, 1]; 1 where nothing is lost.

    Raises:
        ValueError: `assign` is no partition into n groups.
    """
    similar = cosine_similarity(features.detach().to(torch.float64))
    centred = similar - similar.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    vectors = torch.linalg.eigh(centred).eigenvectors[..., -min(leading, similar.shape[-1] - 1) :]
    members = _members(assign, n_groups)
    sums = members.mT @ vectors
    kept: Tensor = (sums.square() / members.sum(-2)[..., None]).sum(-2).mean(-1)
    return kept


def lemma1_error(
    weights: Tensor, assign: Tensor, n_groups: int, how: CoarseWeights = "sum"
) -> Tensor:
    """How far Lemma 1 is off: spectrum(lifted) = spectrum(coarse) and N - n ones.

    Zero up to rounding with sum weights. The paper states the lemma with its average weights, for
    which it is false unless all groups are of one size.

    Args:
        weights: [..., N, N].
        assign: [..., N].
        n_groups: n.
        how: weights of the coarse graph.

    Returns:
        [...] the largest difference of two sorted eigenvalues.
    """
    lifted = spectrum(lifted_graph(weights, assign, n_groups))
    coarse = spectrum(coarse_graph(weights, assign, n_groups, how))
    ones = coarse.new_ones(*coarse.shape[:-1], weights.shape[-1] - n_groups)
    claimed = torch.cat([coarse, ones], -1).sort(-1).values
    return (lifted - claimed).abs().amax(-1)


def composed_groups(plans: Iterable[MergePlan]) -> Tensor:
    """Plans made one after the other as one partition of the tokens before the first one.

    Args:
        plans: at least one, over the same batch.

    Returns:
        [B, N] int64, the group of every token after the last plan.

    Raises:
        ValueError: `plans` is empty.
    """
    assign: Tensor | None = None
    for plan in plans:
        assign = plan.assign if assign is None else plan.assign.gather(1, assign)
    if assign is None:
        raise ValueError("plans is empty; give at least one")
    return assign


def mixed_groups(assign: Tensor, labels: Tensor, n_groups: int) -> Tensor:
    """Fraction of the groups whose tokens carry more than one label.

    Args:
        assign: [..., N].
        labels: [..., N] int64, 0 or above.
        n_groups: n.

    Returns:
        [...] in [0, 1].
    """
    present = _members(assign, n_groups).mT @ torch.nn.functional.one_hot(labels).to(torch.float64)
    return ((present > 0).sum(-1) > 1).to(torch.float64).mean(-1)
