"""How many operations a vision tower, a projector and a language model take, by formula.

Knows: how many tokens pass through which linear map and which attention. Does not know: prompts,
caches, time or hardware; nothing is run, so a model on the meta device will do.

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
from ..adapters.tower import find_encoder_layers
from ..adapters.tower_tokens import feature_depth, has_class_token, patch_grid
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
        # A LoRA layer has the two numbers as well, but it only holds the layers that compute.
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
    anything is merged, or `skip_unused_layers` is set, the layers behind the feature layer are not
    run.

    Args:
        base: the LLaVA itself.
        schedule: token counts.
        config: algorithm, metric, placement.
        footprint: the picture, for towers that take it as a whole.

    Returns:
        FLOPs of every layer that is run; FLOPs of patch embedding and pooling head; the part of
        both that is there for merging alone.
    """
    adapter = find_adapter(base)
    whole = None if footprint is None else adapter.tower_flops(base, footprint)
    if whole is not None:
        return (whole,), 0, 0
    parts = adapter.parts(base)
    tower, vision = parts.vision_tower, parts.vision_config
    try:
        blocks: list[Any] = list(find_encoder_layers(tower)[0])
    except TypeError:
        return _unknown_tower_flops(tower, vision, schedule)
    if config.skip_unused_layers or not schedule.is_identity:
        blocks = blocks[: schedule.used_layers]
    algorithm, after = algorithms.get(config.algorithm), dict(schedule.tower)
    by_keys = (config.metric or algorithm.metric) == "keys"
    entering, merging, flops = schedule.n_tokens, 0, []
    for index, block in enumerate(blocks):
        leaving = after.get(index, entering)
        metric = block.self_attn.head_dim if by_keys else vision.hidden_size
        n_first = entering + schedule.n_leading
        ctx = MergeContext(config, index, schedule.depth(index))
        compared = similarity_flops(entering, leaving, metric, algorithm, ctx)
        if algorithm.needs_attention and leaving < entering:
            asked = 1 if has_class_token(tower) else n_first
            compared += attention_flops(asked, n_first, vision.hidden_size) // 2
        inside = config.placement == "after_attention"
        n_second = (leaving if inside else entering) + schedule.n_leading
        flops.append(
            n_first * linear_flops(block.self_attn)
            + attention_flops(n_first, n_first, vision.hidden_size)
            + n_second * linear_flops(block.mlp)
            + compared
        )
        merging += compared
        entering = leaving
    head = _pooling_head_flops(tower, vision, entering + schedule.n_leading)
    return tuple(flops), _embedding_flops(vision) + head, merging


def projector_flops(
    base: Any, schedule: Schedule, config: MergeConfig, footprint: Footprint | None = None
) -> tuple[int, int]:
    """FLOPs of the projector for one image: n_out (2 W(projector)) + the merges in front of it.

    Where tiles are packed, the projector comes first, on all that the tower hands on, and the
    packed picture is merged to its count behind it.

    Args:
        base: the LLaVA itself.
        schedule: token counts.
        config: algorithm.
        footprint: the picture, where it is packed from tiles.

    Returns:
        FLOPs, and the part of them that is there for merging alone. Tokens are compared by the
        features, as wide as the tower times the number of feature layers.
    """
    parts, algorithm = find_adapter(base).parts(base), algorithms.get(config.algorithm)
    projector, hidden = parts.projector, parts.vision_config.hidden_size
    depths = _feature_depths(base.config, schedule)
    if footprint is not None and (schedule.packed or footprint.frames):
        merging = _packed_flops(base, schedule, config, footprint)
        projected = footprint.tiles * schedule.tower_out
        if footprint.frames and find_adapter(base).videos_pooled_first:
            projected = _out(schedule, config, footprint)
        return merging + projected * linear_flops(projector), merging
    width = hidden * len(depths)
    entering = schedule.tower[-1][1] if schedule.tower else schedule.n_tokens
    ctx, merging = _context_behind(config, schedule), 0
    for leaving in schedule.projector:
        merging += similarity_flops(entering, leaving, width, algorithm, ctx)
        entering = leaving
    return merging + schedule.tokens_out * linear_flops(projector), merging


def _packed_flops(base: Any, schedule: Schedule, config: MergeConfig, footprint: Footprint) -> int:
    """Merging of the packed picture, which has at most as many groups as the tower handed on.

    Fewer where groups lived in padding alone, or pooling left cells of other groups only, which
    only the picture can tell. Windows of a video are compared on their own.
    """
    out = _out(schedule, config, footprint)
    cells, patches = footprint.full - footprint.newlines, out - newline_share(footprint, out)
    algorithm = algorithms.get(config.algorithm)
    if algorithm.needs_attention:
        algorithm = algorithms.get(FINISHER)
    entering, width = cells, _text_width(base)
    if schedule.tower:
        entering = min(cells, footprint.tiles * schedule.tower_out)
    if footprint.frames and find_adapter(base).videos_pooled_first:
        width = base.config.vision_config.hidden_size
    lengths = [cells * frames for frames in footprint.windows(config.frames_together)]
    shares = zip(shared_out(entering, lengths), shared_out(patches, lengths), strict=True)
    ctx = _context_behind(config, schedule)
    return sum(similarity_flops(n, left, width, algorithm, ctx) for n, left in shares)


def _context_behind(config: MergeConfig, schedule: Schedule) -> MergeContext:
    layer = schedule.used_layers
    return MergeContext(config, layer, schedule.depth(layer), at_projector=True)


def _out(schedule: Schedule, config: MergeConfig, footprint: Footprint) -> int:
    together = config.frames_together
    return count_tokens(schedule, config.budget, footprint, frames_together=together).out


def _text_width(base: Any) -> int:
    return int(base.config.get_text_config().hidden_size)


def prefill_flops(base: Any, n_tokens: int) -> int:
    """FLOPs of the language model over a prompt, with the logits of one position.

    n (2 W(language model)) + L 4 n^2 (heads x head_dim) + 2 W(lm_head). Grouped-query attention
    and gated MLPs are in W; grouped keys are shared by queries, hence `heads` in the second term.
    The original llava package computes logits for all n positions: n 2 W(lm_head) there.
    """
    text = base.config.get_text_config()
    width = text.num_attention_heads * head_dim(text)
    attention = attention_flops(n_tokens, n_tokens, width)
    parts = find_adapter(base).parts(base)
    return (
        n_tokens * sum(map(linear_flops, parts.language_model))
        + int(text.num_hidden_layers) * attention
        + (n_tokens if parts.all_logits else 1) * linear_flops(base.get_output_embeddings())
    )


def head_dim(text: Any) -> int:
    """Width of one attention head of a language model."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _embedding_flops(vision: Any) -> int:
    """The patch convolution: 2 x patches x (channels x patch area) x C."""
    rows, columns = patch_grid(vision)
    patch = vision.patch_size
    area = patch**2 if isinstance(patch, int) else patch[0] * patch[1]
    return int(2 * rows * columns * vision.num_channels * area * vision.hidden_size)


def _pooling_head_flops(tower: nn.Module, vision: Any, n_tokens: int) -> int:
    """SigLIP's attention pooling, which LLaVA computes although it reads nothing from it.

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
    """A tower whose layers are not known is taken as a plain ViT that is run as it is."""
    n_tokens, n_layers = schedule.n_tokens + schedule.n_leading, schedule.n_layers
    attention = attention_flops(n_tokens, n_tokens, vision.hidden_size)
    per_layer = n_tokens * linear_flops(tower) // n_layers + attention
    return (per_layer,) * n_layers, _embedding_flops(vision), 0


def _feature_depths(config: Any, schedule: Schedule) -> list[int]:
    """Depths of the layers whose outputs the projector reads side by side."""
    layer = getattr(config, "vision_feature_layer", None)
    if layer is None:
        layer = getattr(config, "vision_feature_layers", None)
    return [schedule.used_layers] if layer is None else feature_depth(layer, schedule.n_layers)
