"""Merging in vLLM's CLIP and SigLIP towers.

Runs the attention of vLLM's encoder layers, of which every process holds some of the heads under
tensor parallelism. What a layer does between its parts is in `adapters/merged_layer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from ..adapters.merged_layer import Heads, LayerKernels, merged_layer
from ..merge.merge_pass import MergePass


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
    hidden = _run(tower.vision_model, pixel_values, merge_pass)
    features = hidden[:, 1:] if strategy == "default" else hidden
    return mean_over_ranks(features) if merge_pass.schedule.projector else features


def _run(vision: Any, pixel_values: Tensor, merge_pass: MergePass) -> Tensor:
    hidden: Tensor = vision.embeddings(pixel_values)
    # CLIP has a norm here (the misspelt name is the checkpoints'), SigLIP has none.
    if hasattr(vision, "pre_layrnorm"):
        hidden = vision.pre_layrnorm(hidden)
    for index, layer in enumerate(vision.encoder.layers):
        if merge_pass.touches(index):
            kernels = _KERNELS if layer.self_attn.tp_size == 1 else _PARALLEL_KERNELS
            hidden = merged_layer(layer, index, hidden, merge_pass, kernels)
        else:
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _project(attention: Any, normed: Tensor) -> Heads:
    """Queries, keys and values of this process's heads, each [B, heads, N, head_dim]."""
    fused, _ = attention.qkv_proj(normed)
    shape = (*normed.shape[:-1], attention.num_heads_per_partition, attention.head_dim)
    query, key, value = (part.view(shape).transpose(1, 2) for part in fused.chunk(3, dim=-1))
    return query, key, value


def _attend(attention: Any, parts: Heads, bias: Tensor | None) -> Tensor:
    """Attention and output projection, with vLLM's own kernel wherever there is no bias.

    vLLM's encoder attention takes no additive mask on any backend, so layers after the first merge
    use torch's.
    """
    if bias is None:
        output = attention.attn(*(part.transpose(1, 2).flatten(2) for part in parts))
    else:
        mask = bias.to(parts[0].dtype)
        output = scaled_dot_product_attention(*parts, attn_mask=mask, scale=attention.scale)
        output = output.transpose(1, 2).flatten(2)
    projected: Tensor = attention.out_proj(output)[0]
    return projected


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


_KERNELS = LayerKernels(_project, _attend)
_PARALLEL_KERNELS = LayerKernels(_project, _attend, agree=_mean_over_ranks)
