"""Bytes of the key-value cache of models whose layers are not all of one kind."""

from __future__ import annotations

import torch
from refused_family import else_refused
from tiny_families import FAMILIES, GROUPS

import pitome_vlm
from pitome_vlm.releases import CACHE_NAME


@else_refused("qwen3_vl", "gemma3")
def test_bytes_of_the_cache_are_what_is_held():
    families = FAMILIES | GROUPS["padded"]
    names = ("qwen3_vl", "gemma3", "gemma4", "gemma4, large", "kimi_k25", "qwen3_5", "lfm2_vl")
    for name in names:
        model, batch = families[name](images=(1,), texts=(3,))
        pitome_vlm.wrap(model, keep=0.3)
        with torch.no_grad():
            cache = model(**batch, use_cache=True)[CACHE_NAME]
        parts = [getattr(layer, n, None) for layer in cache.layers for n in ("keys", "values")]
        held = [one for one in parts if one is not None]
        found = sum(one.numel() * one.element_size() for one in held) // cache.get_seq_length()
        costs = pitome_vlm.describe(model).after
        assert costs.kv_bytes_per_image == costs.visual_tokens * found, name


@else_refused("qwen3_5", "lfm2_vl")
def test_layers_that_no_size_bias_reaches_are_named():
    for name, words in (("qwen3_5", "1 linear_attention layer"), ("lfm2_vl", "1 conv layer")):
        model = pitome_vlm.wrap(FAMILIES[name].model(), keep=0.3)
        line = f"not told sizes, for want of a mask: {words}\n"
        assert line in str(pitome_vlm.describe(model)), name
        pitome_vlm.wrap(model, keep=0.3, size_bias=False)
        assert "not told sizes" not in str(pitome_vlm.describe(model)), name
    told = pitome_vlm.describe(FAMILIES["gemma3"].model())
    assert told.untold == ()
