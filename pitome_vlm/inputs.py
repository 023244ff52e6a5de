"""From a caller's inputs to shortened ones: encode the images once, drop surplus placeholders.

Knows: what a Hugging Face LLaVA takes as input. Does not know: `generate`, algorithms, or how a
tower merges. Sizes and positions of the merged tokens stay with the prompt from here on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from . import algorithms
from .adapters import Adapter
from .config import MergeConfig
from .merge_pass import MergePass, VisualTokens
from .prompt import (
    IGNORED_LABEL,
    Compaction,
    compact_positions,
    compaction,
    surplus_placeholders,
    token_positions,
)
from .schedule import Schedule, TowerShape, build_schedule

FEATURE_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")
SEQUENCE_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids")


@dataclass(frozen=True)
class Merging:
    """What `wrap` put on a model: plain data, safe to copy and to pickle.

    Attributes:
        config: the options.
        adapter: the model family.
    """

    config: MergeConfig
    adapter: Adapter

    def schedule(self, model: Any, **feature_options: Any) -> Schedule:
        """Token counts for this model; `feature_options` are those of one call.

        Raises:
            ValueError: the budget does not fit the model.
        """
        return schedule_for(self.config, self.adapter.tower_shape(model, **feature_options))

    def encode(self, model: Any, pixel_values: Tensor, **feature_options: Any) -> VisualTokens:
        """Visual tokens of images [images, 3, H, W], merged as configured."""
        shape = self.adapter.tower_shape(model, **feature_options)
        merge_pass = MergePass(
            config=self.config,
            schedule=schedule_for(self.config, shape),
            algorithm=algorithms.get(self.config.algorithm),
            grid=shape.grid,
        )
        return self.adapter.encode_images(model, pixel_values, merge_pass, **feature_options)


def stage_of(config: MergeConfig) -> str:
    """Where a config merges: its own stage, else the algorithm's."""
    return config.stage or algorithms.get(config.algorithm).default_stage


def schedule_for(config: MergeConfig, shape: TowerShape) -> Schedule:
    """Lay a config's budget out over a tower.

    Raises:
        ValueError: unknown algorithm, or a budget that cannot be met.
    """
    algorithm = algorithms.get(config.algorithm)
    stage = stage_of(config)
    if algorithm.one_step and stage == "both":
        raise ValueError(
            f"algorithm {algorithm.name!r} reduces in one step, so stage must be 'tower' or "
            "'projector', got 'both'"
        )
    schedule = build_schedule(
        shape,
        config.budget,
        stage=stage,
        layers=config.layers,
        tower_share=config.tower_share,
        projector_steps=1 if algorithm.one_step else config.projector_steps,
        one_step=algorithm.one_step,
        pairwise=algorithm.pairwise,
    )
    if algorithm.name == "none" and not schedule.is_identity:
        raise ValueError(
            f"algorithm 'none' keeps all {schedule.tokens_in} visual tokens, but the budget "
            f"leaves {schedule.tokens_out}; use keep=1.0 or another algorithm"
        )
    if algorithm.one_step and shape.grid is None and not schedule.is_identity:
        raise ValueError(
            f"algorithm {algorithm.name!r} needs the whole patch grid, but this model drops one "
            'patch (vision_feature_select_strategy="default" on a tower without a class token)'
        )
    return schedule


@dataclass(frozen=True)
class CompactPrompt:
    """A batch whose visual tokens are merged and embedded, ready for the language model.

    Attributes:
        inputs_embeds: [B, S, C].
        input_ids: [B, S] or None where the caller gave embeddings.
        attention_mask: [B, S] or None where nothing is padded.
        labels: [B, S] or None.
        position_ids: [B, S] or None where the caller gave none.
        sizes: [B, S] float32, patches behind every column (1 for text).
        positions: [B, S] float32, column before compaction, a mean for merged tokens.
        visual: the visual tokens themselves.
        compaction: where every column went.
    """

    inputs_embeds: Tensor
    input_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None
    sizes: Tensor
    positions: Tensor
    visual: VisualTokens
    compaction: Compaction


def image_token_id(model: Any) -> int:
    """The id of the image placeholder."""
    config: Any = model.config
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError("the model's config names no image_token_id")


def find_placeholders(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """[B, T] bool, where the image placeholders are.

    Raises:
        ValueError: neither ids nor embeddings are given.
    """
    token = image_token_id(model)
    if input_ids is not None:
        return input_ids == token
    if inputs_embeds is None:
        raise ValueError("pixel_values need input_ids or inputs_embeds with image placeholders")
    reference: Tensor = model.get_input_embeddings()(
        torch.tensor(token, device=inputs_embeds.device)
    )
    return (inputs_embeds == reference).all(-1)


def prepare(
    model: Any,
    merging: Merging,
    inputs: dict[str, Any],
    *,
    left: bool | None = None,
) -> CompactPrompt:
    """Encode the images, shorten the prompt and put the visual tokens in.

    Args:
        model: the wrapped LLaVA itself (no PeftModel around it).
        merging: what `wrap` put on it.
        inputs: `pixel_values`, and of `SEQUENCE_INPUTS` and `FEATURE_OPTIONS` what there is.
        left: see `prompt.compaction`.

    Raises:
        ValueError: placeholders and images do not match, or an input cannot be shortened.
    """
    ids: Tensor | None = inputs.get("input_ids")
    given: Tensor | None = inputs.get("inputs_embeds")
    mask = inputs.get("attention_mask")
    _check_mask(mask)
    placeholders = find_placeholders(model, ids, given)
    options = {name: inputs[name] for name in FEATURE_OPTIONS if inputs.get(name) is not None}
    visual = merging.encode(model, inputs["pixel_values"], **options)
    drop = surplus_placeholders(placeholders, visual.full_counts, visual.counts)
    moves = compaction(drop, mask, left=left)
    compact_ids = None if ids is None else moves.take(ids, _pad_id(model))
    if given is not None:
        embeds = moves.take(given, 0)
    else:
        # Placeholders outside of the vocabulary are legal; their embedding is replaced anyway.
        text = cast(Tensor, ids).masked_fill(placeholders, 0)
        embeds = model.get_input_embeddings()(moves.take(text, 0))
    slots = moves.take(placeholders, False)
    features = torch.cat(visual.features).to(embeds.device, embeds.dtype)
    return CompactPrompt(
        inputs_embeds=embeds.masked_scatter(slots[..., None].to(embeds.device), features),
        input_ids=compact_ids,
        visual=visual,
        compaction=moves,
        **_aligned(inputs, moves, drop, placeholders, visual),
    )


def _check_mask(mask: Any) -> None:
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return
    shown = f"{mask.dim()} axes" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        "attention_mask must be [batch, tokens] where images are merged, because columns are "
        f"removed from it; got {shown}"
    )


def _aligned(
    inputs: dict[str, Any],
    moves: Compaction,
    drop: Tensor,
    placeholders: Tensor,
    visual: VisualTokens,
) -> dict[str, Any]:
    """Everything that runs along the columns, moved with them."""
    mask, labels, positions = (
        inputs.get(name) for name in ("attention_mask", "labels", "position_ids")
    )
    if mask is not None:
        mask = moves.take(mask, 0)
    elif not bool(moves.valid.all()):
        mask = moves.valid.long()
    if positions is not None:
        positions = compact_positions(positions.expand_as(drop), drop.to(positions.device))
        positions = moves.take(positions, 0)
    slots = moves.take(placeholders, False)
    sizes = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
    # Placeholders that arrived shortened already have no unreduced columns to point back to.
    full = visual.full_counts if bool(drop.any()) else visual.counts
    return {
        "attention_mask": mask,
        "labels": None if labels is None else moves.take(labels, IGNORED_LABEL),
        "position_ids": positions,
        "sizes": sizes.masked_scatter(slots, torch.cat(visual.sizes()).to(slots.device)),
        "positions": moves.take(_columns(placeholders, full, visual), 0.0),
    }


def _columns(placeholders: Tensor, full: list[int], visual: VisualTokens) -> Tensor:
    if full != visual.full_counts:
        batch, width = placeholders.shape
        index = torch.arange(width, dtype=torch.float32, device=placeholders.device)
        return index.expand(batch, width)
    return token_positions(placeholders, full, visual.positions())


def _pad_id(model: Any) -> int:
    config: Any = model.config
    for holder in (config, getattr(config, "text_config", None)):
        value = getattr(holder, "pad_token_id", None)
        if value is not None:
            return int(value)
    return 0


def drop_stale_placeholders(
    model: Any, merging: Merging, input_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Surplus placeholders of a prompt whose images were encoded in an earlier turn.

    Args:
        model: the wrapped LLaVA.
        merging: what `wrap` put on it.
        input_ids: [B, T], the whole conversation.

    Returns:
        placeholders [B, T] bool and those to drop [B, T] bool.

    Raises:
        ValueError: the placeholders are no whole images.
    """
    placeholders = input_ids == image_token_id(model)
    schedule = merging.schedule(model)
    found = int(placeholders.sum())
    images, rest = divmod(found, schedule.tokens_in)
    if rest:
        raise ValueError(
            f"the prompt holds {found} image placeholders, which is no multiple of the "
            f"{schedule.tokens_in} of one image; pass the conversation as the processor wrote it"
        )
    drop = surplus_placeholders(
        placeholders, [schedule.tokens_in] * images, [schedule.tokens_out] * images
    )
    return placeholders, drop
