"""`pitome-vlm eval`: a sweep over methods and budgets on lmms-eval tasks, and its report.

Knows: its options, and what is refused before anything is loaded. Does not know: how a sweep is
carried through (`eval_run.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import require
from . import options as o
from .eval_run import Plan, Sweep, circumstances, is_first, report
from .terminal import say

if TYPE_CHECKING:
    from ..measure.evaluate.records import Folder
    from ..measure.evaluate.suites import Suite

EXIT_FAILED_CELL = 1
_WHAT = "What is measured"
_HOW = "How"


SuiteName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="demo, quick, llava15-paper, llava15-peers, or an lmms-eval --config file.",
        rich_help_panel=_WHAT,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="lmms-eval tasks instead.", rich_help_panel=_WHAT),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Folder or Hub name of a LLaVA, or `demo`; default: the suite's.",
        rich_help_panel=_WHAT,
    ),
]
Algorithms = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="pitome_plus, paper, released, tome, ..., or NAME:field=value; default: the suite's. "
        "The unreduced model is always measured.",
        rich_help_panel=_WHAT,
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        metavar="N,N",
        help="Visual tokens per image, for instance 192,128,64; default: the suite's.",
        rich_help_panel=_WHAT,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", help="First questions of every task.", rich_help_panel=_WHAT),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything is written.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in the output folder.")]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", help="Questions at a time.", rich_help_panel=_HOW)
]
ModelArgs = Annotated[
    str,
    typer.Option(
        metavar="K=V,K=V",
        help="For instance dtype=float16,load_in_4bit=True,peft=PATH.",
        rich_help_panel=_HOW,
    ),
]
GenKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="K=V,K=V", help="Replace the tasks' generation options.", rich_help_panel=_HOW
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="More tasks beside lmms-eval's own.", rich_help_panel=_HOW),
]
Timing = Annotated[
    bool, typer.Option("--timing/--no-timing", help="Time the first token.", rich_help_panel=_HOW)
]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots (matplotlib).")]
ShowPublished = Annotated[
    bool, typer.Option("--published/--no-published", help="Lay published numbers beside.")
]


def evaluate(
    suite: SuiteName = None,
    tasks: Tasks = None,
    model: ModelName = None,
    algorithms: Algorithms = None,
    tokens: Tokens = None,
    limit: Limit = None,
    output: Output = Path("pitome-eval"),
    resume: Resume = False,
    batch_size: BatchSize = None,
    model_args: ModelArgs = "",
    gen_kwargs: GenKwargs = None,
    include_path: IncludePath = None,
    timing: Timing = True,
    plots: Plots = True,
    published: ShowPublished = True,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure accuracy, cost and time of token reduction on lmms-eval tasks; write a report.

    Every finished cell (task, method, budget) is kept: after a crash `--resume` goes on. Exit
    code 1 if a cell failed. Needs `pip install "pitome-vlm[eval,viz]"`.

    Example: `pitome-vlm eval --suite demo --algorithms pitome,tome --tokens 72,36 --limit 200`
    """
    del debug  # read by the command group
    folder = _checked(output, plots, limit, include_path)
    plan = _plan(suite, tasks, model, algorithms, tokens, batch_size, model_args, gen_kwargs)
    run = circumstances(plan, limit)
    from ..measure.evaluate.sweep import pending

    todo = pending(plan.cells, folder, run, resume=resume)
    sweep = Sweep(plan, folder, run, todo, include_path, verbose)
    failures = sweep.measure(timing) if sweep.work(timing) else {}
    if not is_first():
        return
    report(sweep, failures, plots=plots, published=published)
    if failures:
        names = ", ".join(cell.name for cell in failures)
        say(f"{len(failures)} of {len(plan.cells)} cells failed: {names}")
        say(f"tracebacks: {folder.root / 'failed'}; --resume tries them again")
        raise typer.Exit(EXIT_FAILED_CELL)


def _checked(output: Path, plots: bool, limit: int | None, include_path: Path | None) -> Folder:
    """The output folder, after everything that can be refused without a plan."""
    require("lmms_eval", "eval", "eval")
    if plots:
        from ..measure.evaluate.plots import check_matplotlib

        check_matplotlib()
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"include_path must be a folder, got {include_path}")
    from ..measure.evaluate.records import Folder

    return Folder(output)


def _plan(
    suite: str | None,
    tasks: str | None,
    model: str | None,
    algorithms: str | None,
    tokens: str | None,
    batch_size: int | None,
    model_args: str,
    gen_kwargs: str | None,
) -> Plan:
    from ..measure.evaluate import suites
    from .session import model_path

    if (suite is None) == (tasks is None):
        raise ValueError("give one of --suite and --tasks")
    if suite is not None:
        base = suites.read_suite(suite)
    else:
        base = suites.Suite("", tuple(_names("tasks", tasks or "")), ())
    chosen = model or base.pretrained
    if chosen is None:
        raise ValueError("model must be given, for instance --model llava-hf/llava-1.5-7b-hf")
    given = suites.parse_model_args(model_args)
    suites.check_model_args(given)
    cells = suites.cells(base.tasks, _settings(base, algorithms, tokens))
    size = base.batch_size if batch_size is None else suites.check_batch_size(batch_size)
    arguments = {**dict(base.model_args), **given}
    path = model_path(chosen)
    return Plan(path, arguments, size, gen_kwargs or base.gen_kwargs, base.tasks, cells)


def _settings(suite: Suite, algorithms: str | None, tokens: str | None) -> tuple[Any, ...]:
    from ..measure.evaluate import suites

    if algorithms is None and tokens is None and suite.settings:
        return suite.settings
    reduced = [s for s in suite.settings if s.method != suites.BASELINE]
    methods = _names("algorithms", algorithms) if algorithms is not None else []
    methods = methods or list(dict.fromkeys(s.method for s in reduced)) or ["pitome_plus"]
    if tokens is not None:
        return suites.grid(methods, [_count(word) for word in _names("tokens", tokens)])
    return suites.grid(methods, [s.config.tokens for s in reduced if s.config.tokens])


def _names(field: str, text: str) -> list[str]:
    names = [word.strip() for word in text.split(",")]
    if not all(names):
        raise ValueError(f"{field} must be separated by single commas, got {text!r}")
    return names


def _count(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise ValueError(f"tokens must be whole numbers of at least 1, got {word!r}")
    return int(word)
