"""What the page does, without the page: one model asked with and without merging, one at a time."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import threading
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..common import check_range, shown
from ..loading.images import ImageLimits, ImageSource, load_image
from ..measure import asking
from ..measure.answering import Answer, answer
from ..measure.timing import time_prefill
from ..measure.visualize import Part, source_maps
from ..merge import algorithms
from ..merge.config import MergeConfig
from ..wrapping.encode import planned_schedule, prompt_images
from ..wrapping.wrap import unwrap, wrapped

UNMERGED = MergeConfig(keep=1.0, algorithm="none")
LOWEST_KEEP = 0.01
# Where first tokens come sooner than this, their times are medians, because one run is chance.
_QUICK_MS, _RUNS = 500, 5


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        image: bytes and pixels of an upload.
        question: longest question in characters.
        answer: longest answer in tokens.
        waiting: requests that wait; one more is refused.
    """

    image: ImageLimits = field(default_factory=ImageLimits)
    question: int = 500
    answer: int = 64
    waiting: int = 32


@dataclass(frozen=True, eq=False)
class Reply:
    """One answer and what it cost.

    Attributes:
        config: what was merged.
        answer: the text and its length.
        first_token_ms: milliseconds from pixels and ids to the first token.
        full: visual tokens without merging.
        visual: visual tokens that reached the language model.
        parts: the groups, empty without merging.
        note: why there are none, where their drawing was refused.
    """

    config: MergeConfig
    answer: Answer
    first_token_ms: float
    full: int
    visual: int
    parts: list[Part]
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """An algorithm that could not be used, and why."""

    name: str
    why: str


class Session:
    """A model that visitors share: requests take turns, and each leaves it unmerged.

    Attributes:
        name: of the model, as a command line gives it.
        config: what was asked for on the command line; the page starts with it.
        limits: of every request.
    """

    def __init__(
        self, model: Any, processor: Any, config: MergeConfig, name: str, limits: Limits
    ) -> None:
        self.model = unwrap(model)
        self.processor = processor
        self.config = config
        self.name = name
        self.limits = limits
        self._turn = threading.Lock()

    @property
    def algorithms(self) -> list[str]:
        """Names of the algorithms that merge, the one asked for first."""
        names = [name for name in algorithms.available() if name != UNMERGED.algorithm]
        return sorted(names, key=lambda name: name != self.config.algorithm)

    @property
    def keep(self) -> float:
        """The fraction of the visual tokens that the page starts with."""
        if isinstance(self.config.keep, float):
            return self.config.keep
        schedule = planned_schedule(self.model, self.config)
        return max(LOWEST_KEEP, round(schedule.tokens_out / schedule.tokens_in, 2))

    def settings(self, keep: float, algorithm: str) -> MergeConfig:
        """The config of a slider and a name; other options stay where the algorithm is the same.

        Raises:
            TypeError: `keep` is no number.
            ValueError: `keep` out of range, or an unknown algorithm.
        """
        check_range("keep", keep, LOWEST_KEEP, 1.0)
        keep = float(keep)
        if algorithm not in self.algorithms:
            algorithms.get(algorithm)
            raise ValueError(f"algorithm {shown(algorithm)} merges nothing; choose another")
        if algorithm == self.config.algorithm:
            return self.config.replace(keep=keep)
        return MergeConfig(keep=keep, algorithm=algorithm)

    def compare(
        self, image: ImageSource | None, question: str, keep: float, algorithm: str
    ) -> list[Reply]:
        """The answers without and with merging.

        Raises:
            ValueError: no or a broken image, one beyond the limits, an empty or too long question,
                or settings that do not fit the model.
        """
        config = self.settings(keep, algorithm)
        loaded, batch = self._prepared(image, question)
        with self._turn:
            replies = [self._reply(loaded, batch, one) for one in (UNMERGED, config)]
            return self._timed(batch, replies)

    def methods(
        self, image: ImageSource | None, question: str, keep: float
    ) -> tuple[list[Reply | Refusal], Reply]:
        """The answer with every algorithm, or why it gives none, and without; as `compare`."""
        configs = [self.settings(keep, name) for name in self.algorithms]
        loaded, batch = self._prepared(image, question)
        replies: list[Reply] = []
        refused: list[Refusal] = []
        with self._turn:
            for config in (UNMERGED, *configs):
                try:
                    replies.append(self._reply(loaded, batch, config))
                except ValueError as error:
                    if config is UNMERGED:
                        raise
                    refused.append(Refusal(config.algorithm, str(error)))
            unmerged, *merged = self._timed(batch, replies)
        return [*merged, *refused], unmerged

    def _prepared(
        self, image: ImageSource | None, question: str
    ) -> tuple[Image.Image, dict[str, Any]]:
        if image is None:
            raise ValueError("no image: upload one, or choose an example")
        if not isinstance(question, str):
            raise ValueError(f"the question must be a text, got {shown(question)}")
        if len(question) > self.limits.question:
            raise ValueError(
                f"the question has {len(question)} characters; at most {self.limits.question} are "
                "taken: shorten it"
            )
        question = asking.checked_question(question, self.processor)
        loaded = load_image(image, self.limits.image)
        prompt = asking.question_prompt(self.processor, question)
        rows = asking.encoded_rows(self.processor, [prompt], [[loaded]], ["the image"])
        return loaded, asking.on_model(self.model, rows)

    def _reply(self, image: Image.Image, batch: dict[str, Any], config: MergeConfig) -> Reply:
        parts: list[Part] = []
        note = ""
        with wrapped(self.model, config=config):
            (counts,) = prompt_images(self.model, batch)
            said = answer(self.model, self.processor, batch, max_new_tokens=self.limits.answer)
            if config is not UNMERGED:
                try:
                    parts = source_maps(self.model, self.processor, image)
                except ValueError as error:
                    note = str(error)
        first = said.first_token_s * 1e3
        return Reply(config, said, first, counts.full, counts.count, parts, note)

    def _timed(self, batch: dict[str, Any], replies: list[Reply]) -> list[Reply]:
        """The replies with medians, where all first tokens come soon; the settings take turns."""
        if max(reply.first_token_ms for reply in replies) > _QUICK_MS:
            return replies
        times: list[list[float]] = [[] for _ in replies]
        for _ in range(_RUNS):
            for reply, own in zip(replies, times, strict=True):
                with wrapped(self.model, config=reply.config):
                    own.append(time_prefill(self.model, batch, 1, warmup=0).median_ms)
        return [
            dataclasses.replace(reply, first_token_ms=statistics.median(own))
            for reply, own in zip(replies, times, strict=True)
        ]


def wrap_line(config: MergeConfig) -> str:
    """The Python line that merges as `config` does."""
    options = ", ".join(f"{name}={value!r}" for name, value in config.changed().items())
    return f"model = pitome_vlm.wrap(model, {options})"


def command_line(config: MergeConfig, model: str, question: str) -> str:
    """The command that asks the same question of the same model."""
    words = ["pitome-vlm", "ask", "--model", model, "--image", "IMAGE"]
    for name, value in config.changed().items():
        if name in ("keep", "algorithm"):
            words += [f"--{name}", str(value)]
        else:
            words += ["--option", f"{name}={value}"]
    # A question may begin like an option.
    return shlex.join([*words, *(["--"] if question.startswith("-") else []), question])
