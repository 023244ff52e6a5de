"""The state of one encoding of images: the plans that were made, and the sizes of the tokens.

One object belongs to one forward pass. Everything is indexed by layer, and a second run of a layer
finds the plan of the first: activation checkpointing runs a layer twice, and two forward passes may
precede one backward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adaptive import Adapted, adapt
from .algorithm import Algorithm, MergeContext, log_size_bias, make_plan
from .compiled import compiled_plan
from .config import MergeConfig
from .counts import Footprint, TokenCount, count_tokens
from .plan import MergePlan
from .schedule import Schedule
from .steps import Budget

# Takes the name of a part of the work and returns a context manager to do it in.
Watch = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclass
class MergePass:
    """Plans and sizes of one encoding; see the module's docstring.

    Attributes:
        config: the merge options.
        schedule: token counts, known beforehand.
        algorithm: makes the plans.
        grid: (rows, columns) of the patches, None where the tokens are no whole grid.
        plans: plan made in each tower layer.
        sizes: [B, N] float32 after each tower layer that has seen a merge.
        projector_plans: plans of the steps on the features.
        finisher: brings a packed image to its exact count where the algorithm itself can only work
            inside the tower; None for the algorithm itself.
        adapted: the merged images where each has a count of its own.
        counted: the schedule that budgets are counted by; None for `schedule`.
        watch: given "merge in tower", returns a context manager to merge in; None for none.
    """

    config: MergeConfig
    schedule: Schedule
    algorithm: Algorithm
    grid: tuple[int, int] | None = None
    finisher: Algorithm | None = None
    plans: dict[int, MergePlan] = field(default_factory=dict)
    sizes: dict[int, Tensor] = field(default_factory=dict)
    projector_plans: list[MergePlan] = field(default_factory=list)
    adapted: list[Adapted] | None = None
    counted: Schedule | None = None
    watch: Watch | None = None
    _after: dict[int, int] = field(default_factory=dict)
    _bias: tuple[Tensor, Tensor] | None = None  # the sizes, and the bias made of them

    def __post_init__(self) -> None:
        self._after = dict(self.schedule.tower)

    def fresh(self) -> MergePass:
        """A pass with the same settings and no plans yet."""
        return MergePass(
            self.config, self.schedule, self.algorithm, self.grid, self.finisher, watch=self.watch
        )

    def count(self, footprint: Footprint) -> TokenCount:
        """Tokens of an image without and with merging."""
        fewest = Budget(keep=self.config.keep_range[0]) if self.config.is_adaptive else None
        return count_tokens(
            self.counted or self.schedule,
            self.config.budget,
            footprint,
            fewest,
            self.config.frames_together,
        )

    def with_leading(self) -> MergePass:
        """A fresh pass for features that keep the tower's leading tokens; budgets stay the same."""
        kept = dataclasses.replace(self.schedule, leading_kept=self.schedule.n_leading)
        return dataclasses.replace(self.fresh(), schedule=kept, counted=self.schedule)

    def sizes_before(self, layer: int) -> Tensor | None:
        """Sizes of the tokens that enter a layer, None while all are one."""
        return self.sizes.get(layer - 1)

    def attention_bias(self, layer: int, dtype: torch.dtype) -> Tensor | None:
        """log(size) that a layer's attention adds, [B, 1, 1, N]; None where it adds nothing.

        Made once after every merge, for all layers up to the next one.
        """
        sizes = self.sizes_before(layer) if self.proportional else None
        if sizes is None:
            return None
        if self._bias is None or self._bias[0] is not sizes or self._bias[1].dtype != dtype:
            self._bias = sizes, log_size_bias(sizes, dtype)
        return self._bias[1]

    @property
    def proportional(self) -> bool:
        """Whether log(size) is added to the tower's attention."""
        wanted = self.config.proportional_attention
        return self.algorithm.proportional_attention if wanted is None else wanted

    @property
    def compares_keys(self) -> bool:
        """Whether tokens are compared by attention keys, otherwise by hidden states."""
        return self.algorithm.compares_keys(self.config, tower_only=self.schedule.tower_only)

    def merges(self, layer: int) -> bool:
        """Whether a plan is made in a layer."""
        return layer in self._after

    @property
    def has_class_token(self) -> bool:
        """Whether the leading token is a class token and not the first patch."""
        return self.schedule.n_leading > 0 and self.grid is not None

    def wants_attention(self, layer: int) -> bool:
        """Whether the plan made in a layer needs the class token's attention."""
        return self.algorithm.needs_attention and self.merges(layer)

    def touches(self, layer: int) -> bool:
        """Whether a layer differs from the untouched one in any way."""
        return self.merges(layer) or self.sizes_before(layer) is not None

    def merge_in_layer(
        self, layer: int, hidden: Tensor, metric: Tensor, cls_attention: Tensor | None = None
    ) -> Tensor:
        """Merge the tokens of one tower layer as scheduled and keep their sizes.

        Args:
            layer: 0-based tower layer.
            hidden: [B, n_leading + N, C].
            metric: [B, n_leading + N, D], what tokens are compared by.
            cls_attention: [B, n_leading + N] float32, see `MergeContext`.

        Returns:
            [B, n_leading + M, C].
        """
        if self.watch is None:
            return self._merge_in_layer(layer, hidden, metric, cls_attention)
        with self.watch("merge in tower"):
            return self._merge_in_layer(layer, hidden, metric, cls_attention)

    def _merge_in_layer(
        self, layer: int, hidden: Tensor, metric: Tensor, cls_attention: Tensor | None
    ) -> Tensor:
        before = self.sizes_before(layer)
        if layer not in self._after:
            if before is not None:
                self.sizes[layer] = before
            return hidden
        if layer not in self.plans:
            whole = before is None and not self.plans
            n_leading = self.schedule.n_leading
            body = None if before is None else before[:, n_leading:]
            context = self._context(layer, n_leading, whole, body)
            order = self._order_before(layer)
            if order is not None:
                context = dataclasses.replace(context, order=order[:, n_leading:] - n_leading)
            if cls_attention is not None:
                received = cls_attention[:, n_leading:].detach()
                context = dataclasses.replace(context, cls_attention=received)
            self.plans[layer] = self._planned(layer, metric, context)
        merged, self.sizes[layer] = self.plans[layer].apply(
            hidden, before, weighted=self.config.weighted
        )
        return merged

    def _order_before(self, layer: int) -> Tensor | None:
        earlier = sorted(one for one in self.plans if one < layer)
        return self.plans[earlier[-1]].order if earlier else None

    def _planned(self, layer: int, metric: Tensor, context: MergeContext) -> MergePlan:
        make = compiled_plan if self.config.compile else make_plan
        return make(self.algorithm, metric, self._after[layer], ctx=context)

    def carry(self, state: Tensor, from_layer: int) -> Tensor:
        """Bring a shallower hidden state to the final count with the merges made after it.

        Args:
            state: [B, N_l, C], the output of layer `from_layer - 1`.
            from_layer: first layer the state has not been through.
        """
        for layer in sorted(self.plans):
            if layer >= from_layer:
                state, _ = self.plans[layer].apply(
                    state, self.sizes_before(layer), weighted=self.config.weighted
                )
        return state

    def merge_features(self, features: Tensor) -> list[Tensor]:
        """Merge what the projector reads, in the scheduled steps.

        Args:
            features: [B, leading_kept + N, C].

        Returns:
            [n_i, C] of every image; all of one length unless every image has its own count.
        """
        leading = self.schedule.leading_kept
        sizes = self._feature_sizes()
        for step, count in enumerate(self.schedule.projector):
            whole = not self.plans and step == 0
            context = self.projector_context(step, n_leading=leading, whole_grid=whole)
            plan = make_plan(self.algorithm, features, count, ctx=context, sizes=sizes)
            features, sizes = plan.apply(features, sizes, weighted=self.config.weighted)
            self.projector_plans.append(plan)
        if not self.config.is_adaptive:
            return list(features)
        step = len(self.schedule.projector)
        self.adapted = adapt(
            features,
            sizes,
            self.schedule.ladder,
            self.config.quality,
            algorithm=self.algorithm,
            ctx=self.projector_context(step, n_leading=leading),
            weighted=self.config.weighted,
        )
        return [one.features for one in self.adapted]

    def tower_map(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What the tower made of its tokens.

        Returns:
            [B, tokens_in] int64, the token of the tower's output that every input token went into,
            and [B, M] int64, the input token every output one is named after. Both count a leading
            token only where it reaches the language model.
        """
        schedule = self.schedule
        dropped = schedule.n_leading - schedule.leading_kept
        total = schedule.n_tokens + schedule.n_leading
        source = torch.arange(total, device=device).expand(batch, total)
        anchors = source
        for layer in sorted(self.plans):
            source = self.plans[layer].assign.gather(1, source)
            anchors = anchors.gather(1, self.plans[layer].kept)
        return source[:, dropped:] - dropped, anchors[:, dropped:] - dropped

    def maps(self, batch: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Where every input token went, and what every output token is named after.

        Returns:
            [tokens_in] int64 of every image with values 0..n_i-1, the output token of every input
            one, and [n_i] int64 of every image with values 0..tokens_in-1. Both count a leading
            token only where it reaches the language model.
        """
        source, anchors = self.tower_map(batch, device)
        for plan in self.projector_plans:
            source = plan.assign.gather(1, source)
            anchors = anchors.gather(1, plan.kept)
        if self.adapted is None:
            return list(source), list(anchors)
        return (
            [one.assign[own] for one, own in zip(self.adapted, source, strict=True)],
            [own[one.kept] for one, own in zip(self.adapted, anchors, strict=True)],
        )

    def projector_context(
        self,
        step: int,
        *,
        n_leading: int = 0,
        whole_grid: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> MergeContext:
        """What an algorithm may look at in a step after the tower.

        Args:
            step: number of the step, from 0.
            n_leading: protected tokens at the start.
            whole_grid: the tokens are still the tower's whole patch grid.
            grid: (rows, columns) of another whole grid that they are.
        """
        context = self._context(self.schedule.used_layers + step, n_leading, whole_grid)
        return dataclasses.replace(context, at_projector=True, grid=grid or context.grid)

    def _context(
        self, layer: int, n_leading: int, whole_grid: bool, sizes: Tensor | None = None
    ) -> MergeContext:
        return MergeContext(
            config=self.config,
            layer=layer,
            depth=self.schedule.depth(layer),
            n_leading=n_leading,
            tower_only=self.schedule.tower_only,
            grid=self.grid if whole_grid else None,
            sizes=sizes,
        )

    def _feature_sizes(self) -> Tensor | None:
        if not self.sizes:
            return None
        dropped = self.schedule.n_leading - self.schedule.leading_kept
        return self.sizes[max(self.sizes)][:, dropped:]
