"""The merges of a wrapped model's tower, with the tokens each of them compared.

An algorithm's decisions are recorded while a tower runs. Real features have no labels, so nothing
here says how many groups are mixed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import find_adapter
from ...merge.algorithm import Algorithm, MergeContext
from ...merge.config import MergeConfig
from ...merge.plan import MergePlan
from ...wrapping.wrap import base_model, merging_of, wrapped
from .graph import (
    SpectralChange,
    composed_groups,
    kept_eigenspace,
    spectral_change,
    token_graph,
)

# Which algorithm runs to read the keys of the first merging layer does not matter: no merge comes
# before it. This one merges in every layer.
_ANY = "tome"


@dataclass(frozen=True)
class RecordedMerge:
    """One merge in the tower, without leading (CLS) tokens, on the CPU.

    Attributes:
        algorithm: its name.
        layer: 0-based tower layer.
        keys: [B, N, D], what the merge compared.
        plan: what it did.
    """

    algorithm: str
    layer: int
    keys: Tensor
    plan: MergePlan

    def change(self) -> SpectralChange:
        """What the merge did to the spectrum of the graph it saw, [B]."""
        assign = composed_groups([self.plan])
        return spectral_change(token_graph(self.keys), assign, self.plan.n_out)


@dataclass(frozen=True)
class LayerChange:
    """A `SpectralChange` and the layer it happened in."""

    layer: int
    change: SpectralChange


@dataclass(frozen=True)
class TowerChange:
    """One algorithm in one tower, for a batch of images.

    Attributes:
        layers: every merge, on the graph of the tokens it saw. From the second one on these are
            the tokens that the algorithm's own earlier merges left, another graph for each
            algorithm.
        composed: all merges as one partition of the patches, on the graph of the keys in the first
            merging layer, which is the same for every algorithm.
        shuffled: the same, with the members of the groups drawn at random: what groups of these
            sizes do to the spectrum if nobody looks at the tokens.
        kept: [B], `kept_eigenspace` of all merges as one partition, on the same keys.
        kept_shuffled: [B], the same with members drawn at random.
    """

    layers: tuple[LayerChange, ...]
    composed: SpectralChange
    shuffled: SpectralChange
    kept: Tensor
    kept_shuffled: Tensor


def recorded_merges(
    model: nn.Module, pixel_values: Tensor, config: MergeConfig
) -> list[RecordedMerge]:
    """Run a model's vision tower and write down every merge.

    Args:
        model: a supported LLaVA, wrapped or not; it is left as it was.
        pixel_values: [B, 3, H, W] from the model's image processor.
        config: what to merge; the stage is set to "tower".

    Returns:
        The merges in order, at least one.

    Raises:
        ValueError: the budget does not fit the model, or merges nothing.
    """
    if config.keep == "auto":
        raise ValueError(
            'keep="auto" gives every image a count of its own, so images cannot be averaged; '
            "give a fixed budget, for instance keep=0.25"
        )
    keys: dict[int, Tensor] = {}
    base: Any = base_model(model)
    if find_adapter(base).tower_shape(base).packed:
        raise ValueError(
            f"the patches of a {type(base).__name__}'s images are not one grid of one size, so "
            "there is no one graph of them; use a LLaVA-1.5, or leave features out (--no-features)"
        )
    with wrapped(model, config=config.replace(stage="tower")):
        base, merging = merging_of(model)
        # Encoders take images of other sizes than their configuration names.
        plan = merging.plan(base, {"pixel_values": pixel_values})
        schedule = plan.schedule
        if schedule.is_identity:
            raise ValueError(
                f"the budget keeps all {schedule.tokens_in} visual tokens, so there is no merge to "
                "look at; give a smaller one, for instance keep=0.25"
            )
        recording = _recording(plan.algorithm, keys)
        merge_pass = dataclasses.replace(plan.new_pass(), algorithm=recording)
        weight = next(base.parameters())
        pixels = pixel_values.to(weight.device, getattr(base, "dtype", weight.dtype))
        with torch.no_grad():
            merging.adapter.encode(base, {"pixel_values": pixels}, merge_pass)
    name, lead = config.algorithm, schedule.n_leading
    return [
        RecordedMerge(name, layer, keys[layer], _without_leading(plan, lead))
        for layer, plan in sorted(merge_pass.plans.items())
    ]


def _without_leading(plan: MergePlan, n_leading: int) -> MergePlan:
    """The partition of the tokens after the leading ones, which nothing is merged with."""
    assign, kept = (part[:, n_leading:] - n_leading for part in (plan.assign, plan.kept))
    return MergePlan.from_groups(assign.cpu(), kept.cpu())


def _recording(algorithm: Algorithm, seen: dict[int, Tensor]) -> Algorithm:
    """The same algorithm, which also puts what it compares into `seen`, by layer.

    A large reduction is a chain of calls in one layer; only the first one sees the layer's tokens.
    """

    def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
        seen.setdefault(ctx.layer, keys.detach().cpu())
        return algorithm.plan(keys, n_out, ctx=ctx)

    return dataclasses.replace(algorithm, plan=plan)


def merge_changes(
    model: nn.Module, pixel_values: Tensor, configs: dict[str, MergeConfig]
) -> dict[str, TowerChange]:
    """What several settings do to the spectra of the same images' token graphs.

    Args:
        model: a supported LLaVA, wrapped or not; it is left as it was.
        pixel_values: [B, 3, H, W] from the model's image processor.
        configs: settings by name; give all the same budget, or they cannot be compared.

    Raises:
        ValueError: no settings, or a budget that does not fit the model or merges nothing.
    """
    if not configs:
        raise ValueError("configs is empty; give at least one setting")
    any_config = next(iter(configs.values())).replace(algorithm=_ANY, metric="keys")
    first = recorded_merges(model, pixel_values, any_config)[0].keys
    graph = token_graph(first)
    changes = {}
    for name, config in configs.items():
        merges = recorded_merges(model, pixel_values, config)
        plans = [merge.plan for merge in merges]
        whole, n_out = composed_groups(plans), plans[-1].n_out
        generator = torch.Generator().manual_seed(config.seed)
        blind = whole[:, torch.randperm(whole.shape[1], generator=generator)]
        changes[name] = TowerChange(
            layers=tuple(LayerChange(merge.layer, merge.change()) for merge in merges),
            composed=spectral_change(graph, whole, n_out),
            shuffled=spectral_change(graph, blind, n_out),
            kept=kept_eigenspace(first, whole, n_out),
            kept_shuffled=kept_eigenspace(first, blind, n_out),
        )
    return changes
