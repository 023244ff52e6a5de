"""`pitome-vlm tune`: the smallest budget within a loss of quality, on the user's own questions.

Checks the options before anything is loaded and shows progress; how budgets are searched, measured
and reported is left to `pitome_vlm.measure.tune`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import require
from . import options as o
from .session import DEMO
from .terminal import EXIT_INTERRUPTED, duration, one_line, progress_bars, quiet, say, write

if TYPE_CHECKING:
    from ..measure.tune import Event, Recipe, Row, TuneResult

DEMO_SPLIT = "val"
_what, _how = o.panel("What is tuned"), o.panel("How it is tuned")

Data = Annotated[
    str,
    _what(
        'JSONL file with {"image": PATH, "question": TEXT, "answer": TEXT} on every line '
        "(either all lines have an answer or none), or `demo` for the bundled questions.",
        "FILE",
        "--data",
    ),
]
MaxLoss = Annotated[
    float,
    _what(
        "Largest acceptable loss of accuracy, relative to the unreduced model; 0.01 is 1 %.",
        "SHARE",
    ),
]
IgnoreAnswers = Annotated[
    bool,
    _what(
        "Compare with the unreduced model's answers instead of the answers in the data.",
        None,
        "--ignore-answers",
    ),
]
Limit = Annotated[int | None, _what("Use only the first N questions of the data.", "N")]
Algorithms = Annotated[
    str | None,
    _what(
        "Algorithms to try, for instance pitome,tome or NAME:option=value; default: all but "
        "the baselines.",
        "NAME,NAME",
    ),
]
Budgets = Annotated[
    str | None,
    _what("Visual tokens per image to try; default: eight from 3/4 to 1/16.", "N,N", "--tokens"),
]
Output = Annotated[Path, o.output_option("Folder for pitome_config.json, report and results.")]
Seed = Annotated[
    int, _how("Random seed for splitting images into search and check halves.", "N", min=0)
]
Confidence = Annotated[float, _how("Confidence level of the intervals.", "SHARE")]
BatchSize = Annotated[int, _how("Questions per batch.", "N")]
MaxNewTokens = Annotated[int, _how("Longest answer in tokens.", "N", min=1)]
Suffix = Annotated[
    str,
    _how(
        "Text to add after every question, for instance 'Answer the question using a single "
        "word or phrase.'",
        "TEXT",
    ),
]


def tune(
    model: o.Model,
    data: Data,
    max_loss: MaxLoss = 0.01,
    output: Output = Path("pitome-tune"),
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    limit: Limit = None,
    ignore_answers: IgnoreAnswers = False,
    algorithms: Algorithms = None,
    tokens: Budgets = None,
    seed: Seed = 0,
    confidence: Confidence = 0.95,
    batch_size: BatchSize = 8,
    max_new_tokens: MaxNewTokens = 16,
    suffix: Suffix = "",
    plot: o.Plot = True,
    loading: o.Loading = o.Loading(),
    verbose: o.Verbose = False,
) -> None:
    """Find the smallest budget that keeps accuracy on your own questions.

    One half of the images is used to search, the other half only to check what was found. Writes
    pitome_config.json (for `wrap` and `load`), a report and a plot. Finished settings are kept:
    after Ctrl-C or a crash, --resume continues.

    Example: `pitome-vlm tune --model demo --data demo --limit 240 --output tuned`
    """
    o.check_run_flags(resume, overwrite, output)
    if not (data == DEMO or Path(data).is_file()):
        raise FileNotFoundError(f"data must be a JSONL file, but there is no file {data}")
    budgets = None if tokens is None else o.counts("tokens", tokens)
    if plot:
        require("matplotlib", "viz", "the plot of tune (--no-plot leaves it out)")
    from ..measure.store import TUNE_FILES, Store

    Store(output).check(resume=resume, overwrite=overwrite, results=TUNE_FILES)
    with quiet(verbose):
        from ..measure import tune as tuning
        from .session import load_model

        recipes = None if algorithms is None else _recipes(algorithms)
    tuning.Plan(max_loss, recipes, budgets, seed, confidence=confidence)
    rows = _rows(data, limit, ignore_answers)
    if model == DEMO and loading.dtype is None:
        # The bundled weights are stored in half precision, which CPUs are slow with.
        loading = dataclasses.replace(loading, dtype="float32")
    vlm, processor = load_model(model, verbose=verbose, **vars(loading))
    with quiet(verbose), _progress() as tell:
        try:
            result = tuning.tune(
                vlm,
                processor,
                rows,
                max_loss=max_loss,
                recipes=recipes,
                budgets=budgets,
                seed=seed,
                confidence=confidence,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                prompt=_prompt(suffix),
                folder=output,
                resume=resume,
                overwrite=overwrite,
                tell=tell,
            )
        except KeyboardInterrupt:
            say(f"interrupted; finished settings are in {output}, --resume continues")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        files = result.save(output, plot=plot)
    _show(result, files)


def _recipes(text: str) -> list[Recipe]:
    """The grammar of `eval --algorithms`, without a budget."""
    from ..measure.evaluate.suites import method_setting
    from ..measure.tune import Recipe

    recipes = []
    for name in o.words("algorithms", text):
        options = method_setting(name, 1).config.changed()
        options.pop("tokens")
        recipes.append(Recipe(name, options))
    return recipes


def _rows(data: str, limit: int | None, ignore_answers: bool) -> list[Row]:
    from ..measure.tune import read_rows

    demo = data == DEMO and not Path(data).is_file()
    rows = _demo_rows(limit) if demo else read_rows(data, limit=limit)
    return [dataclasses.replace(row, answers=()) for row in rows] if ignore_answers else rows


def _demo_rows(limit: int | None) -> list[Row]:
    from ..demo import load_split, scene_image
    from ..measure.tune import Row

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    samples = load_split(DEMO_SPLIT, limit)
    images = {s.scene_id: scene_image(s.scene_id, DEMO_SPLIT) for s in samples}
    return [
        Row((images[s.scene_id],), s.question, (s.answer,), f"demo question {number}")
        for number, s in enumerate(samples, 1)
    ]


def _prompt(suffix: str) -> Callable[[Any, str, int], str]:
    from ..measure.asking import question_prompt

    def prompt(processor: Any, question: str, images: int) -> str:
        asked = f"{question}\n{suffix}" if suffix else question
        return question_prompt(processor, asked, images)

    return prompt


@contextmanager
def _progress() -> Iterator[Callable[[Event], None]]:
    """Bars for the whole run and for what is running, and a line for all that is finished."""
    began, seen, measured, most = time.monotonic(), 0, 0, 0
    with progress_bars() as progress:
        whole = progress.add_task("settings, at most", total=None, visible=False)
        running = progress.add_task("", total=None, visible=False)

        def tell(event: Event) -> None:
            nonlocal began, seen, measured, most
            if event.kind == "plan":
                began, most = time.monotonic(), event.count
                progress.update(whole, total=most, visible=True)
            elif event.kind == "start":
                progress.reset(running, total=event.count, description=event.text, visible=True)
            elif event.kind == "advance":
                progress.advance(running, event.count)
            elif event.kind == "note":
                say(f"note: {one_line(event.text)}")
            elif event.cell is not None:
                progress.advance(whole)
                seen += 1
                measured += not event.kept
                spent = time.monotonic() - began
                say(_line(event) + _left(spent, measured, most - seen))

        yield tell


def _left(spent: float, measured: int, cells: int) -> str:
    """The time that so many cells would take, which is the most: the search may end before."""
    if not measured or cells < 1:
        return ""
    return f", at most {duration(spent / measured * cells)} left"


def _line(event: Event) -> str:
    from ..measure.tables import percent, percent_text

    cell = event.cell
    assert cell is not None
    loss = cell.loss
    took = "kept from an earlier run" if event.kept else f"{cell.seconds:.0f} s"
    return (
        f"{cell.part}: {cell.recipe.name}, {cell.tokens} tokens: loss {percent_text(loss.value)} "
        f"({percent(loss.low)} to {percent_text(loss.high)}), {took}"
    )


def _show(result: TuneResult, files: list[Path]) -> None:
    write(result.config.summary())
    if result.savings:
        write(result.savings)
    write(result.statement)
    if result.against_smaller:
        write(result.against_smaller)
    for path in files:
        write(str(path))
