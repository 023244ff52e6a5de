"""Ask a model under a merge config: greedy answers and the first token's distribution."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...adapters import find_adapter
from ...loading.images import ImageLimits
from ...merge.config import MergeConfig
from ...wrapping.encode import planned_schedule
from ...wrapping.wrap import base_model, wrapped
from ..asking import checked_question, decoded, encoded_rows, generated, question_prompt
from ..description import describe_llava
from ..provenance import model_fingerprint, provenance
from .rows import Row
from .smaller import Smaller, ask_smaller

# From processor, question and number of images to the text of a prompt.
Prompt = Callable[[Any, str, int], str]

UNREDUCED = MergeConfig(keep=1.0, algorithm="none")
# Prepared batches are kept up to this many bytes, because preparing large images takes longer than
# answering.
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Replies:
    """What a model answered to some rows.

    Attributes:
        answers: one text per row.
        first: [rows, vocabulary] float32 log-probabilities of the first answer token; None where
            a reference was given.
        divergence: per row KL(unreduced || this) of the first answer token in nats; None where
            no reference was given.
    """

    answers: list[str]
    first: np.ndarray | None = None
    divergence: list[float] | None = None


class Asker(Protocol):
    """What a search needs of a model; rows are named by their numbers."""

    tokens_in: int
    # What has so many tokens: "image", "tile", "image of 1024 x 768 pixels".
    counted_per: str

    def tokens(self, config: MergeConfig) -> int:
        """Visual tokens per image under a config.

        Raises:
            ValueError: the model cannot have it.
        """
        ...

    def ask(
        self,
        config: MergeConfig,
        rows: Sequence[int],
        reference: np.ndarray | None,
        advance: Callable[[int], object],
    ) -> Replies:
        """Answer rows under a config; `reference` is `Replies.first` of the unreduced model."""
        ...

    def ask_smaller(
        self, config: MergeConfig, rows: Sequence[int], advance: Callable[[int], object]
    ) -> Smaller:
        """Answer rows without merging, about smaller images of as many tokens as under a config.

        Raises:
            ValueError: the model or its processor cannot make them.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What decides the answers, and what computed them."""
        ...

    def savings(self, config: MergeConfig) -> str:
        """What a config saves, as a phrase; may be empty."""
        ...


class ModelAsker:
    """A LLaVA of transformers with its processor, and the rows it can be asked.

    The model is left as it was after every call: wrapped or not, training or not.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: Sequence[Row],
        digests: Sequence[tuple[str, ...]],
        prompt: Prompt = question_prompt,
        batch_size: int = 8,
        max_new_tokens: int = 16,
        limits: ImageLimits | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.rows = rows
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.limits = limits or ImageLimits()
        self.prompts = [_prompt(processor, row, prompt) for row in rows]
        self.digests = digests
        self._prepared: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._bytes = 0
        self.tokens_in = planned_schedule(model, UNREDUCED).tokens_in
        unit = find_adapter(base_model(model)).counted_per
        described = describe_llava(model, config=UNREDUCED)
        self.counted_per = described.shown if unit == "image" else unit

    def tokens(self, config: MergeConfig) -> int:
        """Visual tokens per image under a config.

        Raises:
            ValueError: the model cannot have it.
        """
        return planned_schedule(self.model, config).tokens_out

    def facts(self) -> dict[str, Any]:
        """Model, images, prompts, generation options, hardware, versions."""
        base, data = base_model(self.model), hashlib.sha256()
        for prompt, images in zip(self.prompts, self.digests, strict=True):
            data.update("\0".join((prompt, *images, "")).encode())
        return provenance(
            base,
            checkpoint=str(getattr(base.config, "_name_or_path", "")) or "in memory",
            fingerprint=model_fingerprint(base),
            questions=len(self.rows),
            data=f"sha256:{data.hexdigest()[:16]}",
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )

    def savings(self, config: MergeConfig) -> str:
        """Computed FLOPs and cache, as a phrase."""
        described = describe_llava(self.model, config=config)
        return (
            f"{described.tokens_out} of {described.tokens_in} visual tokens per {described.shown}; "
            f"computed for it and {described.before.text_tokens} text tokens: "
            f"{described.saved('total_flops'):.0f} % fewer FLOPs up to the first token, "
            f"{described.saved('kv_bytes'):.0f} % less KV cache"
        )

    def ask(
        self,
        config: MergeConfig,
        rows: Sequence[int],
        reference: np.ndarray | None,
        advance: Callable[[int], object],
    ) -> Replies:
        """Answer rows greedily under a config.

        Args:
            config: merge options; `UNREDUCED` for the model without merging.
            rows: row numbers.
            reference: [rows, vocabulary] float32 log-probabilities of the unreduced model; None
                to get those of this config instead of divergences.
            advance: called with the number of rows after every batch.

        Raises:
            ValueError: an image has become unreadable, or the config does not fit.
        """
        answers: list[str] = []
        first: list[np.ndarray] = []
        divergence: list[float] = []
        with evaluating(self.model), wrapped(self.model, config=config):
            for part in self.parts(rows):
                texts, logprobs = self.answer(self.batch(part))
                start = len(answers)
                answers += texts
                if reference is None:
                    first.append(logprobs.cpu().numpy())
                else:
                    known = torch.from_numpy(np.array(reference[start : start + len(part)]))
                    divergence += kl_divergence(known.to(logprobs.device), logprobs).tolist()
                advance(len(part))
        if reference is None:
            return Replies(answers, first=np.concatenate(first))
        return Replies(answers, divergence=divergence)

    def ask_smaller(
        self, config: MergeConfig, rows: Sequence[int], advance: Callable[[int], object]
    ) -> Smaller:
        """See `smaller.ask_smaller`."""
        with evaluating(self.model):
            return ask_smaller(self, config, rows, advance)

    def parts(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """Row numbers by batch."""
        size = self.batch_size
        return [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]

    def answer(self, batch: dict[str, Tensor]) -> tuple[list[str], Tensor]:
        """Answers, and [B, vocabulary] float32 log-probabilities of their first tokens."""
        out = generated(
            self.model,
            batch,
            max_new_tokens=self.max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        texts = decoded(self.processor, batch, out.sequences)
        return texts, out.logits[0].float().log_softmax(-1)

    def prepare(
        self, part: tuple[int, ...], image_options: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Rows as the processor's tensors; `image_options` as for `asking.encoded`."""
        prompts = [self.prompts[row] for row in part]
        rows = [self.rows[row] for row in part]
        images, names = [row.load(self.limits) for row in rows], [row.source for row in rows]
        return encoded_rows(self.processor, prompts, images, names, image_options=image_options)

    def batch(self, part: tuple[int, ...]) -> dict[str, Tensor]:
        """`prepare`, kept for the next config where there is room."""
        if part in self._prepared:
            return self._prepared[part]
        batch = self.prepare(part)
        size = sum(value.numel() * value.element_size() for value in batch.values())
        if self._bytes + size <= _CACHE_BYTES:
            self._prepared[part] = batch
            self._bytes += size
        return batch


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """[B] float32 KL(reference || other) in nats of log-probabilities [B, V]; never negative."""
    terms = reference.exp() * (reference - other)
    # Where the reference has no mass, 0 log 0 counts as 0.
    return terms.masked_fill(reference == -torch.inf, 0.0).sum(-1).clamp(min=0)


def _prompt(processor: Any, row: Row, prompt: Prompt) -> str:
    try:
        question = checked_question(row.question, processor)
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from error
    return prompt(processor, question, len(row.images))


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode in the `with` block: dropout would make answers random."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
