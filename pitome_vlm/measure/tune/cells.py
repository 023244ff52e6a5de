"""Measure one setting on one part of the questions, unless the store has it already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ...merge.config import MergeConfig
from ..stats import Loss, relative_loss
from ..store import Store
from .asking import UNREDUCED, Asker
from .comparison import Comparison, compared
from .recipes import Recipe
from .rows import Row
from .scoring import Scorer, checked_score
from .smaller import Smaller
from .split import Parts

Part = Literal["search", "check"]
UNREDUCED_NAME = "unreduced"


@dataclass(frozen=True)
class Cell:
    """A setting measured on one part.

    Attributes:
        part: "search" or "check".
        recipe: options without the budget.
        config: options with the budget.
        tokens: visual tokens per image.
        loss: against the unreduced model on the same questions.
        divergence: mean over questions of KL(unreduced || reduced) of the first answer token, in
            nats.
        seconds: wall time of asking the model.
        answers: one per question of the part.
    """

    part: Part
    recipe: Recipe
    config: MergeConfig
    tokens: int
    loss: Loss
    divergence: float
    seconds: float
    answers: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Event:
    """Progress for the person who waits.

    Attributes:
        kind: the "plan" of at most `count` cells, "start" of work of `count` steps, "advance" by
            `count` steps, a finished "cell", or a "note" to show.
        text: name of the work that starts, or the note.
        count: see `kind`.
        cell: the finished cell.
        kept: the cell was in the folder already.
    """

    kind: Literal["plan", "start", "advance", "cell", "note"]
    text: str = ""
    count: int = 0
    cell: Cell | None = None
    kept: bool = False


Listener = Callable[[Event], object]


@dataclass(frozen=True)
class _Base:
    """The unreduced model on a part."""

    answers: list[str]
    scores: list[float]
    reference: np.ndarray


class Measurer:
    """Measures cells of some rows with an asker, and keeps them in a store."""

    def __init__(
        self,
        asker: Asker,
        rows: Sequence[Row],
        parts: Parts,
        store: Store,
        *,
        scorer: Scorer,
        answered: bool,
        confidence: float,
        tell: Listener,
    ) -> None:
        self.asker = asker
        self.rows = rows
        self.parts = parts
        self.store = store
        self.scorer = scorer
        self.answered = answered
        self.confidence = confidence
        self.tell = tell
        self._bases: dict[Part, _Base] = {}

    def members(self, part: Part) -> tuple[int, ...]:
        """Row numbers of a part."""
        return self.parts.search if part == "search" else self.parts.check

    def cell(self, part: Part, recipe: Recipe, config: MergeConfig) -> Cell:
        """A setting on a part, taken from the store where it is there.

        Args:
            part: "search" or "check".
            recipe: names the setting.
            config: the recipe with a budget.

        Search intervals have the plain level. On the check part the i-th setting that is looked
        at has level 1 - (1 - confidence) / i. The chance that any of three upper ends lies below
        the truth is then at most (1 - confidence) x (1 + 1/2 + 1/3) / 2, less than 1 - confidence.

        Raises:
            ValueError: the setting does not fit the model, or the unreduced model answers nothing
                right.
        """
        left = self.asker.tokens(config)
        base = self._base(part)
        key = self._key(part, config)
        level = self.confidence
        if part == "check":
            level = 1 - (1 - self.confidence) / (self._looks_before(key) + 1)
        record = self.store.get(key)
        kept = record is not None
        if record is None:
            shown = {"recipe": recipe.name, "tokens": left}
            record, _ = self._ask(part, config, base.reference, shown)
            self.store.put(key, record)
        made = self._made(part, recipe, config, left, record, level)
        self.tell(Event("cell", cell=made, kept=kept))
        return made

    def unreduced_score(self, part: Part) -> float:
        """Mean score of the unreduced model on a part."""
        return float(np.mean(self._base(part).scores))

    def against_smaller(self, cell: Cell) -> Comparison:
        """A cell of the check part against smaller images of as many tokens.

        It chooses nothing, so it is no look at the check part.

        Raises:
            ValueError: images cannot be made smaller; the reason.
        """
        rows, base = self.members("check"), self._base("check")
        key = self._key("smaller", cell.config)
        record = self.store.get(key)
        if record is None:
            self.tell(Event("start", f"smaller images, {cell.tokens} tokens", len(rows)))
            found = self.asker.ask_smaller(
                cell.config, rows, lambda count: self.tell(Event("advance", count=count))
            )
            shown = {"part": "smaller", "recipe": cell.recipe.name, "config": _plain(cell.config)}
            record = {**shown, **dataclasses.asdict(found)}
            self.store.put(key, record)
        fields = dataclasses.fields(Smaller)
        smaller = Smaller(**{one.name: record[one.name] for one in fields})
        return compared(
            smaller,
            self._scores("check", smaller.answers, base.answers),
            self._scores("check", cell.answers, base.answers),
            [self.parts.groups[row] for row in rows],
            level=self.confidence,
        )

    def _base(self, part: Part) -> _Base:
        if part not in self._bases:
            key, rows = self._key(part, UNREDUCED), self.members(part)
            array = f"{UNREDUCED_NAME}_{part}"
            record, reference = self.store.get(key), self.store.array(array)
            if record is None or reference is None or len(reference) != len(rows):
                shown = {"recipe": UNREDUCED_NAME, "tokens": self.asker.tokens_in}
                again, reference = self._ask(part, UNREDUCED, None, shown)
                assert reference is not None
                # First, so that a stored cell always has its reference.
                self.store.put_array(array, reference)
                if record is None:
                    self.store.put(key, again)
                    record = again
            answers = record["answers"]
            scores = self._scores(part, answers, answers)
            if not any(scores):
                raise ValueError(
                    f"the unreduced model answers none of the {len(scores)} questions of the "
                    f"{part} part right, so there is nothing to lose; ask for short answers in "
                    "the prompt, check the answers, or leave them out to compare with the "
                    "unreduced model's own answers"
                )
            self._bases[part] = _Base(answers, scores, reference)
        return self._bases[part]

    def _ask(
        self, part: Part, config: MergeConfig, reference: np.ndarray | None, shown: dict[str, Any]
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        rows = self.members(part)
        self.tell(Event("start", f"{shown['recipe']}, {shown['tokens']} tokens", len(rows)))
        begin = time.perf_counter()
        replies = self.asker.ask(
            config, rows, reference, lambda count: self.tell(Event("advance", count=count))
        )
        record = {
            "part": part,
            **shown,
            "config": _plain(config),
            "seconds": time.perf_counter() - begin,
            "answers": replies.answers,
            "divergence": replies.divergence,
        }
        return record, replies.first

    def _made(
        self,
        part: Part,
        recipe: Recipe,
        config: MergeConfig,
        tokens: int,
        record: dict[str, Any],
        level: float,
    ) -> Cell:
        base, rows = self._base(part), self.members(part)
        answers = record["answers"]
        loss = relative_loss(
            base.scores,
            self._scores(part, answers, base.answers),
            [self.parts.groups[row] for row in rows],
            level=level,
            gains=self.answered,
        )
        divergence = float(np.mean(record["divergence"]))
        seconds = float(record["seconds"])
        return Cell(part, recipe, config, tokens, loss, divergence, seconds, tuple(answers))

    def _scores(self, part: Part, answers: Sequence[str], base: Sequence[str]) -> list[float]:
        """Every answer against the user's, else against the unreduced model's own."""
        return [
            checked_score(self.scorer, given, self.rows[row].answers or (unreduced,))
            for row, given, unreduced in zip(self.members(part), answers, base, strict=True)
        ]

    def _looks_before(self, key: str) -> int:
        """How many other settings were checked on the check part before this one."""
        looked = [
            other
            for other in self.store
            if (record := self.store.get(other))
            and record["part"] == "check"
            and record["recipe"] != UNREDUCED_NAME
        ]
        return looked.index(key) if key in looked else len(looked)

    def _key(self, part: Part | Literal["smaller"], config: MergeConfig) -> str:
        rows = self.members("search" if part == "search" else "check")
        values = {"part": part, "rows": rows, "config": _plain(config)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def _plain(config: MergeConfig) -> dict[str, Any]:
    """A config as JSON values; the package's version is in the identity of the store."""
    values = config.to_dict()
    values.pop("pitome_vlm_version")
    return values
