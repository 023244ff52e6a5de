"""`tune`: split the questions, search on one part, check on the other, judge."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...common import whole_number
from ...loading.checkpoints import squeezed
from ...loading.images import ImageError, ImageLimits
from ..asking import question_prompt
from ..store import TUNE_FILES, Store
from .asking import UNREDUCED, Asker, ModelAsker, Prompt
from .cells import Cell, Event, Listener, Measurer
from .comparison import Comparison
from .plan import Plan
from .recipes import Recipe, default_recipes, token_counts
from .report import TuneResult
from .rows import Row, as_rows, has_answers, image_digests
from .search import admissible, walk_down, within
from .split import FEW, Parts, split_by_image
from .verdict import judge

_POOR = 0.1
# Facts that may differ between a run and its resumption.
_NOT_DECISIVE = ("checkpoint", "python")
_MACHINE = ("hardware", "cpu", "cuda", "instructions", "threads", "cores")


def tune(
    model: Any,
    processor: Any,
    rows: Iterable[Row | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    prompt: Prompt = question_prompt,
    limits: ImageLimits | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tell: Listener | None = None,
    **plan: Any,
) -> TuneResult:
    """Find the smallest budget, and options, within a loss of quality on your own questions.

    The rows are split by image. One part is searched on; the other is used only to check what was
    found, so that the reported loss is not the one that was selected for.

    Args:
        model: a LLaVA, wrapped or not; it is left as it was.
        processor: the model's processor.
        rows: questions with images (`read_rows`), with answers to all of them or to none.
        batch_size: questions per batch.
        max_new_tokens: longest answer, in tokens.
        prompt: from processor, question and number of images to the text of a prompt.
        limits: limits on the images that are read.
        folder: where finished cells are kept; None keeps them in memory.
        resume: continue with the cells in `folder`.
        overwrite: delete the cells in `folder` first.
        tell: called with every `Event`.
        **plan: fields of `Plan`: max_loss, recipes, budgets, seed, check_share, confidence,
            max_checks, scorer.

    Returns:
        The result; `result.save(folder)` writes config, report and plot.

    Raises:
        ValueError: an option out of range, too few images, an unreadable image (named by row), or
            a folder with the cells of another run.
        TypeError: not a supported model, or an option that is unknown or of the wrong type.
        FileExistsError: `folder` holds cells or other results, without `resume` or `overwrite`.
    """
    wanted, tell = Plan(**plan), tell or _silent
    whole_number("batch_size", batch_size, 1)
    whole_number("max_new_tokens", max_new_tokens, 1)
    check_folder(folder, resume=resume, overwrite=overwrite)
    given, limits = as_rows(rows), limits or ImageLimits()
    digests = _digests(given, limits, tell)
    asker = ModelAsker(model, processor, given, digests, prompt, batch_size, max_new_tokens, limits)
    return run(
        asker, given, digests, wanted, folder=folder, resume=resume, overwrite=overwrite, tell=tell
    )


def _digests(rows: Sequence[Row], limits: ImageLimits, tell: Listener) -> list[tuple[str, ...]]:
    has_answers(rows)
    tell(Event("start", "reading images", len(rows)))
    return image_digests(rows, limits, lambda count: tell(Event("advance", count=count)))


def check_folder(
    folder: str | os.PathLike[str] | None, *, resume: bool, overwrite: bool = False
) -> None:
    """Refuse, before anything is loaded, a folder that must not be written to; see `tune`."""
    Store(folder).check(resume=resume, overwrite=overwrite, results=TUNE_FILES)


def run(
    asker: Asker,
    rows: Sequence[Row],
    digests: Sequence[tuple[str, ...]],
    plan: Plan,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tell: Listener | None = None,
) -> TuneResult:
    """`tune` for anything that answers rows (`digests`: of the images of every row) under a config.

    Raises:
        ValueError: too few images, or a folder with the cells of another run.
        FileExistsError: `folder` holds cells or other results, without `resume` or `overwrite`.
    """
    parts = split_by_image(digests, seed=plan.seed, check_share=plan.check_share)
    counts = token_counts(asker.tokens_in, plan.budgets)
    facts = {**asker.facts(), "seed": plan.seed, "check_share": plan.check_share}
    undecisive = (*_NOT_DECISIVE, *_MACHINE)
    identity = {key: value for key, value in facts.items() if key not in undecisive}
    check_folder(folder, resume=resume, overwrite=overwrite)
    store = Store(folder, identity)
    if overwrite:
        store.clear()
    for key in store:
        store.get(key)  # refuses the cells of another run
    answered = has_answers(rows)
    return _Run(
        Measurer(
            asker,
            rows,
            parts,
            store,
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
    """One run of a plan."""

    def __init__(
        self, measurer: Measurer, plan: Plan, counts: Sequence[int], facts: dict[str, Any]
    ) -> None:
        self.measurer = measurer
        self.plan = plan
        self.counts = counts
        self.facts = facts
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []

    def result(self) -> TuneResult:
        """Search, check and judge."""
        plan, asker = self.plan, self.measurer.asker
        recipes = list(plan.recipes) if plan.recipes is not None else default_recipes()
        # One more: the comparison with smaller images.
        most = len(recipes) * len(self.counts) + plan.max_checks + 1
        self.measurer.tell(Event("plan", count=most))
        if asker.counted_per != "image":
            self._note(
                f"tokens are counted per {asker.counted_per}; every image keeps the same share of "
                "its own"
            )
        self._note_data(self.measurer.parts)
        self._note_accuracy()
        cells = walk_down(
            recipes, self.counts, self._searched, max_loss=plan.max_loss, spare=plan.max_checks - 1
        )
        self._refuse_unusable(recipes, cells)
        checks = self._checks(admissible(cells, plan.max_loss))
        verdict, statement = judge(
            cells, checks, max_loss=plan.max_loss, answered=self.measurer.answered
        )
        config = UNREDUCED if verdict == "unreduced" else checks[-1].config
        smaller, against = self._against_smaller(None if config is UNREDUCED else checks[-1])
        return TuneResult(
            config=config,
            verdict=verdict,
            statement=statement,
            smaller=smaller,
            against_smaller=against,
            max_loss=plan.max_loss,
            tokens=asker.tokens(config),
            tokens_in=asker.tokens_in,
            cells=tuple(cells),
            checks=tuple(checks),
            answered=self.measurer.answered,
            savings=asker.savings(config),
            skipped=self.skipped,
            notes=tuple(self.notes),
            facts=self._all_facts(),
        )

    def _against_smaller(self, winner: Cell | None) -> tuple[Comparison | None, str]:
        """The comparison with smaller images and what it says, or why there is none."""
        if winner is None:
            return None, ""
        try:
            found = self.measurer.against_smaller(winner)
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            # Whatever a model says to sizes it was not made for, the search is worth its result.
            return None, f"Not compared with smaller images: {squeezed(error)}."
        return found, found.statement(answered=self.measurer.answered)

    def _checks(self, candidates: Sequence[Cell]) -> list[Cell]:
        """Check the smallest admissible budget, then larger ones while checks fail."""
        checks: list[Cell] = []
        for candidate in candidates[: self.plan.max_checks]:
            checks.append(self.measurer.cell("check", candidate.recipe, candidate.config))
            if within(checks[-1].loss.value, self.plan.max_loss):
                break
        return checks

    def _searched(self, recipe: Recipe, tokens: int) -> Cell | None:
        """A cell of the search part, None where the setting does not fit the model."""
        config = recipe.config(tokens)
        try:
            self.measurer.asker.tokens(config)
        except ValueError as error:
            self._skip(recipe, tokens, error)
            return None
        try:
            return self.measurer.cell("search", recipe, config)
        except ImageError:
            raise
        except ValueError as error:
            # Recipes named by the user must work; some default recipes need parts that not every
            # tower has.
            if self.plan.recipes is not None:
                raise
            self._skip(recipe, tokens, error)
            return None

    def _skip(self, recipe: Recipe, tokens: int, error: ValueError) -> None:
        self.skipped[recipe.name] = f"from {tokens} tokens on: {error}"
        self.measurer.tell(
            Event("note", f"{recipe.name} is skipped from {tokens} tokens on: {error}")
        )

    def _refuse_unusable(self, recipes: Sequence[Recipe], cells: Sequence[Cell]) -> None:
        """Raise for a recipe named by the user that fits no budget, or if no recipe fits one."""
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
        score = self.measurer.unreduced_score("search")
        if score < _POOR:
            self._note(
                f"the unreduced model answers only {100 * score:.0f} % of the search part right; "
                "check the prompt and the form of the answers"
            )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.measurer.tell(Event("note", text))

    def _all_facts(self) -> dict[str, Any]:
        parts, plan = self.measurer.parts, self.plan
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
