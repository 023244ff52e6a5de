"""What a picture costs: operations and key-value cache, from shapes and a schedule alone.

Knows: how many tokens pass through which linear map and which attention. Does not know: time,
hardware, or what is computed; nothing is run, so a model on the meta device will do.

Convention: one multiply-add is 2 FLOPs, only matrix products and convolutions count (norms,
activations, softmax and the averaging of tokens do not), attention is counted in full although a
causal mask hides half of it. This is what `torch.utils.flop_counter.FlopCounterMode` counts.

Symbols: n tokens of a layer's sequence, C its width, L layers; W(module) is the sum of
in_features x out_features over the linear layers of a module, LoRA matrices included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import algorithms
from .adapters import find_adapter
from .adapters.tower import feature_depth, find_encoder_layers, has_class_token, patch_grid
from .config import MergeConfig
from .merge import Algorithm
from .schedule import Schedule
from .wrapper import base_model, is_wrapped, merge_config, planned_schedule, schedule_of


@dataclass(frozen=True)
class Costs:
    """Cost of the first token of one prompt: its images, its text, batch size one.

    Attributes:
        images: pictures in the prompt.
        text_tokens: tokens of the prompt that are no visual tokens.
        visual_tokens: tokens per image that reach the language model.
        layer_flops: FLOPs of every tower layer that is run, for one image.
        tower_flops: patch embedding, layers and (SigLIP) pooling head, for all images.
        projector_flops: merging in front of the projector and the projector, for all images.
        merge_flops: the part of `tower_flops` and `projector_flops` that is there for merging
            alone: comparing tokens, ranking them by attention, resampling them.
        prefill_flops: the language model over the whole prompt, logits of one position.
        kv_bytes_per_image: key-value cache taken by the visual tokens of one image.
        kv_bytes: key-value cache after the prompt.
    """

    images: int
    text_tokens: int
    visual_tokens: int
    layer_flops: tuple[int, ...]
    tower_flops: int
    projector_flops: int
    merge_flops: int
    prefill_flops: int
    kv_bytes_per_image: int
    kv_bytes: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens the language model prefills."""
        return self.text_tokens + self.images * self.visual_tokens

    @property
    def total_flops(self) -> int:
        """Everything that happens before the first token: tower, projector and prefill."""
        return self.tower_flops + self.projector_flops + self.prefill_flops


def costs(
    model: nn.Module,
    schedule: Schedule | None = None,
    text_tokens: int = 64,
    images: int = 1,
    dtype: torch.dtype | None = None,
    *,
    config: MergeConfig | None = None,
) -> Costs:
    """Costs of one prompt, nothing is run.

    Args:
        model: a LLaVA, wrapped or not, also on the meta device or inside a `PeftModel`.
        schedule: token counts; None takes those in force (no merging on an unwrapped model).
        text_tokens: tokens of the prompt that are no visual tokens.
        images: pictures in the prompt.
        dtype: of the key-value cache; None takes that of the embeddings.
        config: the options behind `schedule` (algorithm, metric and placement change what a
            merge costs); None takes those in force, else the defaults.

    Raises:
        TypeError: not a supported model.
        ValueError: a negative number of text tokens or images.
    """
    _check_count("text_tokens", text_tokens)
    _check_count("images", images)
    base: Any = base_model(model)
    if config is None:
        config = merge_config(model) if is_wrapped(model) else MergeConfig(keep=1.0)
    if schedule is None:
        schedule = schedule_of(model) if is_wrapped(model) else planned_schedule(model, config)
    layers, around, tower_merging = tower_flops(base, schedule, config)
    projector, projector_merging = projector_flops(base, schedule, config)
    visual = schedule.tokens_out
    per_token = kv_bytes_per_token(base, dtype)
    prompt = text_tokens + images * visual
    return Costs(
        images=images,
        text_tokens=text_tokens,
        visual_tokens=visual,
        layer_flops=layers,
        tower_flops=images * (sum(layers) + around),
        projector_flops=images * projector,
        merge_flops=images * (tower_merging + projector_merging),
        prefill_flops=prefill_flops(base, prompt),
        kv_bytes_per_image=visual * per_token,
        kv_bytes=prompt * per_token,
    )


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


def similarity_flops(n_in: int, n_out: int, width: int, algorithm: Algorithm) -> int:
    """FLOPs of comparing n tokens of a width with each other: 2 n^2 width per step.

    An algorithm that pairs tokens up takes several steps where more than half of them go, on
    fewer tokens each time. One that follows the grid or the sequence compares nothing.
    """
    total = 0
    while n_in > n_out and algorithm.compares:
        total += 2 * n_in**2 * width
        n_in = max(n_out, (n_in + 1) // 2) if algorithm.pairwise else n_out
    return total


def blend_flops(n_in: int, n_out: int, width: int) -> int:
    """FLOPs of one resampling of n_in tokens of a width to n_out: 2 n_out n_in width."""
    return 2 * n_out * n_in * width


def merging_flops(
    n_in: int, n_out: int, n_leading: int, metric: int, width: int, algorithm: Algorithm
) -> int:
    """FLOPs of one merge: comparing tokens, or making and applying a resampling matrix.

    Args:
        n_in: tokens before, without leading ones.
        n_out: tokens after, without leading ones.
        n_leading: leading tokens, which a resampling matrix carries along.
        metric: width of what is compared.
        width: of the tokens.
        algorithm: who decides.
    """
    total = similarity_flops(n_in, n_out, metric, algorithm)
    if algorithm.resamples and n_out < n_in:
        # The matrix itself is a product of an [n_out, n_out] and an [n_out, n_in] basis.
        total += blend_flops(n_in, n_out, n_out)
        total += blend_flops(n_in + n_leading, n_out + n_leading, width)
    return total


def tower_flops(
    base: Any, schedule: Schedule, config: MergeConfig
) -> tuple[tuple[int, ...], int, int]:
    """FLOPs of the vision tower for one image.

    A layer costs n_a (2 W(attention)) + 4 n_a^2 C + n_m (2 W(mlp)) + its merge, where n_a tokens
    enter and n_m = n_a except in a layer that merges between its two halves. Ranking by attention
    takes 2 n_a C more, or 2 n_a^2 C where there is no class token and all tokens are asked. Where
    anything is merged the layers behind the feature layer are not run.

    Args:
        base: the LLaVA itself.
        schedule: token counts.
        config: algorithm, metric, placement.

    Returns:
        FLOPs of every layer that is run; FLOPs of patch embedding and pooling head; the part of
        both that is there for merging alone.
    """
    parts = find_adapter(base).parts(base)
    tower, vision = parts.vision_tower, parts.vision_config
    try:
        blocks: list[Any] = list(find_encoder_layers(tower)[0])
    except TypeError:
        return _unknown_tower_flops(tower, vision, schedule)
    if not schedule.is_identity:
        blocks = blocks[: schedule.used_layers]
    algorithm, after = algorithms.get(config.algorithm), dict(schedule.tower)
    by_keys = (config.metric or algorithm.metric) == "keys"
    entering, merging, flops = schedule.n_tokens, 0, []
    for index, block in enumerate(blocks):
        leaving = after.get(index, entering)
        metric = block.self_attn.head_dim if by_keys else vision.hidden_size
        n_first = entering + schedule.n_leading
        compared = merging_flops(
            entering, leaving, schedule.n_leading, metric, vision.hidden_size, algorithm
        )
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


def projector_flops(base: Any, schedule: Schedule, config: MergeConfig) -> tuple[int, int]:
    """FLOPs of the projector for one image: n_out (2 W(projector)) + the merges in front of it.

    Args:
        base: the LLaVA itself.
        schedule: token counts.
        config: algorithm.

    Returns:
        FLOPs, and the part of them that is there for merging alone. Tokens are compared by the
        features, as wide as the tower times the number of feature layers.
    """
    parts, algorithm = find_adapter(base).parts(base), algorithms.get(config.algorithm)
    depths, hidden = _feature_depths(base.config, schedule), parts.vision_config.hidden_size
    merging = _carrying_flops(depths, hidden, schedule, algorithm)
    width = hidden * len(depths)
    entering = schedule.tower[-1][1] if schedule.tower else schedule.n_tokens
    for leaving in schedule.projector:
        merging += merging_flops(entering, leaving, schedule.leading_kept, width, width, algorithm)
        entering = leaving
    return merging + schedule.tokens_out * linear_flops(parts.projector), merging


def _carrying_flops(
    depths: list[int], width: int, schedule: Schedule, algorithm: Algorithm
) -> int:
    """Features of shallower layers that go through the resamplings made behind them."""
    total, entering = 0, schedule.n_tokens + schedule.n_leading
    for layer, after in schedule.tower if algorithm.resamples else ():
        leaving = after + schedule.n_leading
        states = sum(depth <= layer for depth in depths)
        total += states * blend_flops(entering, leaving, width)
        entering = leaving
    return total


def prefill_flops(base: Any, n_tokens: int) -> int:
    """FLOPs of the language model over a prompt, with the logits of one position.

    n (2 W(language model)) + L 4 n^2 (heads x head_dim) + 2 W(lm_head). Grouped-query attention
    and gated MLPs are in W; grouped keys are shared by queries, hence `heads` in the second term.
    The original llava package computes logits for all n positions: n 2 W(lm_head) there.
    """
    text = base.config.get_text_config()
    width = text.num_attention_heads * _head_dim(text)
    attention = attention_flops(n_tokens, n_tokens, width)
    parts = find_adapter(base).parts(base)
    return (
        n_tokens * sum(map(linear_flops, parts.language_model))
        + int(text.num_hidden_layers) * attention
        + (n_tokens if parts.all_logits else 1) * linear_flops(base.get_output_embeddings())
    )


def kv_bytes_per_token(base: Any, dtype: torch.dtype | None = None) -> int:
    """Key-value cache of one token: layers x 2 x kv_heads x head_dim x bytes per element.

    Args:
        base: the LLaVA itself.
        dtype: of the cache; None takes that of the embeddings, which the cache follows also
            where linear layers are quantised.
    """
    text = base.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dtype = dtype or base.get_input_embeddings().weight.dtype
    size: int = text.num_hidden_layers * 2 * heads * _head_dim(text) * dtype.itemsize
    return size


def _head_dim(text: Any) -> int:
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


def _check_count(field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{field} must be a whole number >= 0, got {value!r}")
