"""The model class of `lmms-eval --model pitome_llava`.

Handles what lmms-eval asks of a model class, and changes of the merging between the evaluations of
a sweep. Leaves requests to `requests.py`, answers to `engine.py` and `--model_args` to
`arguments.py`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from torch import Tensor
from tqdm import tqdm

from ..common import check_text
from ..measure.asking import image_token, prompt_text
from ..merge.config import MergeConfig
from ..wrapping.wrap import is_wrapped, unwrap, wrap
from .arguments import ModelArguments, combined
from .engine import Engine, Work
from .loader import load_model
from .requests import (
    Call,
    Prompt,
    RequestError,
    Round,
    dialogue_call,
    generation_call,
    opened,
    plain_messages,
    scoring_call,
)

MAX_ROUNDS = 100


class SequenceResult(GenerationResult):
    """A result of several parts with token counts; unpacks like its parts.

    lmms-eval 0.7.3 turns the bare tuples of `loglikelihood` into text, which breaks every
    multiple-choice task; a `GenerationResult` is handed on as it is.
    """

    def __iter__(self) -> Iterator[Any]:
        return iter(self.text)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: Any) -> Any:
        return self.text[index]


@dataclass
class _Dialogue:
    """An unfinished request of several rounds."""

    call: Call
    doc: Any
    round: Round
    answers: list[str] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0


class PitomeLlava(lmms):
    """A LLaVA with merged visual tokens, for tasks in lmms-eval's chat form.

    Attributes:
        arguments: what `--model_args` said.
        accelerator: which process this is, and on which device it runs.
        answering_seconds: wall time of this process's requests since the last `reconfigure`,
            images and prompts included, data loading and scoring not.
    """

    is_simple = False

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        self.arguments = ModelArguments.parse(model_args)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.engine = Engine(*load_model(self.arguments, self.accelerator))
        self.answering_seconds = 0.0
        self.system_prompt = self._resolve_system_prompt(self.arguments.system_prompt)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> PitomeLlava:
        """The model from the text of `--model_args` and lmms-eval's own options."""
        try:
            given = utils.simple_parse_args_string(arg_string)
        except ValueError as error:
            raise ValueError(
                f"model_args must be name=value pairs with commas between, got {arg_string!r}"
            ) from error
        return cls(**combined(given, additional_config or {}))

    @property
    def model(self) -> Any:
        """The LLaVA, wrapped or not."""
        return self.engine.model

    @property
    def processor(self) -> Any:
        """Its processor."""
        return self.engine.processor

    @property
    def device(self) -> torch.device:
        """Where this process runs; lmms-eval gathers counts there."""
        device: torch.device = self.model.device
        return device

    @property
    def batch_size(self) -> int:
        """Requests at a time."""
        return self.arguments.batch_size

    def reconfigure(self, config: MergeConfig | None) -> None:
        """Change the merging of the loaded model; None takes it off.

        Raises:
            ValueError: a budget that does not fit the model, which is then unchanged.
        """
        if config is None:
            unwrap(self.model)
        else:
            wrap(self.model, config=config)
        self.engine.work = Work()
        self.answering_seconds = 0.0

    def first_inputs(self, requests: Sequence[Instance]) -> dict[str, Tensor]:
        """The tensors that the model is given for requests, of dialogues for the first round."""
        calls = [
            (dialogue_call if "multi_round" in request.request_type else generation_call)(
                request, simple=self.is_simple
            )
            for request in requests
        ]
        return self.engine.encoded([self._first_prompt(call) for call in calls])

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; a RequestError names the document."""
        calls = [generation_call(request, simple=self.is_simple) for request in requests]
        results: dict[int, GenerationResult] = {}
        with self._answering(len(calls)) as bar:
            for options, places in self._batches(calls):
                prompts = [self._first_prompt(calls[place]) for place in places]
                for place, answer in zip(places, self.engine.answer(prompts, options), strict=True):
                    tokens = TokenCounts(answer.input_tokens, answer.output_tokens)
                    results[place] = GenerationResult(answer.text, tokens)
                bar.update(len(places))
        return [results[place] for place in range(len(calls))]

    def loglikelihood(self, requests: list[Instance]) -> list[SequenceResult]:
        """(negative log-likelihood, greedy or not) of every request's continuation.

        Negative, and summed over tokens, because lmms-eval 0.7.3 takes the choice with the
        smallest number: its models return losses.

        Raises:
            RequestError: one of them cannot be scored; the message names its document.
        """
        calls = [scoring_call(request) for request in requests]
        results: list[SequenceResult] = []
        with self._answering(len(calls)) as bar:
            for _, places in self._batches(calls):
                prompts = [self._first_prompt(calls[place]) for place in places]
                for score in self.engine.score(prompts):
                    pair = (-score.log_likelihood, score.greedy)
                    results.append(SequenceResult(pair, TokenCounts(score.input_tokens, 0)))
                bar.update(len(places))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[SequenceResult]:
        """The answers of all rounds of every request; a round of all requests at a time."""
        calls = [dialogue_call(request, simple=self.is_simple) for request in requests]
        dialogues = [self._begun(call) for call in calls]
        with self._answering(len(calls)) as bar:
            for number in range(1, MAX_ROUNDS + 1):
                going = [one for one in dialogues if one.round.messages is not None]
                if not going:
                    break
                self._one_round(going)
                for dialogue in going:
                    self._go_on(dialogue, number)
                bar.update(sum(one.round.messages is None for one in going))
        return [
            SequenceResult(one.answers, TokenCounts(one.input_tokens, one.output_tokens))
            for one in dialogues
        ]

    def clean(self) -> None:
        """Report the throughput of all processes and free caches; the model stays.

        lmms-eval calls this once in every process, after the last request. Its own version
        deletes the model, so that a second evaluation would have to load it again.
        """
        self._report()
        gc.collect()
        module = torch.get_device_module(self.device)
        if hasattr(module, "empty_cache"):
            module.empty_cache()

    def _report(self) -> None:
        parts: list[Work] = gather_object([self.engine.work])
        self.engine.work = Work()
        requests = sum(part.requests for part in parts)
        if not requests:
            return
        # Processes work in parallel: the slowest one is what the user waits for.
        seconds = max(part.seconds for part in parts)
        written = sum(part.output_tokens for part in parts)
        details = {
            "total_requests": requests,
            "processes": len(parts),
            "input_tokens": sum(part.input_tokens for part in parts) / requests,
        }
        images = sum(part.images for part in parts)
        if is_wrapped(self.model) and images:
            details["visual_tokens"] = sum(part.visual_tokens for part in parts) / images
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=written,
            avg_speed=written / seconds if seconds else 0.0,
            additional_metrics=details,
        )

    @contextlib.contextmanager
    def _answering(self, total: int) -> Iterator[Any]:
        start = time.perf_counter()
        with tqdm(total=total, disable=self.rank != 0, desc="Model Responding") as bar:
            yield bar
        self.answering_seconds += time.perf_counter() - start

    def _batches(self, calls: Sequence[Call]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Places of requests with the same generation options, `batch_size` at a time."""
        groups: dict[str, list[int]] = {}
        for place, call in enumerate(calls):
            key = json.dumps(call.options, sort_keys=True, default=str)
            groups.setdefault(key, []).append(place)
        for places in groups.values():
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                yield calls[part[0]].options, part

    def _document(self, call: Call) -> Any:
        return self.task_dict[call.task][call.split][call.doc_id]

    def _first_prompt(self, call: Call) -> Prompt:
        try:
            doc = self._document(call)
            prompt = self._prompt(call, call.first(doc))
            if call.target is None:
                return prompt
            target = call.target(doc) if callable(call.target) else call.target
            target = check_text("the continuation", str(target))
            return Prompt(call, prompt.text, prompt.images, target)
        except Exception as error:
            raise _named(call, error) from error

    def _prompt(self, call: Call, raw: Any) -> Prompt:
        placeholder = image_token(self.processor)
        messages, given = plain_messages(raw, placeholder, self.system_prompt)
        images = [opened(one, self.arguments.max_pixels) for one in given]
        return Prompt(call, prompt_text(self.processor, messages), images)

    def _begun(self, call: Call) -> _Dialogue:
        try:
            doc = self._document(call)
            return _Dialogue(call, doc, Round(call.first(doc)))
        except Exception as error:
            raise _named(call, error) from error

    def _one_round(self, dialogues: Sequence[_Dialogue]) -> None:
        for options, places in self._batches([one.call for one in dialogues]):
            part = [dialogues[place] for place in places]
            prompts = [self._round_prompt(one) for one in part]
            for one, answer in zip(part, self.engine.answer(prompts, options), strict=True):
                one.answers.append(answer.text)
                one.input_tokens += answer.input_tokens
                one.output_tokens += answer.output_tokens

    def _round_prompt(self, dialogue: _Dialogue) -> Prompt:
        try:
            return self._prompt(dialogue.call, dialogue.round.messages)
        except Exception as error:
            raise _named(dialogue.call, error) from error

    def _go_on(self, dialogue: _Dialogue, number: int) -> None:
        call, said = dialogue.call, list(dialogue.answers)
        if number == MAX_ROUNDS:
            raise RequestError(f"{call}: the task does not end after {MAX_ROUNDS} rounds")
        if call.later is None:
            dialogue.round = Round(None)
            return
        try:
            dialogue.round = call.later(dialogue.doc, number, said, dialogue.round.info)
        except Exception as error:
            raise _named(call, error) from error


class PitomeLlavaSimple(PitomeLlava):
    """The same model for lmms-eval's simple form, which multiple-choice tasks need.

    Images go before the task's text, as in the chat form. `--force_simple` selects it.
    """

    is_simple = True


def _named(call: Call, error: Exception) -> RequestError:
    return RequestError(f"{call}: {type(error).__name__}: {error}")
