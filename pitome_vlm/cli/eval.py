"""`pitome-vlm eval`: a sweep over methods and budgets on lmms-eval tasks, and its report.

Checks the options before anything is loaded; `eval_run.py` measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import require, whole_number
from . import options as o
from .eval_run import Sweep, report
from .session import is_first_process, model_path
from .terminal import loading_libraries, say

if TYPE_CHECKING:
    from ..measure.evaluate.suites import Suite

EXIT_FAILED_CELL = 1
_what, _how = o.panel("What is measured"), o.panel("How it is measured")


SuiteName = Annotated[
    str | None,
    _what(
        "Suite of tasks: demo, quick, llava15-paper, llava15-peers, or an lmms-eval config file.",
        "NAME",
    ),
]
Tasks = Annotated[str | None, _what("lmms-eval tasks, in place of a suite.", "A,B")]
ModelName = Annotated[
    str | None,
    o.model_option(
        "Folder or Hub name of a checkpoint, or `demo`; default: the suite's model.", _what
    ),
]
Algorithms = Annotated[
    str | None,
    _what(
        "Methods to compare: names of algorithms, `paper`, `released`, or "
        "NAME:option=value; default: the suite's. The unreduced model is always measured.",
        "NAME,NAME",
    ),
]
Tokens = Annotated[
    str | None,
    _what(
        "Visual tokens per image to compare, for instance 192,128,64; default: the suite's.", "N,N"
    ),
]
Limit = Annotated[int | None, _what("Use only the first N questions of every task.", "N")]
Output = Annotated[Path, o.output_option("Folder for results, report and plots.")]
BatchSize = Annotated[int | None, _how("Questions per batch.", "N")]
ModelArgs = Annotated[
    str, _how("Arguments of the model, for instance dtype=float16,peft=PATH.", "K=V,K=V")
]
GenKwargs = Annotated[str | None, _how("Generation options in place of the tasks' own.", "K=V,K=V")]
IncludePath = Annotated[Path | None, _how("Folder with tasks in addition to lmms-eval's.", "DIR")]
Timing = Annotated[
    bool, _how("Whether to measure the time to the first token.", None, "--timing/--no-timing")
]
ShowPublished = Annotated[
    bool,
    o.plain(
        "Whether to include published numbers in the report.", None, "--published/--no-published"
    ),
]


def evaluate(
    suite: SuiteName = None,
    tasks: Tasks = None,
    model: ModelName = None,
    algorithms: Algorithms = None,
    tokens: Tokens = None,
    limit: Limit = None,
    output: Output = Path("pitome-eval"),
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    batch_size: BatchSize = None,
    model_args: ModelArgs = "",
    gen_kwargs: GenKwargs = None,
    include_path: IncludePath = None,
    timing: Timing = True,
    plot: o.Plot = True,
    published: ShowPublished = True,
    verbose: o.Verbose = False,
) -> None:
    """Measure accuracy, cost and time of token reduction on lmms-eval tasks; write a report.

    Every finished cell (task, method, budget) is kept: after a crash, --resume continues. Exit
    code 1 if a cell failed. Needs the extras eval and viz: `pip install ".[eval,viz]"` in a clone
    of the repository.

    Example: `pitome-vlm eval --suite demo --algorithms pitome,tome --tokens 72,36 --limit 200`
    """
    o.check_run_flags(resume, overwrite, output)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"include_path must be a folder, got {include_path}")
    from ..measure.evaluate import suites
    from ..measure.evaluate.records import Folder

    base = _suite(suite, tasks)
    require("lmms_eval", "eval", "eval")
    if plot:
        require("matplotlib", "viz", "the plot of eval (--no-plot leaves it out)")
    loading_libraries()
    chosen = model or base.pretrained
    if chosen is None:
        raise ValueError("model must be given, for instance --model llava-hf/llava-1.5-7b-hf")
    given = suites.parse_model_args(model_args)
    suites.check_model_args(given)
    sweep = Sweep(
        model=model_path(chosen),
        model_args={**dict(base.model_args), **given},
        batch_size=whole_number(
            "batch_size", base.batch_size if batch_size is None else batch_size, 1
        ),
        gen_kwargs=gen_kwargs or base.gen_kwargs,
        tasks=base.tasks,
        cells=suites.cells(base.tasks, _settings(base, algorithms, tokens)),
        limit=limit,
        folder=Folder(output),
        include_path=include_path,
        verbose=verbose,
    )
    sweep.plan(resume=resume, overwrite=overwrite)
    failures = sweep.measure(timing) if sweep.work(timing) else {}
    if not is_first_process():
        return
    report(sweep, failures, plots=plot, published=published)
    if failures:
        names = ", ".join(cell.name for cell in failures)
        say(f"{len(failures)} of {len(sweep.cells)} cells failed: {names}")
        say(f"tracebacks are in {output / 'failed'}; --resume tries these cells again")
        raise typer.Exit(EXIT_FAILED_CELL)


def _suite(suite: str | None, tasks: str | None) -> Suite:
    """The suite by name or from tasks; a missing lmms-eval is said at once."""
    from ..measure.evaluate import suites

    try:
        if (suite is None) == (tasks is None):
            raise ValueError("give either --suite or --tasks")
        if suite is not None:
            return suites.read_suite(suite)
        return suites.Suite("", tuple(o.words("tasks", tasks or "")), ())
    except ValueError as error:
        try:
            require("lmms_eval", "eval", "eval")
        except ImportError as missing:
            raise ValueError(f"{error}; also, {missing}") from error
        raise


def _settings(suite: Suite, algorithms: str | None, tokens: str | None) -> tuple[Any, ...]:
    from ..measure.evaluate import suites

    if algorithms is None and tokens is None and suite.settings:
        return suite.settings
    reduced = [s for s in suite.settings if s.method != suites.BASELINE]
    methods = o.words("algorithms", algorithms) if algorithms is not None else []
    methods = methods or list(dict.fromkeys(s.method for s in reduced)) or ["pitome_plus"]
    if tokens is not None:
        return suites.grid(methods, o.counts("tokens", tokens))
    return suites.grid(methods, [s.config.tokens for s in reduced if s.config.tokens])
