"""keep="auto": as few tokens per image as its own redundancy allows.

What merging loses is measured on the tokens themselves: it is the share of their variance that no
longer lies between groups. Merging tokens that are alike loses nothing, merging different ones
loses what told them apart. All images go down the same ladder of counts together, and each stops at
its own step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .algorithm import Algorithm, MergeContext, make_plan


@dataclass(frozen=True)
class Adapted:
    """One image at the count that suits it.

    Attributes:
        features: [n, C].
        assign: [N] int64, the token every entering one went into.
        kept: [n] int64, the entering token every one is named after.
        explained: share of the entering tokens' variance that is left, in [0, 1].
    """

    features: Tensor
    assign: Tensor
    kept: Tensor
    explained: float


def adapt(
    features: Tensor,
    sizes: Tensor | None,
    counts: tuple[int, ...],
    quality: float,
    *,
    algorithm: Algorithm,
    ctx: MergeContext,
    weighted: bool = True,
) -> list[Adapted]:
    """Merge every image as far as `quality` of its variance is left.

    Args:
        features: [B, n_leading + N, C].
        sizes: [B, n_leading + N] float32, None for all one.
        counts: mergeable tokens to try, falling; the first is N itself.
        quality: share of the variance that has to be left, in (0, 1].
        algorithm: makes the plans.
        ctx: what it may look at.
        weighted: size-weighted means.

    Returns:
        One result per image. An image's count does not depend on the others of the batch.
    """
    batch, total = features.shape[:2]
    index = torch.arange(total, device=features.device).expand(batch, total)
    whole = _spread(features, features.mean(1, keepdim=True), sizes)
    rung = _Rung(features, sizes, index, index, [1.0] * batch)
    found: list[Adapted | None] = [None] * batch
    for count in counts[1:]:
        plan = make_plan(algorithm, rung.features, count, ctx=ctx, sizes=rung.sizes)
        merged, grown = plan.apply(rung.features, rung.sizes, weighted=weighted)
        assign = plan.assign.gather(1, rung.assign)
        centres = merged.gather(1, assign[..., None].expand(-1, -1, features.shape[-1]))
        # An image without variance loses none.
        lost = _spread(features, centres, sizes) / whole.clamp(min=1e-12)
        left = (1 - lost).clamp(0, 1).tolist()
        for image in range(batch):
            if found[image] is None and left[image] < quality:
                found[image] = rung.at(image)
        if all(one is not None for one in found):
            break
        rung = _Rung(merged, grown, assign, rung.kept.gather(1, plan.kept), left)
    return [one or rung.at(image) for image, one in enumerate(found)]


@dataclass(frozen=True)
class _Rung:
    """All images of a batch at one count of the ladder; axes as in `adapt`."""

    features: Tensor
    sizes: Tensor | None
    assign: Tensor
    kept: Tensor
    explained: list[float]

    def at(self, image: int) -> Adapted:
        return Adapted(
            self.features[image], self.assign[image], self.kept[image], self.explained[image]
        )


def _spread(features: Tensor, centres: Tensor, sizes: Tensor | None) -> Tensor:
    """[B] size-weighted mean squared distance of tokens to their centres, directions only.

    Lengths differ by orders of magnitude between a real tower's tokens; a few would decide alone.
    """
    directions = torch.nn.functional.normalize(features.float(), dim=-1)
    middle = torch.nn.functional.normalize(centres.float(), dim=-1)
    squared = (directions - middle).square().sum(-1)
    if sizes is None:
        return squared.mean(1)
    return (squared * sizes).sum(1) / sizes.sum(1)
