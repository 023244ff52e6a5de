"""`pitome-vlm bench`: will merging help this model, this batch, this length of answer?

Knows: its options. Does not know: how anything is timed (`pitome_vlm.measure.bench`) or how the
result looks (`bench_show.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .info import parsed_size
from .terminal import quiet


def bench(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="PATH", help="Checkpoint, or `demo`."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights of a published shape instead: llava-1.5-7b, llava-1.5-13b, "
            "llava-next-7b, onevision-7b; tiny, tiny-next, tiny-onevision to try it out.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="With --config: build only so many language model layers; the whole depth is "
            "scaled up from them."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(metavar="F,F,...", help="Fractions of visual tokens to compare.")
    ] = "0.5,0.25,0.11",
    tokens: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="The same as counts, instead.")
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...", help="pitome_plus (default), pitome, tome, visionzip, ..."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="B,B,...", help="Prompts at a time.")] = "1",
    text_tokens: Annotated[int, typer.Option(help="Words of the prompt, in tokens.")] = 64,
    answer_tokens: Annotated[int, typer.Option(help="Length of the answer, in tokens.")] = 32,
    images: Annotated[int, typer.Option(help="Pictures in every prompt.")] = 1,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the pictures in pixels, for models that cut them into tiles; default "
            "1024x768.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds that are timed.")] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 3,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Compute the largest batch for so much memory; default on a CPU: what the "
            "machine has.",
        ),
    ] = None,
    max_batch: Annotated[
        bool,
        typer.Option(
            "--max-batch", help="On a GPU: find the largest batch by trying, and time it."
        ),
    ] = False,
    check_flops: Annotated[
        bool, typer.Option("--check-flops", help="Compare FLOPs with what PyTorch counts.")
    ] = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    load_4bit: o.Load4Bit = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture (png, svg, pdf).")
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the tables as Markdown.")
    ] = None,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Time tower, merge, prefill and decoding with and without merging, in turns.

    Every budget is timed once per round, the untouched model included; tables hold medians in
    milliseconds. `pays to` is the longest answer, in tokens, that gets at least 10 % faster ("from
    80": those and longer ones do).

    Examples: `pitome-vlm bench --config llava-1.5-7b --layers 4 --batch 1,4`,
    `pitome-vlm bench --model PATH --tokens 144,64 --algorithm pitome_plus,tome --plot out.png`
    """
    del debug  # read by the command group
    from .bench_run import Files, Question, Source, run

    source = Source(
        o.LoadOptions(model or "", load_4bit, False, dtype, device), config, layers, threads
    )
    question = Question(
        keep=keep,
        tokens=tokens,
        algorithms=algorithm,
        batches=batch,
        text_tokens=text_tokens,
        answer_tokens=answer_tokens,
        images=images,
        image_size=parsed_size(image_size),
        repeats=repeats,
        warmup=warmup,
        memory=memory,
        max_batch=max_batch,
        check_flops=check_flops,
    )
    with quiet(verbose):
        interrupted = run(source, question, Files(json_file, plot_file, report_file))
    if interrupted:
        raise typer.Exit(130)
