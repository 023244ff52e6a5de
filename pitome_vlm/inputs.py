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
    for option, place in (("layers", "projector"), ("projector_steps", "tower")):
        if stage == place and getattr(config, option) is not None:
            raise ValueError(
                f"{option}={getattr(config, option)} has no effect at stage={stage!r}, where "
                f"{algorithm.name!r} merges here; leave it out or name another stage"
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
        visual: the visual tokens themselves.
        compaction: where every column went.
        placeholders: [B, T] bool, the image placeholders before compaction.
    """

    inputs_embeds: Tensor
    input_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None
    visual: VisualTokens
    compaction: Compaction
    placeholders: Tensor

    def sizes(self) -> Tensor:
        """[B, S] float32, patches behind every column (1 for text)."""
        slots = self.compaction.take(self.placeholders, False)
        ones = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
        return ones.masked_scatter(slots, torch.cat(self.visual.sizes()).to(slots.device))

    def positions(self) -> Tensor:
        """[B, S] float32, column in the caller's prompt, a mean for merged tokens.

        Where the placeholders arrived shortened there are no unreduced columns to point back to,
        and a token's own column is given.
        """
        full = self.visual.full_counts
        if int(self.placeholders.sum()) != sum(full):
            width = self.placeholders.shape[1]
            own = torch.arange(width, dtype=torch.float32, device=self.placeholders.device)
            return self.compaction.take(own.expand(self.placeholders.shape), 0.0)
        columns = token_positions(self.placeholders, full, self.visual.positions())
        return self.compaction.take(columns, 0.0)


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
    cached: int = 0,
) -> CompactPrompt:
    """Encode the images, shorten the prompt and put the visual tokens in.

    Args:
        model: the wrapped LLaVA itself (no PeftModel around it).
        merging: what `wrap` put on it.
        inputs: `pixel_values`, and of `SEQUENCE_INPUTS` and `FEATURE_OPTIONS` what there is.
        left: see `prompt.compaction`.
        cached: tokens already in the cache that is passed along.

    Raises:
        ValueError: placeholders and images do not match, or an input cannot be shortened.
    """
    ids: Tensor | None = inputs.get("input_ids")
    given: Tensor | None = inputs.get("inputs_embeds")
    placeholders = find_placeholders(model, ids, given)
    past, mask = _split_mask(inputs.get("attention_mask"), placeholders.shape[1], cached)
    options = {name: inputs[name] for name in FEATURE_OPTIONS if inputs.get(name) is not None}
    visual = merging.encode(model, _checked_pixels(inputs["pixel_values"]), **options)
    drop = surplus_placeholders(placeholders, visual.full_counts, visual.counts)
    moves = compaction(placeholders, drop, mask, left=left)
    compact_ids = None if ids is None else moves.take(ids, _pad_id(model))
    if given is not None:
        embeds = moves.take(given, 0)
    else:
        # Placeholders outside of the vocabulary are legal; their embedding is replaced anyway.
        text = cast(Tensor, ids).masked_fill(placeholders, 0)
        embeds = model.get_input_embeddings()(moves.take(text, 0))
    slots = moves.take(placeholders, False)
    features = torch.cat(visual.features).to(embeds.device, embeds.dtype)
    compact_mask = compact_attention_mask(moves, mask, past)
    labels, positions = inputs.get("labels"), inputs.get("position_ids")
    if positions is not None:
        positions = compact_positions(positions.expand_as(drop), drop.to(positions.device))
        positions = moves.take(positions, 0)
    return CompactPrompt(
        inputs_embeds=embeds.masked_scatter(slots[..., None].to(embeds.device), features),
        input_ids=compact_ids,
        attention_mask=compact_mask,
        labels=None if labels is None else moves.take(labels, IGNORED_LABEL),
        position_ids=positions,
        visual=visual,
        compaction=moves,
        placeholders=placeholders,
    )


def _checked_pixels(pixel_values: Any) -> Tensor:
    if isinstance(pixel_values, Tensor) and pixel_values.dim() == 4 and len(pixel_values):
        return pixel_values
    shown = (
        f"a tensor of shape {tuple(pixel_values.shape)}"
        if isinstance(pixel_values, Tensor)
        else type(pixel_values).__name__
    )
    raise ValueError(
        "pixel_values must be a tensor [images, 3, height, width] with at least one image, as the "
        f"model's processor makes them with return_tensors='pt'; got {shown}"
    )


def _split_mask(mask: Any, width: int, cached: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask's part over the cache and its part over the new tokens.

    Raises:
        ValueError: the mask has other axes, or covers another number of tokens.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shown = f"{mask.dim()} axes" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask must be [batch, tokens] where images are merged, because columns are "
            f"removed from it; got {shown}"
        )
    if mask.shape[1] == width:
        return None, mask
    if cached and mask.shape[1] == cached + width:
        return mask[:, :cached], mask[:, cached:]
    beside = f" and the {cached} in the cache" if cached else ""
    raise ValueError(
        f"attention_mask must cover the {width} tokens of the prompt{beside}, got "
        f"{mask.shape[1]} columns"
    )


def compact_attention_mask(
    moves: Compaction, mask: Tensor | None, past: Tensor | None = None
) -> Tensor | None:
    """The mask of a shortened prompt, None where none was given and none is needed."""
    if mask is None:
        return None if bool(moves.valid.all()) else moves.valid.long()
    compact = moves.take(mask, 0)
    return compact if past is None else torch.cat([past.to(compact.device), compact], 1)


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
