"""Tokens of many images in one sequence, merged inside the tower segment by segment.

A tower that takes images of any size packs all of them into one sequence and keeps their frames (or
windows of these) apart. Every segment is merged on its own, to its share of the count that its
image ends with, so that an image alone and in a batch gives the same. Segments of one length are
planned together, and what comes out is one plan over the whole sequence.

Axes: U tokens of the sequence before, M after a merge; k segments of n tokens each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from .algorithm import MergeContext, make_plan
from .counts import TokenCount, shared_out
from .merge_pass import MergePass
from .plan import MergePlan


@dataclass(frozen=True)
class Frame:
    """A frame of a video, or an image.

    Attributes:
        parts: tokens of each of its windows, in order; one entry where there are no windows.
        image: the count of the image or video that it belongs to.
    """

    parts: tuple[int, ...]
    image: TokenCount

    def left(self, before: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Tokens of its parts after a merging layer: at least one of each.

        Args:
            before: what enters the layer.
            count: what the whole image is to have after it.
        """
        share = -(-sum(self.parts) * count // self.image.full)
        wanted = min(sum(before), max(len(before), share))
        return tuple(shared_out(wanted, list(before)))


@dataclass(frozen=True)
class Lengths:
    """Tokens of every segment of a sequence.

    Attributes:
        parts: of every window of every frame.
        frames: of every frame.
    """

    parts: tuple[int, ...]
    frames: tuple[int, ...]


def lengths_of(frames: Sequence[tuple[int, ...]]) -> Lengths:
    """The lengths of frames, given as those of their parts."""
    return Lengths(tuple(n for one in frames for n in one), tuple(sum(one) for one in frames))


@dataclass
class SegmentPass(MergePass):
    """A pass over images of any size in one sequence: tensors have one row, [1, U, ...].

    Attributes:
        frames: all frames, in order.
        places: [1, U, D] float32, where every token is; merged tokens are at the mean.
    """

    frames: tuple[Frame, ...] = ()
    places: Tensor = field(default_factory=lambda: torch.zeros(1, 0, 0))
    _lengths: dict[int, Lengths] = field(default_factory=dict)
    _places: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, merge_pass: MergePass, **own: Any) -> Self:
        """A pass with the settings of another one, which holds its plans too."""
        shared = {one.name: getattr(merge_pass, one.name) for one in dataclasses.fields(MergePass)}
        return cls(**shared, **own)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        parts = [one.parts for one in self.frames]
        self._lengths[-1], self._places[-1] = lengths_of(parts), self.places
        counts = [
            dict(self.schedule.of_image(one.image.full, one.image.out).tower) for one in self.frames
        ]
        for layer, _ in self.schedule.tower:
            triples = zip(self.frames, parts, counts, strict=True)
            parts = [frame.left(before, count[layer]) for frame, before, count in triples]
            self._lengths[layer] = lengths_of(parts)

    def last_merge(self, layer: int) -> int:
        """The last layer before this one that merged; -1 for none."""
        return max((one for one in self._lengths if one < layer), default=-1)

    def lengths_before(self, layer: int) -> Lengths:
        """The lengths of the segments that enter a layer."""
        return self._lengths[self.last_merge(layer)]

    def places_before(self, layer: int) -> Tensor:
        """Where the tokens are that enter a layer: [1, N, D] float32."""
        merged = self.last_merge(layer)
        if merged not in self._places:
            # Positions are averaged by size whatever is done with values.
            plan = dataclasses.replace(self.plans[merged], keep_norm=False)
            before = self.places_before(merged).to(plan.kept.device)
            self._places[merged], _ = plan.apply(before, self.sizes_before(merged))
        return self._places[merged]

    @override
    def _planned(self, layer: int, metric: Tensor, context: MergeContext) -> MergePlan:
        before, after = self.lengths_before(layer).parts, self._lengths[layer].parts
        assign = torch.empty(sum(before), dtype=torch.long, device=metric.device)
        kept, dropped = assign.new_empty(sum(after)), torch.zeros_like(assign, dtype=torch.bool)
        # A re-run under checkpointing, which finds the plan, must leave the same on the tape.
        metric, plans = metric.detach(), []
        for (n_in, n_out), starts in _alike(before, after).items():
            start, first = torch.tensor(starts, device=metric.device).T[..., None]
            own = start + torch.arange(n_in, device=metric.device)
            context_here = dataclasses.replace(
                context,
                sizes=None if context.sizes is None else context.sizes[0, own],
                cls_attention=None if (seen := context.cls_attention) is None else seen[0, own],
            )
            plan = make_plan(self.algorithm, metric[0, own], n_out, ctx=context_here)
            assign[own] = plan.assign + first
            kept[first + torch.arange(n_out, device=metric.device)] = own.gather(1, plan.kept)
            if plan.dropped is not None:
                dropped[own] = plan.dropped
            plans.append(plan)
        return MergePlan.from_groups(
            assign[None],
            kept[None],
            prune=any(plan.prune for plan in plans),
            dropped=dropped[None] if any(plan.dropped is not None for plan in plans) else None,
            keep_norm=any(plan.keep_norm for plan in plans),
        )

    def source_before(self, layer: int) -> Tensor | None:
        """[U] int64, which token that enters a layer every first one is in; None for its own."""
        source = None
        for merged in sorted(one for one in self.plans if one < layer):
            assign = self.plans[merged].assign[0]
            source = assign if source is None else assign[source]
        return source

    def named_before(self, layer: int) -> Tensor | None:
        """[M] int64, the first token that every one that enters a layer is named after."""
        named = None
        for merged in sorted(one for one in self.plans if one < layer):
            kept = self.plans[merged].kept[0]
            named = kept if named is None else named[kept]
        return named


def _alike(before: Sequence[int], after: Sequence[int]) -> dict[tuple[int, int], list[Any]]:
    """Where the segments of the same two lengths begin, before and after a merge."""
    found: dict[tuple[int, int], list[Any]] = {}
    start = first = 0
    for pair in zip(before, after, strict=True):
        found.setdefault(pair, []).append((start, first))
        start, first = start + pair[0], first + pair[1]
    return found
