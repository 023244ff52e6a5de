"""Gated linear attention in float32, token by token: vLLM's kernel for CPUs has bfloat16 only.

Rounding to bfloat16 would decide answers. States are where vLLM keeps them.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize, sigmoid, silu, softplus
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention


def install() -> None:
    """Before vLLM registers its own."""
    gdn_attention.cpu_gdn_attention_core = core


def core(
    mixed_qkv: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    core_attn_out: torch.Tensor,
    layer_name: gdn_attention.LayerNameType,
) -> None:
    context = get_forward_context()
    if context.attn_metadata is None:
        return
    layer = context.no_compile_layers[gdn_attention._resolve_layer_name(layer_name)]
    step = context.attn_metadata[layer.prefix]
    if not step.num_actual_tokens:
        return
    starts = step.non_spec_query_start_loc.tolist()
    known = [True] * (len(starts) - 1)
    if step.has_initial_state is not None:
        known[step.num_decodes :] = step.has_initial_state.tolist()[step.num_decodes :]
    slots = step.non_spec_state_indices_tensor.tolist()
    for start, end, slot, old in zip(starts, starts[1:], slots, known, strict=False):
        own = slice(start, end)
        core_attn_out[own] = sequence(layer, mixed_qkv[own], b[own], a[own], slot, old)


def sequence(layer, mixed, b, a, slot, old):
    """[n, heads, channels] of the next n tokens of one sequence."""
    weight = gdn_attention._unpacked_conv_weight(layer)
    window, memory = layer.kv_cache[0][slot], layer.kv_cache[1][slot].transpose(1, 2)
    if not old:
        window.zero_()
        memory.zero_()
    seen = torch.cat([window, mixed])
    window.copy_(seen[-len(window) :])
    mixed = silu(torch.einsum("ncw,cw->nc", seen.unfold(0, weight.shape[1], 1), weight))
    query, key, value = (one[0] for one in layer.rearrange_mixed_qkv(mixed))
    times = value.shape[1] // query.shape[1]
    query, key = (
        normalize(one, dim=-1, eps=1e-6).repeat_interleave(times, 1) for one in (query, key)
    )
    decay = (-layer.A_log.exp() * softplus(a + layer.dt_bias)).exp()
    strength, found = sigmoid(b), []
    for index in range(len(mixed)):
        memory *= decay[index, :, None, None]
        told = torch.einsum("hkv,hk->hv", memory, key[index])
        change = (value[index] - told) * strength[index, :, None]
        memory += key[index, :, :, None] * change[:, None]
        found.append(torch.einsum("hkv,hk->hv", memory, query[index]))
    return torch.stack(found) * query.shape[-1] ** -0.5
