"""Flash kernels for a machine without a GPU, in the package that transformers loads them from.

`install` puts a module `flash_attn_interface` in place, so that transformers' own code for
FlashAttention 3 runs (unpadding, packed samples, windows). Its functions refuse what the kernels
refuse (unequal widths, widths that are no multiple of 8) and compute plain attention otherwise,
with logits and sums in at least float32 as they do.
"""

from __future__ import annotations

import inspect
import sys
import types

import torch
from transformers import modeling_flash_attention_utils as loading

NAME = "flash_attention_3"
# Width of the heads of every call since the last `install`.
widths: list[int] = []


def _attend(query, key, value, scale, causal, window):
    """[Q, heads, D] and [K, key heads, D] to [Q, heads, D]; the last query sees the last key."""
    width = query.shape[-1]
    assert width == key.shape[-1] == value.shape[-1], "a flash kernel wants one width"
    assert width in range(8, 257, 8), "a flash kernel wants a width of 8, 16, .. 256"
    widths.append(width)
    wide = torch.promote_types(query.dtype, torch.float32)
    copies = query.shape[1] // key.shape[1]
    q, k, v = (one.to(wide).transpose(0, 1) for one in (query, key, value))
    k, v = k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)
    logits = q @ k.mT * scale
    places = torch.arange(len(query))[:, None] + len(key) - len(query)
    ahead = torch.arange(len(key))[None] - places
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if causal:
        hidden |= ahead > 0
    if window[0] >= 0:
        hidden |= ahead < -window[0]
    logits = logits.masked_fill(hidden, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """[B, S, heads, D] of every row."""
    rows = zip(q, k, v, strict=True)
    return torch.stack([_attend(*row, softmax_scale, causal, window_size) for row in rows])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """[tokens, heads, D] of all rows, one after the other."""
    found = []
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        keys = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        assert rows.stop - rows.start <= max_seqlen_q
        assert keys.stop - keys.start <= max_seqlen_k
        found.append(_attend(q[rows], k[keys], v[keys], softmax_scale, causal, window_size))
    return torch.cat(found)


def install(monkeypatch):
    """Put the kernels in place for one test."""
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_with_kvcache = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    # Before release 5 kernels are loaded where a model is given one, and not where they are called.
    load = loading.lazy_import_flash_attention
    force = "force_import" in inspect.signature(load).parameters
    load(NAME, **({"force_import": True} if force else {}))
    widths.clear()


def use(model, name=NAME):
    """Let the language model of a tiny model call a kernel, without asking whether there is one."""
    model.model.language_model.config._attn_implementation_internal = name
    return model
