"""Measure the bundled model over methods and budgets and write table, plot and raw answers.

    python -m scripts.demo.benchmark --output eval/results/demo

Writes results.json (every answer, full configuration, hardware, versions), report.md and
accuracy.png. Where results.json is there already, only rows are measured that are missing or no
longer what the package does (`stored.py`); `--overwrite` measures all, `--methods` only some.
Costs are counted with the rows of the default; the rows that the README compares are timed where
one of them was measured or is not timed yet, and with `--times`.
`--split val` is for choosing options; the committed table is the test split.
`--readme README.md` also brings the table between the README's markers up to date.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.common import write_text
from pitome_vlm.demo import Sample, checkpoint_path, load_split
from pitome_vlm.demo.dataset import HELD_OUT, SPLIT_SCENES
from pitome_vlm.demo.processor import PATCHES
from pitome_vlm.measure.demo_benchmark import Outcome, Setting, concatenate, run
from pitome_vlm.measure.description import describe
from pitome_vlm.measure.provenance import checkpoint_fingerprint, provenance

from ..command import command_line
from .readme import Measured, headline, readme_table, update_readme
from .report import (
    BASELINE,
    BASELINES,
    BUDGETS,
    CALIBRATED,
    RANDOM_SEEDS,
    RECOMMENDED,
    RESIZE,
    TIMED,
    from_raw,
    outcome_values,
    plot,
    raw,
    report,
    setting_values,
    table,
)
from .stored import holds, later_words, with_run
from .times import BATCHES, by_name, time_rows

NO_MERGING = MergeConfig(keep=1.0, algorithm="none")


def methods(tokens: int) -> list[Setting]:
    """Everything compared at one budget, calibrated alike unless the name says otherwise."""
    settings = [
        Setting(RECOMMENDED, MergeConfig(tokens=tokens)),
        Setting("PiToMe, calibrated", MergeConfig(tokens=tokens, algorithm="pitome")),
        Setting("PiToMe (paper)", MergeConfig.preset("paper", tokens=tokens)),
        Setting("PiToMe (released code)", MergeConfig.preset("released", tokens=tokens)),
    ]
    for name, algorithm in BASELINES.items():
        config = MergeConfig(tokens=tokens, algorithm=algorithm, **CALIBRATED)
        settings.append(Setting(name, config))
    for seed in RANDOM_SEEDS:
        config = MergeConfig(tokens=tokens, algorithm="random", seed=seed, **CALIBRATED)
        settings.append(Setting("random", config))
    settings.append(Setting(RESIZE, NO_MERGING, resize=tokens))
    return settings


def cost_rows(model: Any, budgets: list[int]) -> list[dict[str, Any]]:
    """What each budget saves by default: FLOPs and KV bytes, counted."""
    settings = [Setting(BASELINE, NO_MERGING)]
    settings += [Setting(RECOMMENDED, MergeConfig(tokens=tokens)) for tokens in budgets]
    rows = []
    for setting in settings:
        after = describe(model, config=setting.config).after
        rows.append(
            {
                "method": setting.name,
                "tokens": after.visual_tokens,
                "prefill_flops": after.total_flops,
                "kv_bytes_per_image": after.kv_bytes_per_image,
            }
        )
    return rows


def timed_settings(budgets: list[int]) -> list[tuple[int, Setting]]:
    """Visual tokens and settings of the rows that are timed."""
    timed = [(PATCHES, Setting(BASELINE, NO_MERGING))]
    return timed + [
        (tokens, setting)
        for tokens in budgets
        for setting in methods(tokens)
        if setting.name in TIMED
    ]


ROWS_BETWEEN_SAVES = 4
Asking = Callable[[list[Setting]], list[Outcome]]
_LOADED: list[Any] = []


def load_model(path: Path) -> tuple[Any, Any]:
    """Model and processor of this process, loaded once, on one thread."""
    if not _LOADED:
        torch.set_num_threads(1)
        _LOADED.append(pitome_vlm.load(path, dtype="float32"))
    loaded: tuple[Any, Any] = _LOADED[0]
    return loaded


def measure_part(part: list[Any], **options: Any) -> list[Any]:
    """Outcomes of one batch of questions in a worker process."""
    return run(*_LOADED[0], samples=part, **options)


def parser_for(doc: str | None, split: str = "val", limit: int | None = None) -> Any:
    """What all scripts that ask the demo's held-out questions can be told.

    Args:
        doc: of the script.
        split: asked where none is named.
        limit: questions asked where no number is given, None for all.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", choices=HELD_OUT, default=split)
    parser.add_argument("--limit", type=int, default=limit, help="first questions only")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--rewrite", action="store_true", help="tables and plots from stored answers, without a run"
    )
    return parser


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__, "test")
    parser.add_argument("--model", type=Path, default=None, help="another checkpoint folder")
    parser.add_argument("--model-name", help="how to call it in the report")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="N")
    parser.add_argument("--readme", type=Path, help="file whose table to bring up to date")
    parser.add_argument("--overwrite", action="store_true", help="measure every row")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="rows to measure, as the report calls them"
    )
    parser.add_argument("--times", action="store_true", help="time again what is timed already")
    return parser.parse_args()


def wanted_settings(wanted: argparse.Namespace) -> list[Setting]:
    """All rows of the table in its order, random once per seed."""
    settings = [Setting(BASELINE, NO_MERGING)]
    return settings + [setting for tokens in wanted.budgets for setting in methods(tokens)]


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the rows of a table apart, by their "method", "config" and "resize"."""
    config = row["config"]
    return row["method"], config["keep"], config["tokens"], config["seed"], row.get("resize")


def kept(stored: Path, samples: list[Any], checkpoint: str, *, overwrite: bool) -> dict[str, Any]:
    """What an earlier run left of the same questions, or nothing yet.

    Raises:
        SystemExit: the stored rows are of other questions or of another model.
    """
    asked = [vars(sample) for sample in samples]
    old = {"samples": asked, "outcomes": [], "costs": []}
    if stored.is_file() and not overwrite:
        old = json.loads(stored.read_text())
    old.setdefault("times", [])
    if old["samples"] != asked:
        raise SystemExit(
            f"{stored} holds {len(old['samples'])} other questions; give the same --split and "
            "--limit, another --output, or --overwrite"
        )
    if old.get("provenance", {}).get("checkpoint", checkpoint) != checkpoint:
        raise SystemExit(f"{stored} was made with another model; give --output or --overwrite")
    return old


def missing(old: dict[str, Any], settings: list[Setting]) -> list[Setting]:
    """Those of some settings that are not measured yet, or are no longer what they were."""
    rows = {key(one): one for one in old["outcomes"]}
    named = {key(setting_values(one)): one for one in settings}
    return [
        one for name, one in named.items() if not (name in rows and holds(rows[name], one.config))
    ]


def with_rows(
    old: dict[str, Any],
    settings: list[Setting],
    todo: list[Setting],
    ask: Asking,
    facts: dict[str, Any],
    stored: Path,
) -> dict[str, Any]:
    """Results with some more rows, saved after every few.

    Args:
        old: of `kept`.
        settings: all rows of the table, in its order.
        todo: those of them that are to be measured.
        ask: from some settings to their outcomes.
        facts: of this run.
        stored: file of the results.
    """
    samples = [Sample(**values) for values in old["samples"]]
    rows = {key(one): one for one in old["outcomes"]}
    names = [key(setting_values(one)) for one in settings]
    for begin in tqdm(range(0, len(todo), ROWS_BETWEEN_SAVES), unit="save", smoothing=0):
        part = todo[begin : begin + ROWS_BETWEEN_SAVES]
        found = [outcome_values(one) for one in ask(part)]
        rows |= {key(one): one for one in found}
        # Rows that are no longer asked for stay, after the others.
        order = [name for name in dict.fromkeys([*names, *rows]) if name in rows]
        runs = with_run(old, facts, [one.name for one in part])
        costs = {"costs": old["costs"], "times": old["times"]}
        old = raw(samples, [rows[name] for name in order], costs, runs)
        write_text(stored, json.dumps(old, separators=(",", ":")) + "\n")
    return old


def measure(wanted: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """Ask what is missing, and time the default if it is among it."""
    samples, path = load_split(wanted.split, wanted.limit), wanted.model or checkpoint_path()
    checkpoint = checkpoint_fingerprint(str(path))
    old = kept(stored, samples, checkpoint, overwrite=wanted.overwrite)
    settings = wanted_settings(wanted)
    todo = [
        one
        for one in missing(old, settings)
        if wanted.methods is None or one.name in wanted.methods
    ]
    model, processor = load_model(path)
    facts = run_facts(wanted, model, len(samples)) | {"checkpoint": checkpoint}
    size = wanted.batch_size
    # Parts are whole batches, so the answers do not depend on the number of processes.
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    options = {"split": wanted.split, "batch_size": size}
    with asking(wanted.jobs, path, parts, options) as ask:
        old = with_rows(old, settings, todo, ask, facts, stored)
    if not old["costs"] or any(one.name == RECOMMENDED for one in todo):
        old["costs"] = cost_rows(model, wanted.budgets)
    timed, known = timed_settings(wanted.budgets), by_name(old["times"])
    wanting = any(
        (one.name, tokens, size) not in known for tokens, one in timed for size in BATCHES
    )
    if wanting or wanted.times or any(one.name in TIMED for one in todo):
        print(f"timing {len(timed)} settings; leave the machine alone")
        old["times"] = time_rows(model, processor, wanted.split, timed, facts["hardware"])
    return old


def run_facts(wanted: argparse.Namespace, model: Any, questions: int) -> dict[str, Any]:
    """What a run was made with."""
    facts = provenance(
        model,
        split=wanted.split,
        questions=questions,
        scenes=SPLIT_SCENES[wanted.split],
        batch_size=wanted.batch_size,
    )
    facts["processes"] = wanted.jobs
    if wanted.model_name:
        facts["model"] = wanted.model_name
        facts["command"] = f"Made by `{command_line()}`."
    return facts


@contextlib.contextmanager
def asking(
    jobs: int,
    path: Path,
    parts: list[list[Any]],
    options: dict[str, Any],
    prepare: Callable[[Path], Any] = load_model,
) -> Iterator[Asking]:
    """A function that asks all questions under some settings, in processes of one thread each.

    Args:
        jobs: processes.
        path: of the checkpoint.
        parts: of the questions, in their order; one process asks a part.
        options: of `demo_benchmark.run`.
        prepare: what every process begins with.
    """
    with multiprocessing.get_context("spawn").Pool(
        jobs, initializer=prepare, initargs=(path,)
    ) as pool:

        def ask(settings: list[Setting]) -> list[Outcome]:
            worker = functools.partial(measure_part, settings=settings, **options)
            return concatenate(list(pool.imap(worker, parts)))

        yield ask
        pool.close()
        pool.join()


def main() -> None:
    """Measure, or read what was measured, and write it down."""
    wanted = arguments()
    stored = wanted.output / "results.json"
    wanted.output.mkdir(parents=True, exist_ok=True)
    results = json.loads(stored.read_text()) if wanted.rewrite else measure(wanted, stored)
    write_text(stored, json.dumps(results, separators=(",", ":")) + "\n")
    samples, rows = from_raw(results)
    costs, facts = results["costs"], results["provenance"]
    times = results.get("times", [])
    text = report(samples, rows, costs, facts, times=times, later=later_words(results))
    (wanted.output / "report.md").write_text(text)
    plot(samples, rows, wanted.output / "accuracy.png")
    if wanted.readme:
        shown = Measured(samples, rows, times, facts)
        update_readme(wanted.readme, headline=headline(shown), table=readme_table(shown))
    print(table(samples, rows))


if __name__ == "__main__":
    main()
