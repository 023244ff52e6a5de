"""What `pitome-vlm bench` does, in order: check everything, load, time, show, write.

Knows: what options mean and what can be refused before minutes are spent. Does not know: how
anything is timed (`pitome_vlm.measure.bench`) or printed (`bench_show.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..common import whole_number
from ..merge.config import MergeConfig
from .bench_fits import find_fits
from .options import LoadOptions
from .terminal import say

if TYPE_CHECKING:
    from ..measure.bench import Budget, Case, Report

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Source:
    """Which model, and on what."""

    loading: LoadOptions
    config: str | None
    layers: int | None
    threads: int | None

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: it does not.
        """
        if (not self.loading.model) == (self.config is None):
            raise ValueError("give one of --model PATH and --config NAME")
        if self.layers is not None and self.config is None:
            raise ValueError("--layers belongs to --config; a checkpoint is timed as it is")
        if self.config is not None and self.loading.load_4bit:
            raise ValueError("--load-4bit quantises a checkpoint; give --model, not --config")
        if self.threads is not None:
            whole_number("threads", self.threads, 1)
        if self.config is not None:
            from ..measure.bench import configuration

            configuration(self.config, layers=self.layers)


@dataclass(frozen=True)
class Question:
    """What is compared, and on what."""

    keep: str
    tokens: str | None
    algorithms: str | None
    batches: str
    text_tokens: int
    answer_tokens: int
    images: int
    image_size: tuple[int, int] | None
    repeats: int
    warmup: int
    memory: float | None
    max_batch: bool
    check_flops: bool

    def check(self, layers: int | None) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: it does not.
        """
        if self.max_batch and layers is not None:
            raise ValueError(
                "--max-batch tries batches out, which says nothing about the whole depth where "
                "--layers builds a part of it; leave one of them out (without --max-batch the "
                "largest batch is computed for the whole depth)"
            )
        if self.max_batch and self.memory is not None:
            raise ValueError(
                "--max-batch fills the memory there is and --memory computes for another one; "
                "leave one of them out"
            )

    def budgets(self) -> list[Budget]:
        """The untouched model and every algorithm at every budget.

        Raises:
            ValueError: no number, a number out of range, or an unknown algorithm.
        """
        from ..measure.bench import Budget
        from .session import check_algorithm

        names: list[str | None] = [None]
        if self.algorithms is not None:
            names = list(_words(self.algorithms))
        for name in names:
            check_algorithm({} if name is None else {"algorithm": name})
        values: list[dict[str, Any]]
        if self.tokens is None:
            values = [{"keep": value} for value in _numbers(self.keep, float, "--keep")]
        else:
            values = [{"tokens": value} for value in _numbers(self.tokens, int, "--tokens")]
        found = [Budget("none")]
        for name in names:
            chosen: dict[str, Any] = {} if name is None else {"algorithm": name}
            for value in values:
                config = MergeConfig(**value, **chosen)
                label = " ".join(f"{key}={number:g}" for key, number in value.items())
                found.append(Budget(label if len(names) == 1 else f"{name} {label}", config))
        return found

    def cases(self) -> list[Case]:
        """One for every batch size.

        Raises:
            ValueError: no number, or a number out of range.
        """
        from ..measure.bench import Case

        whole_number("repeats", self.repeats, 1)
        whole_number("warmup", self.warmup, 0)
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory must be above 0 GiB, got {self.memory}")
        batches = _numbers(self.batches, int, "--batch")
        words, answer = self.text_tokens, self.answer_tokens
        return [Case(size, words, answer, self.images, self.image_size) for size in batches]


@dataclass(frozen=True)
class Files:
    """What is written."""

    json: Path | None = None
    plot: Path | None = None
    report: Path | None = None

    def check(self) -> None:
        """See that all of it can be written, so that nothing measured is lost.

        Raises:
            OSError: a place that cannot be written to.
            ImportError: a plot without matplotlib.
            ValueError: a kind of picture that cannot be written.
        """
        if self.plot is not None:
            from ..measure.plots import check_plot_file

            check_plot_file(self.plot)
        for path in (self.json, self.plot, self.report):
            if path is not None:
                _check_writable(path)


@dataclass
class Loaded:
    """A model, and the same at its whole depth, which may be on the meta device."""

    model: Any
    whole: Any
    depth: float
    notes: list[str]


def run(source: Source, question: Question, files: Files) -> bool:
    """Time a model and show what came of it.

    Returns:
        Whether Ctrl-C ended it early; what was measured by then is shown and written all the same.
    """
    source.check()
    question.check(source.layers)
    budgets, cases = question.budgets(), question.cases()
    files.check()
    from ..measure.bench import Report
    from ..measure.provenance import provenance
    from .bench_show import show

    loaded = _loaded(source)
    _check_budgets(loaded.model, budgets, question)
    name = source.config or source.loading.model
    setup = provenance(
        loaded.model,
        language_model_layers=loaded.model.config.get_text_config().num_hidden_layers,
        algorithm=", ".join(sorted({x.config.algorithm for x in budgets if x.config})),
    )
    report = Report(name, [], loaded.notes, depth=loaded.depth, setup=setup)
    try:
        _measure(loaded, budgets, cases, report, question)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
        done = min((one.repeats for _, one in report.pairs()), default=0)
        report.notes.append(f"interrupted after {done} of {question.repeats} rounds")
        say("interrupted")
    if report.pairs():
        if not interrupted or loaded.model.device.type == "cpu":
            find_fits(
                loaded.model,
                loaded.whole,
                report,
                memory=question.memory,
                try_out=question.max_batch,
            )
        show(report)
        _write(report, files)
    return interrupted


def _loaded(source: Source) -> Loaded:
    import torch

    from ..wrapping.wrap import unwrap
    from .session import accelerator, load_model

    if source.threads is not None:
        torch.set_num_threads(source.threads)
    if source.config is None:
        vlm, _ = load_model(source.loading, {})
        vlm = unwrap(vlm).eval()
        return Loaded(vlm, vlm, 1.0, [])
    from ..loading.checkpoints import torch_dtype
    from ..measure.bench import build, configuration

    dtype: Any = torch_dtype(source.loading.dtype or "float32")
    device = source.loading.device or accelerator() or "cpu"
    say(f"building {source.config} with random weights on {device}")
    vlm = build(source.config, layers=source.layers, dtype=dtype, device=device)
    all_layers = configuration(source.config).text_config.num_hidden_layers
    depth = all_layers / vlm.config.text_config.num_hidden_layers
    notes = [f"random weights of the shape of {source.config}"]
    if depth == 1:
        return Loaded(vlm, vlm, 1.0, notes)
    notes.append(
        f"{source.layers} of {all_layers} language model layers were built. At the whole depth, "
        f"the time between the first layer's start and the last one's end is taken {depth:g} "
        "times and everything else (tower, projector, embedding, head, sampling) once; KV cache, "
        "largest batch and the sentences are about the whole depth, the first table, FLOPs and "
        "peak memory are about what was built"
    )
    return Loaded(vlm, build(source.config, dtype=dtype, device="meta"), depth, notes)


def _check_budgets(vlm: Any, budgets: list[Budget], question: Question) -> None:
    """Refuse a budget that does not fit the model before the first round.

    Raises:
        ValueError: it asks for more tokens than there are.
    """
    from ..wrapping.encode import planned_count, planned_schedule

    for budget in budgets:
        if budget.config is not None:
            planned_schedule(vlm, budget.config)
            planned_count(vlm, budget.config, image_size=question.image_size)


def _measure(
    loaded: Loaded, budgets: list[Budget], cases: list[Case], report: Report, question: Question
) -> None:
    from ..measure.bench import Bench, counted_over_formula
    from ..measure.bench.memory import out_of_memory

    if question.check_flops:
        for budget in budgets:
            share = counted_over_formula(loaded.model, budget, cases[0])
            report.notes.append(f"FLOPs counted by PyTorch / formula, {budget.name}: {share:.4f}")
    for case in cases:
        try:
            bench = Bench(loaded.model, budgets, case, depth=loaded.depth)
            report.results.append(bench.results)
            bench.run(
                repeats=question.repeats,
                warmup=question.warmup,
                progress=_progress(case.batch, time.monotonic()),
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            said = f"batch {case.batch}: out of memory for at least one budget"
            if not any(done[0].repeats for done in report.results):
                hint = "try a smaller --batch, --load-4bit or --layers"
                raise MemoryError(f"{said}; {hint}") from error
            report.notes.append(f"{said}; larger ones were not tried")
            say(said)
            break


def _progress(batch: int, started: float) -> Callable[[int, int], None]:
    last = [0.0]

    def tell(done: int, rounds: int) -> None:
        now = time.monotonic()
        if done == rounds or now - last[0] > 10:
            left = (now - started) / done * (rounds - done)
            say(f"batch {batch}: round {done} of {rounds}, about {left:.0f} s left")
            last[0] = now

    return tell


def _write(report: Report, files: Files) -> None:
    from ..common import write_text
    from ..measure.bench import page, plot

    if files.json is not None:
        report.save(files.json)
    if files.plot is not None:
        plot(report, files.plot)
    if files.report is not None:
        write_text(files.report, page(report))
    for path in (files.json, files.plot, files.report):
        if path is not None:
            say(f"wrote {path}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, kind: type[Number], option: str) -> list[Number]:
    try:
        found = [kind(word) for word in _words(text)]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{option} takes numbers with commas between them, got {text!r}")
    return found


def _check_writable(path: Path) -> None:
    """Try to open a file for writing without changing it.

    Raises:
        OSError: it cannot be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.exists()
    with path.open("a", encoding="utf-8"):
        pass
    if not there:
        path.unlink()
