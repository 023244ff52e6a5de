"""A selection of visual tokens that sees the question: a reference, not an algorithm to use.

CDPruner (arXiv 2506.10967): of the kernel diag(r) L diag(r), where L are the cosines between the
projected visual tokens and r is their relevance to the question, the subset of the largest
determinant is sought greedily (Chen et al. 2018, arXiv 1709.05135). Written from the paper; no line
of its code was copied. It compares with a text encoder that belongs to the tower, which few models
have; the demo model is asked in the ways of `RELEVANCES`.

An image that is encoded once serves every question, so an algorithm of the package never sees one.
The plan here is handed what `answers` found out about the questions of a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pitome_vlm
from pitome_vlm.algorithms import Algorithm, MergeContext, MergePlan
from pitome_vlm.common import check_choice, check_range
from pitome_vlm.measure.demo_benchmark import ask
from pitome_vlm.merge.algorithm import cosine_similarity, unit_vectors
from pitome_vlm.merge.matching import keep_only
from pitome_vlm.merge.similarity import Similarity
from pitome_vlm.wrapping.wrap import merging_of

NAME = "text_aware"
# The kernel [B, N, N] of the questions that are being asked, one image for each.
HANDED: ContextVar[Tensor] = ContextVar("HANDED")


@dataclass(frozen=True)
class Asked:
    """A batch of questions as the language model gets them without any reduction.

    Attributes:
        visual: [B, N, C] projected tokens.
        words: [B, W, C] embeddings of the columns after the image but the last.
        of_question: [B, W] bool, which of them belong to the question.
        attention: from a layer to what its last column pays to the visual tokens, a mean over
            heads: [B, N]. The language model is run for it.
    """

    visual: Tensor
    words: Tensor
    of_question: Tensor
    attention: Callable[[int], Tensor]


def word_mean(asked: Asked) -> Tensor:
    """Mean cosine with the words of the question: [B, N]."""
    of_question = asked.of_question[:, None].to(asked.words.dtype)
    cosines = unit_vectors(asked.visual) @ unit_vectors(asked.words).mT
    return (cosines * of_question).sum(-1) / of_question.sum(-1)


# FastV (arXiv 2403.06764) drops tokens by the attention of the second layer.
RELEVANCES: dict[str, Callable[[Asked], Tensor]] = {
    "none": lambda asked: torch.ones_like(asked.visual[..., 0]),
    "words": word_mean,
    "second layer": lambda asked: asked.attention(1),
    "last layer": lambda asked: asked.attention(-1),
}


@dataclass(frozen=True)
class TextOptions:
    """How relevance is found and what it weighs.

    Attributes:
        relevance: a name in `RELEVANCES`; "none" sees no question.
        weight: Chen's theta in [0, 1): the relevance becomes exp(theta / (2 (1 - theta)) r). None
            for r itself, which is what the paper writes.
    """

    relevance: str = "words"
    weight: float | None = None

    def __post_init__(self) -> None:
        check_choice("relevance", self.relevance, list(RELEVANCES))
        if self.weight is not None:
            check_range("weight", self.weight, 0, 0.99)


def kernel_of(asked: Asked, options: TextOptions) -> Tensor:
    """diag(r) L diag(r): [B, N, N] float64, r scaled to (0, 1] in every image."""
    found = RELEVANCES[options.relevance](asked).double()
    low, high = found.amin(-1, keepdim=True), found.amax(-1, keepdim=True)
    # The least relevant token stays possible; equal ones are all as relevant as can be.
    relevance = torch.where(high > low, (found - low) / (high - low), 1.0).clamp_min(1e-6)
    if options.weight is not None:
        relevance = (options.weight / (2 * (1 - options.weight)) * relevance).exp()
    cosines = cosine_similarity(asked.visual.double())
    return relevance[:, :, None] * cosines * relevance[:, None]


def most_likely(kernel: Tensor, n_out: int) -> Tensor:
    """Greedy MAP of a determinantal point process: the tokens in the order of choice.

    Again and again the token that multiplies the determinant of the chosen ones most is added. By
    how much is what the rows of the Cholesky factor so far leave of its diagonal entry.

    Args:
        kernel: [B, N, N] float64, positive semidefinite.
        n_out: 1..N.

    Returns:
        [B, n_out] int64, distinct; ties go to the earlier token.
    """
    images = torch.arange(len(kernel), device=kernel.device)
    gain = kernel.diagonal(0, -2, -1).clone()
    factor, chosen = kernel[:, :0], []
    for _ in range(n_out):
        choice = gain.argmax(-1)
        chosen.append(choice)
        explained = (factor[images, :, choice][:, None] @ factor)[:, 0]
        # What is spanned by the others gains nothing but rounding, below 0 too.
        root = gain[images, choice].clamp_min(torch.finfo(gain.dtype).eps).sqrt()
        row = (kernel[images, choice] - explained) / root[:, None]
        factor = torch.cat([factor, row[:, None]], 1)
        gain = (gain - row.square()).index_put((images, choice), gain.new_tensor(-math.inf))
    return torch.stack(chosen, 1)


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Keep `n_out` of N tokens by the kernel that was handed over.

    Raises:
        ValueError: there is none for these images.
    """
    kernel = HANDED.get(None)
    if kernel is None or kernel.shape[:2] != keys.shape[:2]:
        raise ValueError(f"{NAME} is not handed the questions; ask with text_selection.answers")
    chosen = most_likely(kernel, n_out)
    return keep_only(Similarity(keys, ctx.pairs), chosen)


ALGORITHM = Algorithm(
    name=NAME,
    plan=plan,
    source="CDPruner, arXiv 2506.10967, with the relevance that this model has",
    pairwise=False,
    default_stage="projector",
    metric="hidden",
    proportional_attention=False,
    options=TextOptions,
)


@functools.cache
def unreduced_model(path: Path) -> Any:
    """The model once more, without reduction and with an attention that can be read."""
    model, _ = pitome_vlm.load(path, dtype="float32", attn_implementation="eager")
    return pitome_vlm.wrap(model, keep=1.0, algorithm="none")


@torch.no_grad()
def asked_of(model: Any, batch: dict[str, Tensor]) -> Asked:
    """What `RELEVANCES` read, of a batch that is padded on the left, one image in a row.

    Args:
        model: of `unreduced_model`.
        batch: of `demo_benchmark.batches`.
    """
    call = pitome_vlm.compact_inputs(model, **batch)
    seen = batch["input_ids"] == model.config.image_token_id
    shape = (len(seen), -1)
    column = torch.arange(seen.shape[1])
    last = (seen * column).amax(1)
    after = slice(int(last.min()) + 1, -1)
    embeds = call["inputs_embeds"]

    @torch.no_grad()
    def attention(layer: int) -> Tensor:
        found = model(**call, output_attentions=True, use_cache=False).attentions[layer]
        return found.mean(1)[:, -1][seen].view(shape)

    return Asked(
        embeds[seen].view(*shape, embeds.shape[-1]),
        embeds[:, after],
        (column > last[:, None])[:, after],
        attention,
    )


def answers(model: Any, processor: Any, batch: dict[str, Tensor], *, path: Path) -> list[str]:
    """`demo_benchmark.ask`, which hands the questions to the selection that wants them.

    Args:
        model: the demo model of `path`, wrapped.
        processor: its processor.
        batch: one image in a row.
        path: its checkpoint.
    """
    config = merging_of(model)[1].config
    if config.algorithm != NAME:
        return ask(model, processor, batch)
    kernel = kernel_of(asked_of(unreduced_model(path), batch), config.own(TextOptions))
    handed = HANDED.set(kernel)
    try:
        return ask(model, processor, batch)
    finally:
        HANDED.reset(handed)
