"""`tune`: split, search, check, say what was found.

Knows: the order of things and what is refused. Does not know: how any of them is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...loading.images import ImageError, ImageLimits
from .asking import UNREDUCED, Asker, ModelAsker, Prompt, chat_prompt
from .bench import Bench, Cell, Event, Listener
from .journal import Journal, check_folder
from .recipes import Recipe, checked_recipes, default_recipes, token_counts
from .result import TuneResult, judge
from .rows import Row, as_rows, has_answers, picture_digests
from .scoring import Scorer, exact_match
from .search import admissible, walk_down, within
from .split import FEW, Parts, split_by_image

MOST_CHECKS = 3
_POOR = 0.1
# Facts that may differ between a run and its resumption.
_NOT_DECISIVE = ("checkpoint", "hardware", "threads", "python")


@dataclass(frozen=True)
class Plan:
    """What is wanted, checked as far as it can be without a model.

    Attributes:
        max_loss: largest loss, in [0, 1).
        recipes: None for the default ones.
        budgets: token counts or fractions, None for the default ones.
        seed: of the split.
        check_share: share of the pictures to check on, in (0, 1).
        confidence: coverage of intervals, in (0.5, 1).
        max_checks: settings that may be checked one after the other, 1 to 3.
        scorer: from an answer and the accepted ones to a score in [0, 1].
    """

    max_loss: float = 0.01
    recipes: Sequence[Recipe] | None = None
    budgets: Sequence[float] | None = None
    seed: int = 0
    check_share: float = 0.5
    confidence: float = 0.95
    max_checks: int = MOST_CHECKS
    scorer: Scorer = exact_match

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss < 1:
            raise ValueError(
                f"max_loss must be in [0, 1), a share: 0.01 is one percent; got {self.max_loss}"
            )
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0.5, 1), got {self.confidence}")
        if not 1 <= self.max_checks <= MOST_CHECKS:
            raise ValueError(f"max_checks must be in 1..{MOST_CHECKS}, got {self.max_checks}")
        if self.recipes is not None:
            checked_recipes(self.recipes)


def tune(
    model: Any,
    processor: Any,
    rows: Iterable[Row | Mapping[str, Any]],
    *,
    max_loss: float = 0.01,
    recipes: Sequence[Recipe] | None = None,
    budgets: Sequence[float] | None = None,
    seed: int = 0,
    check_share: float = 0.5,
    confidence: float = 0.95,
    max_checks: int = MOST_CHECKS,
    scorer: Scorer | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    prompt: Prompt = chat_prompt,
    limits: ImageLimits | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    tell: Listener | None = None,
) -> TuneResult:
    """Find the smallest budget, and options, within a loss of quality on your own questions.

    The rows are split by picture. One part is searched on, the other is looked at only to check
    what was found, so that the reported loss is not the one that was selected for.

    Args:
        model: a LLaVA, wrapped or not; it is left as it was.
        processor: its processor.
        rows: questions with pictures, see `read_rows`; with answers to all of them or to none.
        max_loss: largest loss, as a share of the unreduced model's accuracy (0.01 is 1 %);
            without answers 1 - agreement with the unreduced model's greedy answers.
        recipes: options to try; None for `default_recipes()`.
        budgets: token counts (whole numbers) or fractions; None for eight from 3/4 to 1/16.
        seed: of the split.
        check_share: share of the pictures to check on.
        confidence: coverage of the intervals.
        max_checks: settings that may be checked one after the other, each at a wider interval.
        scorer: from an answer and the accepted ones to a score in [0, 1]; None is `exact_match`.
        batch_size: questions at a time.
        max_new_tokens: longest answer.
        prompt: from processor, question and number of pictures to the text of a prompt.
        limits: what pictures are accepted.
        folder: where finished cells are kept; None keeps nothing.
        resume: go on with the cells in `folder`.
        tell: called with every `Event`.

    Returns:
        What was found. `result.save(folder)` writes config, report and plot.

    Raises:
        ValueError: an option out of range, too few pictures, a broken picture (named by row), a
            folder that holds other results.
        TypeError: not a supported model.
    """
    plan = Plan(
        max_loss, recipes, budgets, seed, check_share, confidence, max_checks, scorer or exact_match
    )
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if folder is not None:
        check_folder(folder, resume=resume)
    listener = tell or _silent
    given, limits = as_rows(rows), limits or ImageLimits()
    has_answers(given)
    listener(Event("start", "reading pictures", len(given)))
    digests = picture_digests(given, limits, lambda count: listener(Event("advance", count=count)))
    asker = ModelAsker(
        model,
        processor,
        given,
        digests,
        prompt=prompt,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limits=limits,
    )
    return run(asker, given, digests, plan, folder=folder, resume=resume, tell=listener)


def run(
    asker: Asker,
    rows: Sequence[Row],
    digests: Sequence[tuple[str, ...]],
    plan: Plan,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    tell: Listener | None = None,
) -> TuneResult:
    """The same for anything that can be asked.

    Args:
        asker: answers rows under a config.
        rows: the questions.
        digests: for every row its pictures, see `picture_digests`.
        plan: what is wanted.
        folder: see `tune`.
        resume: see `tune`.
        tell: see `tune`.

    Raises:
        ValueError: see `tune`.
    """
    parts = split_by_image(digests, seed=plan.seed, check_share=plan.check_share)
    counts = token_counts(asker.tokens_in, plan.budgets)
    facts = {**asker.facts(), "seed": plan.seed, "check_share": plan.check_share}
    identity = {key: value for key, value in facts.items() if key not in _NOT_DECISIVE}
    journal = Journal(folder, identity, resume=resume)
    answered = has_answers(rows)
    return _Run(
        Bench(
            asker,
            rows,
            parts,
            journal,
            scorer=plan.scorer,
            answered=answered,
            confidence=plan.confidence,
            tell=tell or _silent,
        ),
        plan,
        counts,
        facts,
    ).result()


class _Run:
    """One run with everything it needs."""

    def __init__(
        self, bench: Bench, plan: Plan, counts: Sequence[int], facts: dict[str, Any]
    ) -> None:
        self.bench = bench
        self.plan = plan
        self.counts = counts
        self.facts = facts
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []

    def result(self) -> TuneResult:
        """Search, check and say."""
        plan, asker = self.plan, self.bench.asker
        recipes = list(plan.recipes) if plan.recipes is not None else default_recipes()
        self._note_data(self.bench.parts)
        self._note_accuracy()
        cells = walk_down(
            recipes, self.counts, self._searched, max_loss=plan.max_loss, spare=plan.max_checks - 1
        )
        self._refuse_unusable(recipes, cells)
        checks = self._checks(admissible(cells, plan.max_loss))
        verdict, statement = judge(
            cells, checks, max_loss=plan.max_loss, answered=self.bench.answered
        )
        config = UNREDUCED if verdict == "unreduced" else checks[-1].config
        return TuneResult(
            config=config,
            verdict=verdict,
            statement=statement,
            max_loss=plan.max_loss,
            tokens=asker.tokens(config),
            tokens_in=asker.tokens_in,
            cells=tuple(cells),
            checks=tuple(checks),
            answered=self.bench.answered,
            savings=asker.savings(config),
            skipped=self.skipped,
            notes=tuple(self.notes),
            facts=self._all_facts(),
        )

    def _checks(self, candidates: Sequence[Cell]) -> list[Cell]:
        """Check the smallest budget, and while one fails the next larger admissible one."""
        checks: list[Cell] = []
        for candidate in candidates[: self.plan.max_checks]:
            checks.append(self.bench.cell("check", candidate.recipe, candidate.config))
            if within(checks[-1].loss.value, self.plan.max_loss):
                break
        return checks

    def _searched(self, recipe: Recipe, tokens: int) -> Cell | None:
        """A cell of the search part, None where the model cannot have the setting."""
        config = recipe.config(tokens)
        try:
            self.bench.asker.tokens(config)
        except ValueError as error:
            self._skip(recipe, tokens, error)
            return None
        try:
            return self.bench.cell("search", recipe, config)
        except ImageError:
            raise
        except ValueError as error:
            # What the user asked for by name must work; of the default recipes some need parts
            # that not every tower has.
            if self.plan.recipes is not None:
                raise
            self._skip(recipe, tokens, error)
            return None

    def _skip(self, recipe: Recipe, tokens: int, error: ValueError) -> None:
        self.skipped[recipe.name] = f"from {tokens} tokens on: {error}"
        self.bench.tell(Event("note", f"{recipe.name} is skipped from {tokens} tokens on: {error}"))

    def _refuse_unusable(self, recipes: Sequence[Recipe], cells: Sequence[Cell]) -> None:
        """A recipe the user named that fits no budget, or no recipe at all, is an error."""
        measured = {cell.recipe.name for cell in cells}
        for recipe in recipes if self.plan.recipes is not None else recipes[:1]:
            if recipe.name not in measured and recipe.name in self.skipped:
                raise ValueError(f"recipe {recipe.name!r}: {self.skipped[recipe.name]}")

    def _note_data(self, parts: Parts) -> None:
        for name, rows in (("search", parts.search), ("check", parts.check)):
            images, questions = parts.images(rows), len(rows)
            if images < FEW:
                self._note(
                    f"the {name} part has {images} images; with fewer than {FEW} its intervals "
                    "are wide and rough"
                )
            if name == "check" and questions * self.plan.max_loss < 1:
                self._note(
                    f"one of the {questions} questions of the check part is already "
                    f"{100 / questions:.1f} %, more than the target of "
                    f"{100 * self.plan.max_loss:.3g} %"
                )

    def _note_accuracy(self) -> None:
        score = self.bench.unreduced_score("search")
        if score < _POOR:
            self._note(
                f"the unreduced model answers only {100 * score:.0f} % of the search part right; "
                "do the prompt and the form of the answers fit?"
            )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.bench.tell(Event("note", text))

    def _all_facts(self) -> dict[str, Any]:
        parts, plan = self.bench.parts, self.plan
        scorer = getattr(plan.scorer, "__qualname__", type(plan.scorer).__name__)
        return {
            **self.facts,
            "search_questions": len(parts.search),
            "search_images": parts.images(parts.search),
            "check_questions": len(parts.check),
            "check_images": parts.images(parts.check),
            "confidence": plan.confidence,
            "max_checks": plan.max_checks,
            "scorer": scorer,
        }


def _silent(event: Event) -> None:
    del event
