"""FLOPs of a language model's prefill, by formula; conventions are those of `flops.py`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import find_adapter
from ..adapters.wide_attention import head_dims
from ..releases import layer_configs
from .flops import attention_flops, linear_flops

# Tokens that the delta rule of linear attention takes at once, in transformers as in its kernels.
_CHUNK = 64


def prefill_flops(base: Any, n_tokens: int) -> int:
    """FLOPs of the language model over a prompt, with the logits of one position.

    n (2 W(language model)) + L 4 n^2 (heads x head_dim) + 2 W(lm_head), where L are the layers with
    attention, and what the others do instead. Grouped-query attention and gated MLPs are in W;
    grouped keys are shared by queries, hence `heads` in the second term. The original llava package
    computes logits for all n positions: n 2 W(lm_head) there.
    """
    text = base.config.get_text_config()
    without = dict(layers_without_attention(text))
    pairs = enumerate(zip(layer_configs(text), head_dims(text), strict=True))
    width = sum(
        layer.num_attention_heads * channels
        for index, (layer, channels) in pairs
        if index not in without
    )
    parts = find_adapter(base).parts(base)
    modules = [part for model in parts.language_model for part in model.modules()]
    return (
        n_tokens * sum(map(linear_flops, parts.language_model))
        + attention_flops(n_tokens, n_tokens, width)
        + sum(_convolution_flops(part, n_tokens) + _delta_flops(part, n_tokens) for part in modules)
        + (n_tokens if parts.all_logits else 1) * linear_flops(base.get_output_embeddings())
    )


def layers_without_attention(text: Any) -> list[tuple[int, str]]:
    """(number, kind) of a language model's layers that hold no keys and know no attention mask.

    Args:
        text: configuration of the language model.
    """
    kinds = enumerate(getattr(text, "layer_types", None) or ())
    return [(n, kind) for n, kind in kinds if "attention" not in kind or "linear" in kind]


def _convolution_flops(module: nn.Module, n_tokens: int) -> int:
    """FLOPs of a causal convolution over a prompt, padded by its width less one."""
    if not isinstance(module, nn.Conv1d):
        return 0
    return 2 * (n_tokens + module.kernel_size[0] - 1) * module.weight.numel()


def _delta_flops(module: Any, n_tokens: int) -> int:
    """FLOPs of the matrix products of a gated delta rule over a prompt, chunk by chunk.

    Keys of K and values of V channels, chunks of c tokens: a token costs 4 c K + 2 c V within its
    chunk and 6 K V for the state. Triangular systems are no products and not counted.
    """
    sizes = [getattr(module, name, None) for name in ("head_k_dim", "head_v_dim", "num_v_heads")]
    keys, values, heads = (size if isinstance(size, int) else 0 for size in sizes)
    padded = -(-n_tokens // _CHUNK) * _CHUNK
    return padded * heads * (_CHUNK * (4 * keys + 2 * values) + 6 * keys * values)
