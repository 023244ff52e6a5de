"""`pitome-vlm verify`: what merging does to the spectrum of the token graph.

Checks the options and shows the results; `verify_run.py` measures and writes the files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import counted
from ..merge.config import DEFAULT_KEEP
from . import options as o
from .session import check_output
from .terminal import progress_bars, quiet, say, show_table, write

if TYPE_CHECKING:
    from ..measure.spectral.study import CaseResult, FeatureRow
    from .verify_run import Outcome

EXIT_FAILED_CHECK = 1
_synthetic, _real = o.panel("Synthetic clusters"), o.panel("Real features")

ModelName = Annotated[
    str,
    o.model_option("Folder or Hub name of a checkpoint, or `demo` for the bundled one.", _real),
]
Images = Annotated[
    list[str] | None,
    o.image_option("Image file; can be repeated. Default: validation scenes of the demo.", _real),
]
Count = Annotated[int | None, _real("Number of validation scenes; default: 8.", "N")]
Features = Annotated[
    bool,
    _real(
        "Whether to measure the features of a model's vision tower.",
        None,
        "--features/--no-features",
    ),
]
Synthetic = Annotated[
    bool,
    _synthetic(
        "Whether to measure synthetic clusters with known labels.",
        None,
        "--synthetic/--no-synthetic",
    ),
]
Seeds = Annotated[int, _synthetic("Random draws per case.", "N")]
Sigma = Annotated[
    str, _synthetic("Noise standard deviations (cluster centres have unit norm).", "X,X")
]
Sizes = Annotated[
    str | None,
    _synthetic(
        "Number of tokens in each cluster; default: 32/16/8/5/3,50/8/4/2,20/16/12/9/7.", "N/N,N/N"
    ),
]
Output = Annotated[Path, o.output_option("Folder for report.md, results.json and spectral.png.")]


def verify(
    model: ModelName = "demo",
    image: Images = None,
    count: Count = None,
    algorithms: o.Algorithms = "pitome,tome,random",
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    features: Features = True,
    synthetic: Synthetic = True,
    seeds: Seeds = 10,
    sigma: Sigma = "0.3,0.1,0.03,0.01",
    sizes: Sizes = None,
    output: Output = Path("pitome-verify"),
    overwrite: o.Overwrite = False,
    plot: o.Plot = True,
    loading: o.Loading = o.Loading(),
    verbose: o.Verbose = False,
) -> None:
    """Measure how merging changes the spectrum of the token graph.

    It is the quantity in PiToMe's theorem. Uses synthetic clusters with known labels and the
    features of a model's vision tower. Exit code 1 if a proven bound does not hold.

    Example: `pitome-vlm verify --algorithms pitome,tome --tokens 36 --count 4`
    """
    budget = o.merge_options(keep, tokens, ratio) or {"keep": DEFAULT_KEEP}
    if not (features or synthetic):
        raise ValueError("--no-features and --no-synthetic together leave nothing to measure")
    if count is not None and image:
        raise ValueError("give either --image or --count, not both")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    names = list(dict.fromkeys(o.words("algorithms", algorithms or "")))
    o.fractions("sigma", sigma)
    from ..measure.store import VERIFY_FILES

    check_output(output, VERIFY_FILES, overwrite=overwrite, plot="verify" if plot else "")
    started = time.perf_counter()
    with quiet(verbose):
        from . import verify_run as run
        from .session import check_algorithm, load_images, one_thread

    noise, clusters = run.noise_levels(sigma), run.cluster_sizes(sizes)
    for name in names:
        check_algorithm({"algorithm": name})
    images = load_images(image or [])
    scenes = [] if images or not features else run.scene_numbers(count)
    if verbose:
        say(f"measuring {', '.join(names)}")
    rows: list[FeatureRow] = []
    results: list[CaseResult] = []
    about: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    with quiet(verbose), one_thread(), progress_bars() as progress:
        if features:  # first, because it has more ways to fail, and sooner
            rows, about = run.feature_results(
                model, names, budget, images, scenes, progress, **vars(loading)
            )
        if synthetic:
            results, drawn = run.synthetic_results(names, clusters, noise, seeds, progress)
    seconds = {"seconds": round(time.perf_counter() - started, 1)}
    outcome = run.outcome_of(names, results, rows, drawn | about | seconds)
    files = run.store(outcome, output, plot=plot)
    show(outcome)
    for path in files:
        write(str(path))
    if not outcome.checks.passed:
        raise typer.Exit(EXIT_FAILED_CHECK)


def show(outcome: Outcome) -> None:
    """Print the headline, then tables and statements."""
    from ..measure.spectral import report

    write(report.headline(outcome.checks))
    for line in report.check_lines(outcome.checks):
        write(f"- {line}")
    write("")
    if outcome.results:
        _show_synthetic(outcome.results)
        write("† sizes of two clusters tied at some step of some draw (A3 did not hold).")
        for one in outcome.summary:
            if one.sigma is None:
                write(f"- {report.under_line(one)}")
        write("")
    if outcome.rows:
        _show_features(outcome.rows)
        write("blind: groups of the same sizes, members drawn at random.")
        write("")
    for line in report.TRUTHS[1:]:
        write(f"- {line}")


def _show_synthetic(results: Sequence[CaseResult]) -> None:
    """SD and mixed groups of every case at the smallest noise."""
    from ..measure.spectral import report

    least = min(result.sigma for result in results)
    names = list(dict.fromkeys(result.algorithm for result in results))
    rows, starts, last = [], set(), None
    for case, noise in report.by_case(results).items():
        if last is not None and case.sizes != last:
            starts.add(len(rows))
        last = case.sizes
        cells = [_cell(result) for result in noise[least].values()]
        rows.append([report.sizes_text(case.sizes), case.layout, report.steps_text(case), *cells])
    show_table(
        f"Spectral distance (groups mixed), sigma {least:g}, mean of {len(results[0].runs)} draws",
        ["clusters", "layout", "steps", *names],
        rows,
        starts=starts,
        names=3,
        left=(0, 1),
    )


def _cell(result: CaseResult) -> str:
    from ..measure.spectral import report

    tied = " " if result.ordered == len(result.runs) else "†"
    return f"{report.number(result.distance)} ({result.mixed:.1%}){tied}"


def _show_features(rows: Sequence[FeatureRow]) -> None:
    from ..measure.spectral import report

    columns, lines = report.feature_lines(rows)
    whole: Iterable[int] = (i for i, line in enumerate(lines) if line[0] == report.WHOLE)
    show_table(
        f"Real features: SD / N ≤ Weyl bound, mean of {counted(len(rows[0].distance), 'image')}",
        columns,
        lines,
        starts=set(whole),
    )
