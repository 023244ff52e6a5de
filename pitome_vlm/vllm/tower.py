"""Merging in vLLM's CLIP, SigLIP and InternVL towers.

Runs the attention of vLLM's encoder layers, of which every process holds some of the heads under
tensor parallelism. What a layer does between its parts is in `adapters/merged_layer.py`, what
becomes of whole grids in `adapters/grid_tower.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from ..adapters.grid_tower import grid_pass, received_within
from ..adapters.inner_tower import Reading
from ..adapters.layer_parts import CLIP_LIKE, LayerParts
from ..adapters.merged_layer import Heads, LayerKernels, merged_layer
from ..adapters.tower import project
from ..adapters.tower_tokens import patch_grid
from ..adapters.unit_attention import Segmented, batched
from ..merge.merge_pass import MergePass
from ..merge.tiles import PackedItem


def tower_features(
    tower: Any, pixel_values: Tensor, merge_pass: MergePass, strategy: str
) -> Tensor:
    """Merged features as the tower leaves them.

    Args:
        tower: vLLM's CLIPVisionModel or SiglipVisionModel, built up to the feature layer.
        pixel_values: [images, 3, H, W].
        merge_pass: a fresh pass; holds the tower's plans afterwards.
        strategy: "default" cuts off the first token, "full" keeps it.

    Returns:
        [images, M, C], the same in every process where merging goes on after the tower.
    """
    vision = tower.vision_model
    hidden = _embedded(vision, pixel_values)
    for index, layer in enumerate(vision.encoder.layers):
        if merge_pass.touches(index):
            hidden = merged_layer(layer, index, hidden, merge_pass, _kernels_of(layer))
        else:
            hidden = _plain(layer, hidden)
    features = hidden[:, 1:] if strategy == "default" else hidden
    return mean_over_ranks(features) if merge_pass.schedule.projector else features


def siglip_states(
    tower: Any, pixel_values: Tensor, merge_pass: MergePass, items: Sequence[PackedItem]
) -> Tensor:
    """The last states of a SigLIP tower, in which every patch has its group's value.

    Args:
        tower: vLLM's SiglipVisionModel.
        pixel_values: [tiles, 3, H, W].
        merge_pass: what is asked for.
        items: the tiles.

    Returns:
        [tiles, N, C].
    """
    vision = tower.vision_model
    layers = vision.encoder.layers
    kernels = _kernels_of(layers[0])
    hidden = _embedded(vision, pixel_values)
    hidden = _grid_layers(vision, layers, hidden, merge_pass, items, kernels, CLIP_LIKE)
    normed: Tensor = vision.post_layernorm(hidden)
    return normed


def intern_states(
    tower: Any, pixel_values: Tensor, merge_pass: MergePass, items: Sequence[PackedItem]
) -> Tensor:
    """The same of vLLM's InternS1VisionModel, with its class token: [tiles, 1 + N, C]."""
    layers = tower.encoder.layer
    names = _INTERN if layers[0].attention.qk_normalization else _INTERN_WITHOUT_NORMS
    kernels = LayerKernels(functools.partial(project, names), functools.partial(_attend, names))
    hidden, _ = tower.embeddings(pixel_values)
    hidden = _grid_layers(tower, layers, hidden, merge_pass, items, kernels, names)
    states: Tensor = tower.layernorm(hidden)
    return states


def _embedded(vision: Any, pixel_values: Tensor) -> Tensor:
    hidden: Tensor = vision.embeddings(pixel_values)
    # CLIP has a norm here (the misspelt name is the checkpoints'), SigLIP has none.
    if hasattr(vision, "pre_layrnorm"):
        hidden = vision.pre_layrnorm(hidden)
    return hidden


def _plain(layer: Any, hidden: Tensor) -> Tensor:
    output = layer(hidden)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _kernels_of(layer: Any) -> LayerKernels:
    return _KERNELS if layer.self_attn.tp_size == 1 else _PARALLEL_KERNELS


def _grid_layers(
    tower: Any,
    layers: Any,
    hidden: Tensor,
    merge_pass: MergePass,
    items: Sequence[PackedItem],
    kernels: LayerKernels,
    names: LayerParts,
) -> Tensor:
    """All layers of a tower whose projector reads whole grids: [tiles, N, C] to the same."""
    if not merge_pass.schedule.tower:
        return functools.reduce(lambda states, layer: _plain(layer, states), layers, hidden)
    patches = (1, *patch_grid(tower.config))
    reading = Reading((len(layers),), (patches,) * len(items))
    own = grid_pass(tower, merge_pass, items, reading)
    for index, layer in enumerate(layers):
        if not own.touches(index):
            hidden = _plain(layer, hidden)
            continue
        hidden = own.entering(index, hidden)
        segments = own.segments_before(index, False, hidden.device)
        within = dataclasses.replace(
            kernels,
            attend=functools.partial(_attend_within, names, segments),
            received=functools.partial(received_within, segments),
        )
        hidden = merged_layer(layer, index, hidden, own, within, names)
        hidden = own.leaving(index, hidden)
    return hidden


def _project(attention: Any, normed: Tensor) -> Heads:
    """Queries, keys and values of this process's heads, each [B, heads, N, head_dim]."""
    fused, _ = attention.qkv_proj(normed)
    shape = (*normed.shape[:-1], attention.num_heads_per_partition, attention.head_dim)
    query, key, value = (part.view(shape).transpose(1, 2) for part in fused.chunk(3, dim=-1))
    return query, key, value


def _attend(names: LayerParts, attention: Any, parts: Heads, bias: Tensor | None) -> Tensor:
    """Attention and output projection: heads [B, H, N, D] and bias [B, 1, 1, N] to [B, N, C]."""
    return _project_out(names, attention, _attended(attention, parts, bias))


def _attend_within(
    names: LayerParts, segments: Segmented, attention: Any, parts: Heads, bias: Tensor | None
) -> Tensor:
    """The same within tiles that share a row: heads [1, H, M, D] and bias [1, 1, 1, M]."""
    query, key, value = (part[0].transpose(0, 1) for part in parts)
    row = None if bias is None else bias.flatten()
    found = [
        _attended(attention, own, one) for own, one in batched((query, key, value), segments, row)
    ]
    return _project_out(names, attention, segments.joined(found)[None])


def _attended(attention: Any, parts: Heads, bias: Tensor | None) -> Tensor:
    """Attention [B, N, heads * D], with vLLM's own kernel wherever there is no bias.

    vLLM's encoder attention takes no additive mask on any backend, so layers after the first merge
    use torch's.
    """
    if bias is None:
        plain: Tensor = attention.attn(*(part.transpose(1, 2).flatten(2) for part in parts))
        return plain
    mask = bias.to(parts[0].dtype)
    output = scaled_dot_product_attention(*parts, attn_mask=mask, scale=attention.scale)
    return output.transpose(1, 2).flatten(2)


def _project_out(names: LayerParts, attention: Any, output: Tensor) -> Tensor:
    for name in names.output:
        found = getattr(attention, name)(output)
        output = found[0] if isinstance(found, tuple) else found
    return output


def mean_over_ranks(own: Tensor) -> Tensor:
    """The mean over all processes of a tensor that each of them has; the tensor if it is one."""
    return own if get_tensor_model_parallel_world_size() == 1 else _mean_over_ranks(own)


def _mean_over_ranks(own: Tensor) -> Tensor:
    """The mean over all processes of a tensor that each of them has.

    Without it every process would plan its own merges and they would add up values of different
    tokens, without any error.
    """
    # A copy: on some devices the reduction happens in place.
    copied = own.clone(memory_format=torch.contiguous_format)
    total: Tensor = tensor_model_parallel_all_reduce(copied)
    size: int = get_tensor_model_parallel_world_size()
    return total / size


_KERNELS = LayerKernels(_project, functools.partial(_attend, CLIP_LIKE))
_PARALLEL_KERNELS = dataclasses.replace(_KERNELS, agree=_mean_over_ranks)
# As the library's InternVL, less what vLLM leaves out: dropout, and norms that do nothing.
_INTERN = LayerParts(
    norms=("layernorm_before", "layernorm_after"),
    attention="attention",
    scaled=(("lambda_1",), ("lambda_2",)),
    normed=("q_norm", "k_norm"),
    output=("projection_layer",),
)
_INTERN_WITHOUT_NORMS = dataclasses.replace(_INTERN, normed=())
