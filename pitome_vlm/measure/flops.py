"""FLOPs of a vision tower and a projector, by formula; `language_flops.py` has the language model.

Nothing is run; the model may be on the meta device.

Convention: one multiply-add is 2 FLOPs, only matrix products and convolutions count (norms,
activations, softmax and the averaging of tokens do not), attention is counted in full although a
causal mask hides half of it. This is what `torch.utils.flop_counter.FlopCounterMode` counts.

Symbols: n tokens of a layer's sequence, C its width, L layers; W(module) is the sum of
in_features x out_features over the linear layers of a module, LoRA matrices included.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import find_adapter
from ..adapters.features import feature_choice
from ..adapters.inner_tower import Comparison
from ..adapters.layer_parts import attention_of, head_dim_of, mlp_of
from ..adapters.tower import find_encoder_layers
from ..adapters.tower_tokens import has_class_token, patch_grid
from ..merge import algorithms
from ..merge.algorithm import Algorithm, MergeContext
from ..merge.budget import FINISHER
from ..merge.config import MergeConfig
from ..merge.counts import Footprint, count_tokens, newline_share, shared_out
from ..merge.schedule import Schedule


def linear_flops(module: nn.Module) -> int:
    """FLOPs of one token through all linear layers of a module: 2 W(module).

    Quantised linear layers count like plain ones; mixture-of-experts weights are not counted.
    """
    total = 0
    for part in module.modules():
        rows, columns = getattr(part, "in_features", None), getattr(part, "out_features", None)
        # A LoRA wrapper also has in_features and out_features, but its child layers do the work.
        leaf = next(part.children(), None) is None
        if leaf and isinstance(rows, int) and isinstance(columns, int):
            total += rows * columns
    return 2 * total


def attention_flops(queries: int, keys: int, width: int) -> int:
    """FLOPs of QK^T and of the weighted sum of values: 4 queries keys width, over all heads."""
    return 4 * queries * keys * width


def similarity_flops(
    n_in: int, n_out: int, width: int, algorithm: Algorithm, ctx: MergeContext
) -> int:
    """FLOPs of comparing tokens of a width with each other: 2 pairs width per step.

    Pairs are n^2, or fewer where an algorithm compares two sets only. One that pairs tokens up
    takes several steps where more than half of them go, on fewer tokens each time. One that follows
    the grid compares nothing.
    """
    total = 0
    while n_in > n_out and algorithm.compares:
        left = max(n_out, (n_in + 1) // 2) if algorithm.pairwise else n_out
        total += 2 * algorithm.pairs_compared(n_in, left, ctx) * width
        n_in = left
    return total


def tower_flops(
    base: Any, schedule: Schedule, config: MergeConfig, footprint: Footprint | None = None
) -> tuple[tuple[int, ...], int, int]:
    """FLOPs of the vision tower for one image, or one tile of it.

    A layer costs n_a (2 W(attention)) + 4 n_a^2 C + n_m (2 W(mlp)) + its merge, where n_a tokens
    enter and n_m = n_a except in a layer that merges between its two halves. Ranking by attention
    takes 2 n_a C more, or 2 n_a^2 C where there is no class token and all tokens are asked. Where
    anything is merged, or `skip_unused_layers` is set, the layers after the feature layer are not
    run.

    Args:
        base: the LLaVA itself.
        schedule: token counts.
        config: algorithm, metric, placement.
        footprint: the image, for towers that take images of any size.

    Returns:
        FLOPs of every layer that is run; FLOPs of patch embedding and pooling head; the part of
        both that merging adds.
    """
    adapter = find_adapter(base)
    if footprint is not None and schedule.typical:
        own = schedule.of_image(footprint.full, merged_count(schedule, config, footprint))
        whole = adapter.tower_flops(base, footprint, own)
        if whole is not None:
            compared = _compared_flops(adapter.tower_comparisons(base, footprint, own), config)
            return (whole + compared,), 0, compared
    parts = adapter.parts(base)
    tower, vision = parts.vision_tower, parts.vision_config
    try:
        blocks: list[Any] = list(find_encoder_layers(tower)[0])
    except TypeError:
        return _unknown_tower_flops(tower, vision, schedule)
    if config.skip_unused_layers or not schedule.is_identity:
        blocks = blocks[: schedule.used_layers]
    flops, merging = layers_flops(
        blocks, schedule, config, vision.hidden_size, has_class=has_class_token(tower)
    )
    head = pooling_head_flops(tower, vision, tower_lengths(schedule)[len(blocks)])
    return flops, _embedding_flops(vision) + head, merging


def layers_flops(
    blocks: list[Any], schedule: Schedule, config: MergeConfig, width: int, *, has_class: bool
) -> tuple[tuple[int, ...], int]:
    """FLOPs of every layer, and the part of them that merging adds.

    Args:
        blocks: the layers that are run.
        schedule: token counts.
        config: algorithm, metric, placement.
        width: channels of the hidden states.
        has_class: whether ranking by attention asks the class token alone.
    """
    lengths = tower_lengths(schedule)
    inside = config.placement == "after_attention"
    flops, merging = [], 0
    steps = zip(blocks, lengths, lengths[1:], strict=False)
    for index, (block, entering, leaving) in enumerate(steps):
        step = (index, entering, leaving)
        compared = _layer_merging(block, step, schedule, config, width, has_class)
        flops.append(
            entering * linear_flops(attention_of(block))
            + attention_flops(entering, entering, width)
            + (leaving if inside else entering) * sum(map(linear_flops, mlp_of(block)))
            + compared
        )
        merging += compared
    return tuple(flops), merging


def _compared_flops(comparisons: list[Comparison], config: MergeConfig) -> int:
    """FLOPs of comparing tokens in a tower that takes images of any size."""
    algorithm, total = algorithms.get(config.algorithm), 0
    by_keys = algorithm.compares_keys(config, tower_only=False)
    for one in comparisons:
        width = one.key_width if by_keys else one.state_width
        ctx = MergeContext(config, one.layer)
        total += one.times * similarity_flops(one.entering, one.leaving, width, algorithm, ctx)
        if algorithm.needs_attention:
            total += one.ranking
    return total


def tower_lengths(schedule: Schedule) -> list[int]:
    """Sequence lengths of the tower, CLS included: before its first layer, then after each.

    Layers after the feature layer are left out where they are not run.
    """
    entering = schedule.n_tokens + schedule.n_leading
    if schedule.is_identity:
        return [entering] * (schedule.n_layers + 1)
    return [entering, *schedule.layer_lengths()]


def _layer_merging(
    block: Any,
    step: tuple[int, int, int],
    schedule: Schedule,
    config: MergeConfig,
    width: int,
    has_class: bool,
) -> int:
    """FLOPs that merging adds to a layer; `step` is its number, tokens entering and leaving."""
    index, entering, leaving = step
    if entering == leaving:
        return 0
    algorithm = algorithms.get(config.algorithm)
    by_keys = algorithm.compares_keys(config, tower_only=schedule.tower_only)
    ctx, n_leading = MergeContext(config, index, schedule.depth(index)), schedule.n_leading
    metric = head_dim_of(block) if by_keys else width
    flops = similarity_flops(entering - n_leading, leaving - n_leading, metric, algorithm, ctx)
    if algorithm.needs_attention:
        asked = 1 if has_class else entering
        flops += attention_flops(asked, entering, width) // 2
    return flops


def projector_flops(
    base: Any, schedule: Schedule, config: MergeConfig, footprint: Footprint | None = None
) -> tuple[int, int]:
    """FLOPs of the projector for one image: n_out (2 W(projector)) + the merges before it.

    Where tiles are packed, the projector comes first, on all tokens that leave the tower, and the
    packed image is merged to its count after it.

    Args:
        base: the LLaVA itself.
        schedule: token counts.
        config: algorithm.
        footprint: the image, where it is packed from tiles.

    Returns:
        FLOPs, and the part of them that merging adds. Tokens are compared by their features, which
        are as wide as the tower times the number of feature layers.
    """
    parts, algorithm = find_adapter(base).parts(base), algorithms.get(config.algorithm)
    projector = parts.projector
    if footprint is not None and (schedule.packed or footprint.frames):
        merging = _packed_flops(base, schedule, config, footprint)
        projected = footprint.tiles * schedule.tower_out
        if schedule.typical:
            projected = footprint.full
        if footprint.frames and find_adapter(base).videos_pooled_first:
            projected = merged_count(schedule, config, footprint)
        return merging + projected * linear_flops(projector), merging
    width = parts.vision_config.hidden_size * _feature_layers(base.config)
    entering = schedule.tower[-1][1] if schedule.tower else schedule.n_tokens
    ctx, merging = _context_after(config, schedule), 0
    for leaving in schedule.projector:
        merging += similarity_flops(entering, leaving, width, algorithm, ctx)
        entering = leaving
    return merging + schedule.tokens_out * linear_flops(projector), merging


def _packed_flops(base: Any, schedule: Schedule, config: MergeConfig, footprint: Footprint) -> int:
    """FLOPs of merging the packed image, an upper bound.

    It may have fewer groups than the tower handed on, where padding or pooling removed whole
    groups; only the pixels can tell. Windows of a video are compared on their own.
    """
    out = merged_count(schedule, config, footprint)
    cells, patches = footprint.full - footprint.newlines, out - newline_share(footprint, out)
    algorithm = algorithms.get(config.algorithm)
    if algorithm.needs_attention:
        algorithm = algorithms.get(FINISHER)
    entering, width = cells, _text_width(base)
    if schedule.typical and not schedule.spread:
        entering = max(patches, -(-cells * schedule.tower_out // schedule.tokens_in))
    elif schedule.tower and not schedule.typical:
        entering = min(cells, footprint.tiles * schedule.tower_out)
    if footprint.frames and find_adapter(base).videos_pooled_first:
        width = base.config.vision_config.hidden_size
    lengths = [cells * frames for frames in footprint.windows(config.frames_together)]
    shares = zip(shared_out(entering, lengths), shared_out(patches, lengths), strict=True)
    ctx = _context_after(config, schedule)
    return sum(similarity_flops(n, left, width, algorithm, ctx) for n, left in shares)


def _context_after(config: MergeConfig, schedule: Schedule) -> MergeContext:
    layer = schedule.used_layers
    return MergeContext(config, layer, schedule.depth(layer), at_projector=True)


def merged_count(schedule: Schedule, config: MergeConfig, footprint: Footprint) -> int:
    """Tokens that an image (or tile, or video) is merged to."""
    together = config.frames_together
    return count_tokens(schedule, config.budget, footprint, frames_together=together).out


def _text_width(base: Any) -> int:
    return int(base.config.get_text_config().hidden_size)


def _embedding_flops(vision: Any) -> int:
    """The patch convolution: 2 x patches x (channels x patch area) x C."""
    rows, columns = patch_grid(vision)
    patch = vision.patch_size
    area = patch**2 if isinstance(patch, int) else patch[0] * patch[1]
    return int(2 * rows * columns * vision.num_channels * area * vision.hidden_size)


def pooling_head_flops(tower: nn.Module, vision: Any, n_tokens: int) -> int:
    """FLOPs of SigLIP's attention pooling, which LLaVA computes and does not read; 0 without it.

    One query attends to n tokens: 2 C^2 (query) + 4 n C^2 (keys, values) + 4 n C + 2 C^2 (output)
    and then the MLP once.
    """
    for head in tower.modules():
        if hasattr(head, "probe") and isinstance(
            getattr(head, "attention", None), nn.MultiheadAttention
        ):
            width = vision.hidden_size
            projections = 4 * width**2 * (1 + n_tokens)
            pooled = attention_flops(1, n_tokens, width)
            return int(projections + pooled + linear_flops(head.mlp))  # type: ignore[arg-type]
    return 0


def _unknown_tower_flops(
    tower: nn.Module, vision: Any, schedule: Schedule
) -> tuple[tuple[int, ...], int, int]:
    """`tower_flops` of a tower of unknown layers, estimated as a plain ViT that is run whole."""
    n_tokens, n_layers = schedule.n_tokens + schedule.n_leading, schedule.n_layers
    attention = attention_flops(n_tokens, n_tokens, vision.hidden_size)
    per_layer = n_tokens * linear_flops(tower) // n_layers + attention
    return (per_layer,) * n_layers, _embedding_flops(vision), 0


def _feature_layers(config: Any) -> int:
    """Number of tower layers whose features the projector reads next to each other."""
    try:
        layer = feature_choice(config, {}).layer
    except ValueError:
        return 1  # the config names none: families of other code read one
    return 1 if isinstance(layer, int) else len(layer)
