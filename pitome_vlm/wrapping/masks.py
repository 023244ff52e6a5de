"""The float mask that carries log(size) to attention kernels which add one to their logits.

It is made by transformers' own mask functions, so padding, packing, sliding windows and static
caches are theirs, and sdpa, eager and flex attention add it in their kernels.

Axes: B rows, Q new columns, S columns of which sizes are known, K columns of keys.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from ..releases import CACHE_NAME, MASK_ARGUMENTS

# Arguments by which models know tokens that see those after them.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
FULL = "full_attention"
# Options of configurations without `layer_types` that limit what a token sees.
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Masks:
    """How a language model's own causal masks are made, as floats.

    Attributes:
        make: transformers' function, or the model's own where some tokens see those after them.
        text_config: what the language model reads.
        model_config: what holds it, where the function is the model's own.
        names: arguments of the function.
        one: the language model takes one mask, not one by layer type.
        kind: where all layers are of one kind and see every earlier key, the name of that kind
            (None where the model takes one mask).
        sees_all: whether they are.
    """

    make: Callable[..., Any]
    text_config: Any
    model_config: Any
    names: frozenset[str]
    one: bool = False
    kind: str | None = None
    sees_all: bool = False

    @classmethod
    def of(cls, model: Any, text_config: Any, *, one: bool = False) -> Masks:
        """Of a model whose language model reads `text_config`."""
        own = getattr(model, "create_masks_for_generate", None)
        if own is not None:
            names = frozenset(inspect.signature(own).parameters)
            return cls(own, text_config, model.config, names, one)
        kinds = set(getattr(text_config, "layer_types", None) or ())
        windows = (getattr(text_config, name, None) for name in _WINDOWS)
        sees_all = kinds == {FULL} or (not kinds and not any(windows))
        kind = FULL if kinds and not one else None
        make = create_masks_for_generate
        return cls(make, text_config, None, MASK_ARGUMENTS, one, kind, sees_all)

    @functools.cached_property
    def config(self) -> Any:
        """For the function: names an implementation whose masks are always there.

        Copying one takes long, and the short way of `additive_mask` reads none.
        """
        text = copy.copy(self.text_config)
        text._attn_implementation = "eager"
        if self.model_config is None:
            return text
        whole = copy.copy(self.model_config)
        whole.__dict__["text_config"] = text
        return whole


def additive_mask(
    own: Masks,
    bias: Tensor | None,
    *,
    batch: int,
    queries: int,
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: Tensor | None,
    cache: Any = None,
    packed_positions: Tensor | None = None,
    token_types: Mapping[str, Any] | None = None,
) -> Any:
    """The language model's own causal mask as floats, with log(size) added to merged keys.

    No helpers of its own where it runs for a decoded token.

    Args:
        own: see `Masks`.
        bias: [B, S] float32 log of the patches that every column stands for, 0 for text and for
            columns after the last one; None adds nothing.
        batch: B.
        queries: Q, new columns.
        dtype: of the attention logits.
        device: of the result.
        attention_mask: [B, cached + Q] with 0 where padded, or None.
        cache: keys of earlier columns, or None.
        packed_positions: [B, Q] integer positions that restart where several samples share a row.
        token_types: arguments of the call, of which `TOKEN_TYPES` [B, Q] say what sees each other.

    Returns:
        [B, 1, Q, K] in `dtype`, or a dict of them by layer type where the language model
        has several kinds of layers; layers without attention have what the model gives them.
    """
    if attention_mask is not None:
        # Asking a static cache for its length would wait for the device at every step.
        total = attention_mask.shape[1]
    else:
        total = queries + (int(cache.get_seq_length()) if cache is not None else 0)
    grows = cache is None or type(cache) is DynamicCache
    if bias is not None and own.sees_all and grows and packed_positions is None:
        # In a few kernels. transformers would make the same of all columns, in a hundred calls.
        visible = bias.to(device, dtype)[:, :total]
        if missing := total - visible.shape[1]:
            visible = torch.nn.functional.pad(visible, (0, missing))
        mask = visible[:, None, None, :]
        if queries > 1:
            mask = mask.masked_fill(
                _unseen(queries, total, attention_mask, device), torch.finfo(dtype).min
            )
        elif attention_mask is not None:
            padded = attention_mask[:, None, None, :] == 0
            mask = mask.masked_fill(padded, torch.finfo(dtype).min)
        return mask if own.kind is None else {own.kind: mask}
    shape = torch.empty(batch, queries, 0, dtype=dtype, device=device)
    known: dict[str, Any] = {}
    for name, value in (
        ("inputs_embeds", shape),
        ("input_embeds", shape),
        ("attention_mask", attention_mask),
        (CACHE_NAME, cache),
        ("position_ids", packed_positions),
        ("cache_position", torch.arange(total - queries, total, device=device)),
        ("is_first_iteration", total == queries),
    ):
        if name in own.names:
            known[name] = value
    if token_types is not None and own.make is not create_masks_for_generate:
        for name in TOKEN_TYPES:
            if name in own.names and token_types.get(name) is not None:
                known[name] = token_types[name]
    masks: Any = own.make(config=own.config, **known)
    bias = None if bias is None else bias.to(device)
    found: dict[Any, Tensor] = {}
    for kind, mask in masks.items() if isinstance(masks, dict) else ((None, masks),):
        if mask is None or mask.dim() != 4:
            # Of layers without attention (recurrent, convolutions).
            found[kind] = mask
            continue
        if queries > 1:
            # A padded query attends to nothing. Its output is never read, but with all its logits
            # at the lowest float torch's CPU kernel returns wrong gradients (1,133 where eager has
            # 2.6): let it attend to everything instead. The only query of a decoded token is none.
            nothing = (mask < 0).all(-1, keepdim=True)
            mask = mask.masked_fill(nothing, 0.0)
        if bias is not None:
            # A sliding window's cache has dropped its first columns; a static one has room after.
            keys = mask.shape[-1]
            first = max(0, total - keys)
            visible = bias[:, first:total].to(mask.dtype)
            missing = keys - visible.shape[1]
            if missing:
                visible = torch.nn.functional.pad(visible, (0, missing))
            mask = mask + visible[:, None, None, :]
        found[kind] = mask
    if not isinstance(masks, dict):
        return found[None]
    if own.one:
        # Where the prompt fits into the window of all layers, their masks are alike.
        return next(iter(found.values()))
    return found


def _unseen(
    queries: int, total: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor:
    """[Q, K] or [B, 1, Q, K] bool: keys that come later or are padding.

    A query that would see nothing, a padded one, sees everything: see `additive_mask`.
    """
    later = torch.ones(queries, total, dtype=torch.bool, device=device).triu_(1 + total - queries)
    if attention_mask is None:
        return later
    unseen = later | (attention_mask == 0)[:, None, None, :]
    return unseen & ~unseen.all(-1, keepdim=True)
