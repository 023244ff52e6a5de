"""`pitome-vlm tune`: the smallest budget within a loss of quality, on the user's own questions.

Knows: its options, what is refused before anything is loaded, and how progress looks. Does not
know: how anything is searched, measured or worded (`pitome_vlm.measure.tune`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .terminal import err, one_line, quiet, say, write

if TYPE_CHECKING:
    from ..measure.tune import Event, Recipe, Row, TuneResult

DEMO_SPLIT = "val"
EXIT_INTERRUPTED = 130
_WHAT = "What is tuned"
_HOW = "How"

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FILE",
        help='JSONL with {"image": PATH, "question": TEXT, "answer": TEXT} per line (answers may '
        "be left out of all), or `demo` for the bundled validation questions.",
        rich_help_panel=_WHAT,
    ),
]
MaxLoss = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Largest loss, as a share of the unreduced accuracy; 0.01 is 1 %.",
        rich_help_panel=_WHAT,
    ),
]
IgnoreAnswers = Annotated[
    bool,
    typer.Option(
        "--ignore-answers",
        help="Compare with the unreduced model's answers instead of those in the data.",
        rich_help_panel=_WHAT,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", help="First questions of the data only.", rich_help_panel=_WHAT),
]
Algorithms = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="For instance pitome,tome or NAME:field=value; default: all but the baselines.",
        rich_help_panel=_WHAT,
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="N,N",
        help="Visual tokens per image to try; default: eight from 3/4 to 1/16.",
        rich_help_panel=_WHAT,
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything is written.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in the output folder.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the split by picture.", rich_help_panel=_HOW)]
Confidence = Annotated[
    float, typer.Option(metavar="SHARE", help="Coverage of intervals.", rich_help_panel=_HOW)
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", help="Questions at a time.", rich_help_panel=_HOW)
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_HOW)
]
Suffix = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="Put after every question, for instance 'Answer the question using a single word or "
        "phrase.'",
        rich_help_panel=_HOW,
    ),
]
Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw a plot (matplotlib).")]


def tune(
    model: o.Model,
    data: Data,
    max_loss: MaxLoss = 0.01,
    output: Output = Path("pitome-tune"),
    resume: Resume = False,
    limit: Limit = None,
    ignore_answers: IgnoreAnswers = False,
    algorithms: Algorithms = None,
    tokens: Budgets = None,
    seed: Seed = 0,
    confidence: Confidence = 0.95,
    batch_size: BatchSize = 8,
    max_new_tokens: MaxNewTokens = 16,
    suffix: Suffix = "",
    plot: Plot = True,
    load_4bit: o.Load4Bit = False,
    load_8bit: o.Load8Bit = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Find the smallest budget, and options, within a loss of quality on your own questions.

    One half of the pictures is searched on, the other half only checks what was found. Writes
    pitome_config.json (for `wrap` and `load`), a report and a plot. Finished settings are kept:
    after Ctrl-C or a crash `--resume` goes on.

    Example: `pitome-vlm tune --model demo --data demo --limit 240 --output tuned`
    """
    del debug  # read by the command group
    recipes, budgets = _recipes(algorithms), _budgets(tokens)
    with quiet(verbose):
        from ..measure.plots import check_matplotlib
        from ..measure.tune import Plan
        from ..measure.tune.tuner import check_folder

    Plan(max_loss, recipes, budgets, seed, confidence=confidence)
    check_folder(output, resume=resume)
    if plot:
        check_matplotlib()
    rows = _rows(data, limit, ignore_answers)
    from .session import DEMO, load_model

    # The bundled weights are stored in half precision, which a CPU is slow at.
    chosen = "float32" if model == DEMO and dtype is None else dtype
    loading = o.LoadOptions(model, load_4bit, load_8bit, chosen, device)
    vlm, processor = load_model(loading, {}, verbose=verbose)
    with quiet(verbose), _progress() as tell:
        from ..measure import tune as tuning

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
                tell=tell,
            )
        except KeyboardInterrupt:
            say(f"interrupted; what is finished is in {output}, --resume goes on")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        files = result.save(output, plot=plot)
    _show(result, files)


def _recipes(text: str | None) -> list[Recipe] | None:
    """The grammar of `eval --algorithms`, without a budget."""
    if text is None:
        return None
    from ..measure.evaluate.suites import method_setting
    from ..measure.tune import Recipe

    recipes = []
    for name in _words("algorithms", text):
        options = method_setting(name, 1).config.options()
        options.pop("tokens")
        recipes.append(Recipe(name, options))
    return recipes


def _budgets(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = _words("tokens", text)
    for word in words:
        if not word.isascii() or not word.isdigit() or int(word) < 1:
            raise ValueError(f"tokens must be whole numbers of at least 1, got {word!r}")
    return [int(word) for word in words]


def _words(field: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(f"{field} must be separated by single commas, got {text!r}")
    return words


def _rows(data: str, limit: int | None, ignore_answers: bool) -> list[Row]:
    import dataclasses

    from ..measure.tune import read_rows

    demo = data == "demo" and not Path(data).is_file()
    rows = _demo_rows(limit) if demo else read_rows(data, limit=limit)
    return [dataclasses.replace(row, answers=()) for row in rows] if ignore_answers else rows


def _demo_rows(limit: int | None) -> list[Row]:
    from ..demo import load_split, scene_image
    from ..measure.tune import Row

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    samples = load_split(DEMO_SPLIT, limit)
    pictures = {s.scene_id: scene_image(s.scene_id, DEMO_SPLIT) for s in samples}
    return [
        Row((pictures[s.scene_id],), s.question, (s.answer,), f"demo question {number}")
        for number, s in enumerate(samples, 1)
    ]


def _prompt(suffix: str) -> Any:
    from .engine import build_prompt

    def prompt(processor: Any, question: str, images: int) -> str:
        asked = f"{question}\n{suffix}" if suffix else question
        return build_prompt(processor, [(asked, None)], images)

    return prompt


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar for what is running, and a line for everything that is finished."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Without a terminal the lines of finished settings are all there is.
    hidden = not err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=hidden) as progress:
        running = progress.add_task("", total=None, visible=False)

        def tell(event: Event) -> None:
            if event.kind == "start":
                progress.reset(running, total=event.count, description=event.text, visible=True)
            elif event.kind == "advance":
                progress.advance(running, event.count)
            elif event.kind == "note":
                say(f"note: {one_line(event.text)}")
            elif event.cell is not None:
                say(_line(event))

        yield tell


def _line(event: Event) -> str:
    from ..measure.tune.verdict import percent

    cell = event.cell
    assert cell is not None
    loss = cell.loss
    took = "kept from before" if event.kept else f"{cell.seconds:.0f} s"
    return (
        f"{cell.part}: {cell.recipe.name}, {cell.tokens} tokens: loss {percent(loss.value)} "
        f"({100 * loss.low:.1f} to {percent(loss.high)}), {took}"
    )


def _show(result: TuneResult, files: list[Path]) -> None:
    write(f"{result.config.summary()}")
    if result.savings:
        write(result.savings)
    write(result.statement)
    for path in files:
        write(str(path))
