"""`pitome-vlm verify`: what merging does to the spectrum of the token graph.

Knows: its options, and what is refused before anything is measured. Does not know: how it is
carried through (`verify_run.py`), shown (`verify_show.py`) or measured
(`pitome_vlm.measure.spectral`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o

EXIT_FAILED_CHECK = 1
DEFAULT_KEEP = 0.25
_SYNTHETIC = "Synthetic clusters"
_REAL = "Real features"

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Folder or Hub name of a LLaVA, or `demo` for the bundled one.",
        rich_help_panel=_REAL,
    ),
]
Pictures = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        "-i",
        metavar="FILE",
        help="A picture; may be given several times. Default: validation scenes of the demo.",
        rich_help_panel=_REAL,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(metavar="N", help="How many validation scenes; default 8.", rich_help_panel=_REAL),
]
Features = Annotated[
    bool,
    typer.Option(
        "--features/--no-features", help="Look at a model's tower.", rich_help_panel=_REAL
    ),
]
Synthetic = Annotated[
    bool,
    typer.Option(
        "--synthetic/--no-synthetic",
        help="Look at clusters with known labels.",
        rich_help_panel=_SYNTHETIC,
    ),
]
Seeds = Annotated[
    int, typer.Option(metavar="N", help="Draws of every case.", rich_help_panel=_SYNTHETIC)
]
Sigma = Annotated[
    str,
    typer.Option(
        metavar="X,X",
        help="Noise beside centres of length one.",
        rich_help_panel=_SYNTHETIC,
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option(
        metavar="N/N,N/N",
        help="Tokens of each cluster; default 32/16/8/5/3,50/8/4/2,20/16/12/9/7.",
        rich_help_panel=_SYNTHETIC,
    ),
]
Algorithms = Annotated[
    str, typer.Option(metavar="A,B", help="Any registered algorithms, for instance pitome,tome.")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="DIR", help="For report.md, results.json and spectral.png."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")
]
Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw spectral.png (matplotlib).")]


def verify(
    model: ModelName = "demo",
    image: Pictures = None,
    count: Count = None,
    algorithms: Algorithms = "pitome,tome,random",
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    features: Features = True,
    synthetic: Synthetic = True,
    seeds: Seeds = 10,
    sigma: Sigma = "0.3,0.1,0.03,0.01",
    sizes: Sizes = None,
    output: Output = Path("pitome-verify"),
    overwrite: Overwrite = False,
    plot: Plot = True,
    load_4bit: o.Load4Bit = False,
    load_8bit: o.Load8Bit = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure how merging changes the spectrum of the token graph, as PiToMe's theorem does.

    On clusters with known labels, beside the theorem's assumptions, and on what the merges of a
    model's vision tower compared. Exit code 1 if a proven bound does not hold.

    Example: `pitome-vlm verify --algorithms pitome,tome --tokens 36 --count 4`
    """
    del debug  # read by the command group
    budget = o.MergeOptions(keep, tokens, ratio).given(DEFAULT_KEEP)
    if not (features or synthetic):
        raise ValueError("--no-features and --no-synthetic together leave nothing to measure")
    if count is not None and image:
        raise ValueError("give one of --image and --count")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    names = [word.strip() for word in algorithms.split(",")]
    from .verify_run import Request, measure, parse_sigmas, parse_sizes
    from .verify_show import check_output, show, store

    check_output(output, overwrite=overwrite, plot=plot)
    loading = o.LoadOptions(model, load_4bit, load_8bit, dtype, device)
    request = Request(
        algorithms=names,
        sizes=parse_sizes(sizes) if synthetic else [],
        sigmas=parse_sigmas(sigma),
        seeds=seeds,
        loading=loading if features else None,
        images=image or [],
        count=count,
        budget=budget,
    )
    outcome = measure(request, verbose=verbose)
    show(outcome)
    store(request, outcome, output, plot=plot)
    if not outcome.checks.passed:
        raise typer.Exit(EXIT_FAILED_CHECK)
