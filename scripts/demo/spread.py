"""Answers of a wrapped model that is also told how far apart the patches of a token were.

The distance term of RESTORE (arXiv 2606.01711), from the paper's description: next to log(size) a
token gets log(2 - c) on its attention logits, where c is the mean of cos(distance x frequency) over
its patches and the frequencies of the rotary embedding. The distance is that between a patch's
place and the token's. An experiment: `pitome_vlm.compact_inputs` gives the sizes that a forward
takes, and here they are multiplied by 2 - c before they are handed in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pitome_vlm
from pitome_vlm.measure.asking import decoded
from pitome_vlm.measure.demo_benchmark import ANSWER_TOKENS
from pitome_vlm.merge.tokens import VisualTokens
from pitome_vlm.wrapping.wrap import merging_of


def spread(source: Tensor, places: Tensor, frequencies: Tensor) -> Tensor:
    """How far apart the patches of every token are: 1 for one place, below 3.

    Args:
        source: [P] int64, the token of every patch; patches are at 0..P-1.
        places: [n] float32 of the tokens.
        frequencies: [F] float32 of the rotary embedding, in radians per place.

    Returns:
        [n] float32, 2 minus the mean cosine.
    """
    distance = torch.arange(len(source), device=source.device) - places[source]
    cosine = (distance[:, None] * frequencies).cos().mean(1)
    total = torch.zeros_like(places).index_add(0, source, cosine)
    return 2 - total / torch.bincount(source, minlength=len(places))


def spreads(visual: VisualTokens, how: Any, frequencies: Tensor) -> Tensor:
    """`spread` of all tokens of all images: [sum of counts].

    Args:
        visual: of `encode_images`.
        how: `positions` of the config.
        frequencies: see `spread`.
    """
    pairs = zip(visual.source_maps, visual.positions(how), strict=True)
    return torch.cat([spread(source, places, frequencies) for source, places in pairs])


def ask(model: Any, processor: Any, batch: dict[str, Tensor], *, told: bool = True) -> list[str]:
    """Greedy answers of a wrapped demo model, the whole prompt computed again for every token.

    Args:
        model: wrapped with `size_bias=True` and positions other than "compact".
        processor: its processor.
        batch: one image in every row, all of them of the same count.
        told: False leaves the sizes as they are; the answers are then those of `generate`.
    """
    cache = pitome_vlm.ImageCache()
    call = pitome_vlm.compact_inputs(model, **batch, image_cache=cache)
    visual = pitome_vlm.encode_images(model, batch["pixel_values"], image_cache=cache)
    if told:
        how = merging_of(model)[1].config.positions or "mean"
        frequencies = model.model.language_model.rotary_emb.inv_freq
        found = spreads(visual, how, frequencies)
        # All images have the same count, so that columns move alike in every row.
        first = (batch["input_ids"] == model.config.image_token_id).int().argmax(1)
        columns = first[:, None] + torch.arange(visual.counts[0])
        sizes = call["token_sizes"]
        scaled = sizes.gather(1, columns) * found.view(columns.shape)
        call["token_sizes"] = sizes.scatter(1, columns, scaled)
    return decoded(processor, batch, torch.cat([batch["input_ids"], _greedy(model, call)], 1))


def _greedy(model: Any, call: dict[str, Any]) -> Tensor:
    """[B, ANSWER_TOKENS] ids after a prompt of `compact_inputs`."""
    end, found = model.generation_config.eos_token_id, []
    done = torch.zeros(len(call["inputs_embeds"]), dtype=torch.bool)
    for _ in range(ANSWER_TOKENS):
        chosen = model(**call, use_cache=False).logits[:, -1].argmax(-1).where(~done, end)
        found.append(chosen)
        done |= chosen == end
        call = _longer(model, call, chosen)
    return torch.stack(found, 1)


def _longer(model: Any, call: dict[str, Any], chosen: Tensor) -> dict[str, Any]:
    """The inputs of a pass over one more token in every row."""
    embeds = model.get_input_embeddings()(chosen)[:, None]
    places, sizes = call["position_ids"], call["token_sizes"]
    mask = call.get("attention_mask")
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return call | {
        "inputs_embeds": torch.cat([call["inputs_embeds"], embeds], 1),
        "position_ids": torch.cat([places, places[:, -1:] + 1], 1),
        "token_sizes": torch.cat([sizes, torch.ones_like(sizes[:, :1])], 1),
        "attention_mask": mask,
    }
