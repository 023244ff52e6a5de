"""`pitome-vlm bench`: will merging help this model, this batch, this length of answer?

Checks the options before minutes are spent and shows the result; `bench_run.py` loads and times.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import check_choice, whole_number, write_text
from ..merge.config import MergeConfig
from . import options as o
from .session import check_output, model_path
from .terminal import EXIT_INTERRUPTED, quiet, say, show_table, write, write_json

if TYPE_CHECKING:
    from ..measure.bench import Budget, Report

# Names of `measure.bench.SHAPES`, whose import is too slow for --help.
SHAPES = (
    *("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "onevision-7b", "qwen2.5-vl-7b"),
    *("tiny", "tiny-next", "tiny-onevision", "tiny-qwen2.5-vl"),
)
RESULTS, REPORT, PLOT = "results.json", "report.md", "bench.png"
_what, _how = o.panel("What is timed"), o.panel("How it is timed")


ModelName = Annotated[
    str | None, o.model_option("Folder or Hub name of a checkpoint, or `demo`.", _what)
]
Shape = Annotated[
    str | None,
    _what(
        f"In place of --model, random weights of a published shape: {', '.join(SHAPES)}; the tiny "
        "ones are for trying things out.",
        "NAME",
    ),
]
Layers = Annotated[
    int | None,
    _what(
        "With --config: build only N layers of the language model and scale their time "
        "up to the full depth.",
        "N",
    ),
]
Fractions = Annotated[str, _what("Fractions of the visual tokens to compare.", "F,F")]
TokenCounts = Annotated[
    str | None, _what("Visual tokens per image to compare, in place of --keep.", "N,N")
]
Algorithms = Annotated[
    str | None, _what("Merging algorithms to compare; default: pitome_plus.", "NAME,NAME")
]
BatchSizes = Annotated[str, _what("Batch sizes in prompts to compare.", "N,N")]
TextTokens = Annotated[int, _what("Text tokens per prompt.", "N")]
AnswerTokens = Annotated[int, _what("Tokens per answer.", "N")]
ImageCount = Annotated[int, _what("Images per prompt.", "N")]
Repeats = Annotated[int, _how("Timed rounds.", "N")]
Warmup = Annotated[int, _how("Untimed warm-up rounds.", "N")]
Memory = Annotated[
    float | None,
    _how("Compute the largest batch for this much memory; default: that of the device.", "GIB"),
]
MaxBatch = Annotated[
    bool,
    _how("On a GPU: find the largest batch by trying it out, and time it.", None, "--max-batch"),
]
CheckFlops = Annotated[
    bool, _how("Compare the computed FLOPs with those that PyTorch counts.", None, "--check-flops")
]
Threads = Annotated[int | None, _how("CPU threads.", "N")]
Output = Annotated[
    Path | None,
    o.output_option("Folder for report.md, results.json and bench.png; default: write no files."),
]


def bench(
    model: ModelName = None,
    config: Shape = None,
    layers: Layers = None,
    keep: Fractions = "0.5,0.25,0.11",
    tokens: TokenCounts = None,
    algorithms: Algorithms = None,
    batch: BatchSizes = "1",
    text_tokens: TextTokens = 64,
    answer_tokens: AnswerTokens = 32,
    images: ImageCount = 1,
    image_size: o.ImageSize = None,
    repeats: Repeats = 20,
    warmup: Warmup = 3,
    memory: Memory = None,
    max_batch: MaxBatch = False,
    check_flops: CheckFlops = False,
    threads: Threads = None,
    loading: o.Loading = o.Loading(),
    output: Output = None,
    overwrite: o.Overwrite = False,
    plot: o.Plot = True,
    as_json: o.AsJson = False,
    verbose: o.Verbose = False,
) -> None:
    """Time tower, merging, prefill and decoding with and without merging, in turns.

    Of an encoder on its own (CLIP, ViT, DINO ...) only the encoder is timed, on noise.

    Every budget is timed once per round, the unmerged model included; tables show medians in
    milliseconds. "pays to" is the longest answer, in tokens, that is still at least 1.1 times
    faster; "from 80" there means answers of 80 tokens or more.

    Example: `pitome-vlm bench --config llava-1.5-7b --layers 4 --batch 1,4`
    """
    quantised = loading.load_4bit or loading.load_8bit
    _check(model, config, layers, quantised, max_batch, memory)
    size = o.image_size_of(image_size)
    _check_numbers(repeats, warmup, memory, threads)
    if output is not None:
        plotted = "bench" if plot else ""
        check_output(output, (RESULTS, REPORT, PLOT), overwrite=overwrite, plot=plotted)
    with quiet(verbose):
        from ..loading.encoders import is_encoder
        from ..measure.bench import Case, configuration
        from . import bench_run as run

        if config is not None:
            configuration(config, layers=layers)
        budgets = _budgets(keep, tokens, algorithms)
        sizes = o.counts("batch", batch)
        if model is not None and is_encoder(model_path(model)):
            _encoders(
                run.load_checkpoint(model, threads, loading).model,
                *(model, budgets, sizes, size),
                rounds=(repeats, warmup),
                output=output,
                as_json=as_json,
            )
            return
        shown = (text_tokens, answer_tokens, images, size)
        for number in sizes:
            Case(number, *shown)
        if config is None:
            loaded = run.load_checkpoint(model or "", threads, loading)
        else:
            loaded = run.build_shape(config, layers, loading.dtype, loading.device, threads)
        cases = [Case(number, *shown, loaded.processor) for number in sizes]
        run.check_budgets(loaded.model, budgets, cases[0])
        report, interrupted = run.timed(
            config or model or "",
            loaded,
            budgets,
            cases,
            repeats=repeats,
            warmup=warmup,
            check_flops=check_flops,
        )
        # A search on a GPU takes minutes, and whoever pressed Ctrl-C does not want it.
        if report.pairs() and not (interrupted and loaded.model.device.type != "cpu"):
            run.find_fits(loaded, report, memory=memory, try_out=max_batch)
        if report.pairs():
            _tell(report, output, plot=plot, as_json=as_json)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _encoders(
    model: Any,
    name: str,
    budgets: list[Budget],
    sizes: list[int],
    image_size: tuple[int, int] | None,
    *,
    rounds: tuple[int, int],
    output: Path | None,
    as_json: bool,
) -> None:
    """Time an encoder on its own at every batch size."""
    from ..measure.bench.encoders import time_encoder
    from ..measure.provenance import in_words
    from ..measure.store import as_json as to_json

    reports = [
        time_encoder(
            *(model, budgets),
            name=name,
            batch=batch,
            image_size=image_size,
            repeats=rounds[0],
            warmup=rounds[1],
        )
        for batch in sizes
    ]
    found = {"encoders": [report.to_dict() for report in reports]}
    if output is not None:
        write_text(output / RESULTS, to_json(found))
        # A plot of an earlier run would contradict the new numbers.
        (output / PLOT).unlink(missing_ok=True)
        tables = "\n\n".join(report.table().markdown() for report in reports)
        write_text(output / REPORT, f"{tables}\n\n{in_words(reports[0].setup)}\n")
    if as_json:
        write_json(found)
        return
    for report in reports:
        table = report.table()
        show_table(
            table.caption, table.columns, [[str(cell) for cell in row] for row in table.rows]
        )
    write(in_words(reports[0].setup))


def _check(
    model: str | None,
    config: str | None,
    layers: int | None,
    quantised: bool,
    max_batch: bool,
    memory: float | None,
) -> None:
    """Refuse options that contradict each other."""
    if (model is None) == (config is None):
        raise ValueError("give either --model PATH or --config NAME")
    if layers is not None and config is None:
        raise ValueError("--layers needs --config; a checkpoint is always timed at full depth")
    if config is not None:
        check_choice("config", config, SHAPES)
    if config is not None and quantised:
        raise ValueError(
            "--load-4bit and --load-8bit quantise a checkpoint; give --model, not --config"
        )
    if max_batch and layers is not None:
        raise ValueError(
            "--max-batch tries batches out, which says nothing about the full depth when --layers "
            "builds a part of it; leave one of them out (without --max-batch the largest batch is "
            "computed for the full depth)"
        )
    if max_batch and memory is not None:
        raise ValueError(
            "--max-batch fills the memory of this device and --memory computes for another one; "
            "leave one of them out"
        )


def _check_numbers(repeats: int, warmup: int, memory: float | None, threads: int | None) -> None:
    """Refuse numbers out of range."""
    whole_number("repeats", repeats, 1)
    whole_number("warmup", warmup, 0)
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be above 0 GiB, got {memory}")
    if threads is not None:
        whole_number("threads", threads, 1)


def _tell(report: Report, output: Path | None, *, plot: bool, as_json: bool) -> None:
    """Write the files and print the result; the names of files go where they are not in the way."""
    files = [] if output is None else _write_files(report, output, plot=plot)
    if as_json:
        write_json(report.to_dict())
    else:
        show(report)
    for path in files:
        (say if as_json else write)(str(path))


def _budgets(keep: str, tokens: str | None, algorithms: str | None) -> list[Budget]:
    """The unmerged model and every algorithm at every budget."""
    from ..measure.bench import Budget
    from .session import check_algorithm

    names = [None] if algorithms is None else o.words("algorithms", algorithms)
    values: list[dict[str, Any]]
    if tokens is None:
        values = [{"keep": value} for value in o.fractions("keep", keep)]
    else:
        values = [{"tokens": value} for value in o.counts("tokens", tokens)]
    found = [Budget("none")]
    for name in names:
        chosen: dict[str, Any] = {} if name is None else {"algorithm": name}
        check_algorithm(chosen)
        for value in values:
            label = " ".join(f"{key}={number:g}" for key, number in value.items())
            config = MergeConfig(**value, **chosen)
            found.append(Budget(label if len(names) == 1 else f"{name} {label}", config))
    return found


def show(report: Report) -> None:
    """Print what it all means, then the tables, what they were measured on, and notes."""
    from ..measure.bench import verdict
    from ..measure.provenance import in_words

    for sentence in verdict(report):
        write(f"- {sentence}")
    write("")
    for table in report.tables():
        rows = [[str(cell) for cell in row] for row in table.rows]
        show_table(table.caption, table.columns, rows)
    write(in_words(report.setup))
    for line in report.footnotes():
        write(f"- {line}")


def _write_files(report: Report, folder: Path, *, plot: bool) -> list[Path]:
    """Write results, report and plot, and return their paths."""
    from ..measure.bench import page
    from ..measure.bench import plot as draw

    files = [folder / RESULTS, folder / REPORT, *([folder / PLOT] if plot else [])]
    report.save(files[0])
    write_text(files[1], page(report))
    if plot:
        draw(report, files[2])
    else:
        # A plot of an earlier run would contradict the new numbers.
        (folder / PLOT).unlink(missing_ok=True)
    return files
