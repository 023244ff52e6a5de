"""Batches of prompts through a LLaVA: answers, and likelihoods of given continuations.

Handles task options, token counts of prompts whose images are merged, and errors that name the
document. Needs nothing of lmms-eval; the same engine serves wrapped and unwrapped models.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..measure import asking
from ..wrapping.encode import prompt_images
from ..wrapping.wrap import base_model, is_wrapped, merge_config, schedule_of
from .requests import Prompt, RequestError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DEFAULT_NEW_TOKENS = 1024
# Generation options of tasks that `generate` takes as they are. Sampling ones count only where
# the task samples.
_OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
    "repetition_penalty",
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
# Handled here, or about other models' images and prompts.
_ELSEWHERE = ("until", "do_sample", "image_aspect_ratio", "image_sizes", "modalities")


@dataclass(frozen=True)
class Answer:
    """What the model wrote; a merged token counts once in `input_tokens`."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: sum over its tokens, natural logarithm.
        greedy: whether every token is the most likely one.
        input_tokens: tokens that reached the language model, continuation included.
    """

    log_likelihood: float
    greedy: bool
    input_tokens: int


@dataclass
class Work:
    """What was done since the last report."""

    seconds: float = 0.0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    visual_tokens: int = 0


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is called with for a task's generation options.

    Options that are unknown here are left out with a warning, as other models of lmms-eval do
    without one.
    """
    unknown = sorted(set(options) - {*_OPTIONS, *_SAMPLING, *_ELSEWHERE})
    if unknown:
        _warn_once(f"generation options that are not used: {', '.join(unknown)}")
    temperature = options.get("temperature")
    samples = bool(options.get("do_sample", bool(temperature))) and temperature != 0
    wanted: dict[str, Any] = {"max_new_tokens": DEFAULT_NEW_TOKENS}
    for name in (*_OPTIONS, *(_SAMPLING if samples else ())):
        if options.get(name) is not None:
            wanted[name] = options[name]
    return {**wanted, "do_sample": samples}


def stop_strings(options: Mapping[str, Any]) -> list[str]:
    """The strings an answer ends before; ValueError for something else than text."""
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(text, str) for text in until):
        raise ValueError(f"until must be text or a list of texts, got {until!r}")
    return [text for text in until if text]


def joined(prompt: str, continuation: str) -> tuple[str, str]:
    """Context and continuation with exactly one word boundary, kept in the continuation."""
    if not continuation.strip():
        raise ValueError(f"the continuation to be scored is empty: {continuation!r}")
    context = prompt.rstrip(" ")
    space = "" if continuation[0].isspace() or context[-1:].isspace() else " "
    return context, f"{space}{continuation}"


@dataclass
class Engine:
    """A model, its processor, and a count of what they did.

    Attributes:
        model: a LLaVA, wrapped or not, on its own or inside a `PeftModel`.
        processor: its processor; a tokenizer without a padding token pads with the end token.
        work: time and tokens since the last report.
    """

    model: Any
    processor: Any
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        self.tokenizer = asking.tokenizer_of(self.processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def answer(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[Answer]:
        """The answers to a batch of prompts; a RequestError names one that cannot be answered."""
        wanted, until = generation_options(options), stop_strings(options)
        return self._named(lambda part: self._answer(part, wanted, until), prompts)

    def score(self, prompts: Sequence[Prompt]) -> list[Score]:
        """The likelihoods of the prompts' continuations; a RequestError names one that has none."""
        scores: dict[int, Score] = {}
        # Rows whose images shrink by different amounts would not end at the same place.
        shrinking = [self._shrinking(prompt, place) for place, prompt in enumerate(prompts)]
        for kind in dict.fromkeys(shrinking):
            places = [i for i, own in enumerate(shrinking) if own == kind]
            part = self._named(self._score, [prompts[i] for i in places])
            scores |= dict(zip(places, part, strict=True))
        return [scores[index] for index in range(len(prompts))]

    def _shrinking(self, prompt: Prompt, place: int) -> tuple[Any, ...]:
        """What decides how much merging shortens a prompt; equal for prompts that go together."""
        if not is_wrapped(self.model):
            return ()
        if merge_config(self.model).is_adaptive:
            # Only the tower can tell.
            return ("alone", place) if prompt.images else ()
        if schedule_of(self.model).packed:
            return tuple(image.size for image in prompt.images)
        return (len(prompt.images),)

    def _named(
        self, work: Callable[[Sequence[Prompt]], list[Result]], prompts: Sequence[Prompt]
    ) -> list[Result]:
        try:
            return work(prompts)
        except Exception as error:
            if len(prompts) > 1:
                # Only one at a time says which one it is.
                for prompt in prompts:
                    self._named(work, [prompt])
            names = "; ".join(str(prompt.call) for prompt in prompts)
            reason = f"{type(error).__name__}: {error}"
            if len(prompts) > 1:
                reason = f"only together, a smaller batch_size may help: {reason}"
            raise RequestError(f"{names}: {reason}") from error

    def encoded(
        self, prompts: Sequence[Prompt], texts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The tensors that the model is given for prompts, or for `texts` in place of theirs."""
        texts = [prompt.text for prompt in prompts] if texts is None else texts
        images = [image for prompt in prompts for image in prompt.images]
        return asking.on_model(self.model, asking.encoded(self.processor, texts, images))

    def _lengths(self, batch: Mapping[str, Tensor]) -> list[int]:
        """Tokens of every row as the language model sees them."""
        lengths = batch["attention_mask"].sum(1)
        if is_wrapped(self.model):
            for image in prompt_images(self.model, batch):
                self.work.visual_tokens += image.count
                self.work.images += 1
                lengths[image.row] -= image.full - image.count
        return [int(length) for length in lengths]

    def _clock(self) -> float:
        # Accelerators work asynchronously.
        torch.get_device_module(self.model.device).synchronize()
        return time.perf_counter()

    def _count(
        self, prompts: Sequence[Prompt], seconds: float, read: list[int], written: list[int]
    ) -> None:
        self.work.seconds += seconds
        for prompt, inputs, outputs in zip(prompts, read, written, strict=True):
            if not prompt.call.padding:
                self.work.requests += 1
                self.work.input_tokens += inputs
                self.work.output_tokens += outputs

    def _answer(
        self, prompts: Sequence[Prompt], wanted: dict[str, Any], until: list[str]
    ) -> list[Answer]:
        batch = self.encoded(prompts)
        start = self._clock()
        sequences = asking.generated(self.model, batch, **wanted)
        seconds = self._clock() - start
        texts = asking.decoded(self.processor, batch, sequences)
        written = self._written(sequences[:, batch["input_ids"].shape[1] :])
        read = self._lengths(batch)
        self._count(prompts, seconds, read, written)
        return [
            Answer(_until(text, until), inputs, outputs)
            for text, inputs, outputs in zip(texts, read, written, strict=True)
        ]

    def _written(self, new: Tensor) -> list[int]:
        """Generated tokens of every row up to its end token; padding follows it."""
        model: Any = base_model(self.model)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        counts = []
        for row in new.tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            counts.append(stop + 1)
        return counts

    @torch.no_grad()
    def _score(self, prompts: Sequence[Prompt]) -> list[Score]:
        pairs = [joined(prompt.text, prompt.continuation or "") for prompt in prompts]
        counts = [self._tokens(a + b) - self._tokens(a) for a, b in pairs]
        if min(counts) < 1:
            raise ValueError("the continuation to be scored has no token of its own")
        batch = self.encoded(prompts, [a + b for a, b in pairs])
        mask, most = batch["attention_mask"], max(counts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        start = self._clock()
        output = self.model(
            **batch, position_ids=positions, use_cache=False, logits_to_keep=most + 1
        )
        seconds = self._clock() - start
        # Every row ends with its continuation, and the logits stand one column before it.
        logits = output.logits[:, -most - 1 : -1].float().log_softmax(-1)
        target = batch["input_ids"][:, -most:]
        likelihood = logits.gather(2, target[..., None])[..., 0]
        greedy = logits.argmax(-1) == target
        read = self._lengths(batch)
        self._count(prompts, seconds, read, [0] * len(prompts))
        return [
            Score(float(likelihood[row, -n:].sum()), bool(greedy[row, -n:].all()), read[row])
            for row, n in enumerate(counts)
        ]

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _until(text: str, until: list[str]) -> str:
    text = text.strip()
    for end in until:
        text = text.split(end, 1)[0]
    return text.strip()


@functools.cache
def _warn_once(text: str) -> None:
    # lmms-eval switches Python's own warnings off.
    logger.warning(text)
