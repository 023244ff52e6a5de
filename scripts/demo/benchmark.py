"""Measure the bundled model over methods and budgets and write table, plot and raw answers.

    python -m scripts.demo.benchmark --output eval/results/demo

Writes results.json (every answer, full configuration, hardware, versions), report.md and
accuracy.png. Where results.json is there already, only rows are measured that are missing or no
longer what the package does (`stored.py`); `--overwrite` measures all, `--methods` only some.
Costs and times are measured with the rows of the default.
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

import numpy as np
import torch
from tqdm import tqdm

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.common import write_text
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.demo.dataset import HELD_OUT, SPLIT_SCENES
from pitome_vlm.measure.demo_benchmark import Outcome, Setting, batches, concatenate, run
from pitome_vlm.measure.description import describe
from pitome_vlm.measure.provenance import checkpoint_fingerprint, provenance
from pitome_vlm.measure.timing import time_prefill

from ..command import command_line
from .report import (
    BASELINE,
    BASELINES,
    BUDGETS,
    CALIBRATED,
    RANDOM_SEEDS,
    RECOMMENDED,
    RESIZE,
    TIMED_BATCH,
    TIMED_ROUNDS,
    from_raw,
    outcome_values,
    plot,
    raw,
    readme_table,
    report,
    setting_values,
    table,
    update_readme,
)
from .stored import holds, later_words, with_run

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


def cost_rows(model: Any, processor: Any, split: str, budgets: list[int]) -> list[dict[str, Any]]:
    """What each budget saves by default: counted FLOPs and KV bytes, measured first-token time.

    The budgets take turns, so that whatever else the machine does falls on all of them; the first
    round warms up.
    """
    batch = next(batches(processor, load_split(split, TIMED_BATCH), split, TIMED_BATCH))
    settings = [Setting(BASELINE, NO_MERGING)]
    settings += [Setting(RECOMMENDED, MergeConfig(tokens=tokens)) for tokens in budgets]
    times: list[list[float]] = [[] for _ in settings]
    rows: list[dict[str, Any]] = [{} for _ in settings]
    for turn in range(1 + TIMED_ROUNDS):
        for index, setting in enumerate(settings):
            with pitome_vlm.wrapped(model, config=setting.config):
                timing = time_prefill(model, batch, repeats=1, warmup=0)
                if turn == 0:
                    after = describe(model).after
                    rows[index] = {
                        "method": setting.name,
                        "tokens": after.visual_tokens,
                        "prefill_flops": after.total_flops,
                        "kv_bytes_per_image": after.kv_bytes_per_image,
                    }
                else:
                    times[index].append(timing.median_ms)
    for row, measured in zip(rows, times, strict=True):
        low, middle, high = np.percentile(measured, [25, 50, 75])
        row |= {"first_token_ms": round(middle, 1), "first_token_iqr_ms": round(high - low, 1)}
    return rows


ROWS_BETWEEN_SAVES = 4
_LOADED: list[Any] = []


def load_model(path: Path) -> tuple[Any, Any]:
    """Model and processor of this process, loaded once, on one thread."""
    if not _LOADED:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        _LOADED.append(pitome_vlm.load(path, dtype="float32"))
    loaded: tuple[Any, Any] = _LOADED[0]
    return loaded


def measure_part(part: list[Any], **options: Any) -> list[Any]:
    """Outcomes of one batch of questions in a worker process."""
    return run(*_LOADED[0], samples=part, **options)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", choices=HELD_OUT, default="test")
    parser.add_argument("--limit", type=int, help="first questions only, for a quick look")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--model", type=Path, default=None, help="another checkpoint folder")
    parser.add_argument("--model-name", help="how to call it in the report")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="N")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--readme", type=Path, help="file whose table to bring up to date")
    parser.add_argument("--overwrite", action="store_true", help="measure every row")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="rows to measure, as the report calls them"
    )
    parser.add_argument(
        "--rewrite", action="store_true", help="tables and plot from results.json, without a run"
    )
    return parser.parse_args()


def wanted_settings(wanted: argparse.Namespace) -> list[Setting]:
    """All rows of the table in its order, random once per seed."""
    settings = [Setting(BASELINE, NO_MERGING)]
    return settings + [setting for tokens in wanted.budgets for setting in methods(tokens)]


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the rows of a table apart, by their "method", "config" and "resize"."""
    config = row["config"]
    return row["method"], config["keep"], config["tokens"], config["seed"], row.get("resize")


def measure(wanted: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """Ask what is missing, saving after every few rows, and time the default if it is among it.

    Raises:
        SystemExit: the stored rows are of other questions.
    """
    split, samples = wanted.split, load_split(wanted.split, wanted.limit)
    kept = {"samples": [vars(sample) for sample in samples], "outcomes": [], "costs": []}
    old = json.loads(stored.read_text()) if stored.is_file() and not wanted.overwrite else kept
    if old["samples"] != kept["samples"]:
        raise SystemExit(
            f"{stored} holds {len(old['samples'])} other questions; give the same --split and "
            "--limit, another --output, or --overwrite"
        )
    path = wanted.model or checkpoint_path()
    checkpoint = checkpoint_fingerprint(str(path))
    if old.get("provenance", {}).get("checkpoint", checkpoint) != checkpoint:
        raise SystemExit(f"{stored} was made with another model; give --output or --overwrite")
    rows = {key(one): one for one in old["outcomes"]}
    settings = {key(setting_values(one)): one for one in wanted_settings(wanted)}
    todo = [
        (name, one)
        for name, one in settings.items()
        if not (name in rows and holds(rows[name], one.config))
        and (wanted.methods is None or one.name in wanted.methods)
    ]
    model, processor = load_model(path)
    facts = run_facts(wanted, model, len(samples)) | {"checkpoint": checkpoint}
    with asking(wanted, samples) as ask:
        for begin in tqdm(range(0, len(todo), ROWS_BETWEEN_SAVES), unit="save", smoothing=0):
            part = todo[begin : begin + ROWS_BETWEEN_SAVES]
            found = ask([one for _, one in part])
            rows |= {name: outcome_values(one) for (name, _), one in zip(part, found, strict=True)}
            # Rows that are no longer asked for stay, after the others.
            order = [name for name in dict.fromkeys([*settings, *rows]) if name in rows]
            runs = with_run(old, facts, [one.name for _, one in part])
            old = raw(samples, [rows[name] for name in order], old["costs"], runs)
            write_text(stored, json.dumps(old, separators=(",", ":")) + "\n")
    if not old["costs"] or any(one.name == RECOMMENDED for _, one in todo):
        old["costs"] = cost_rows(model, processor, split, wanted.budgets)
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
    wanted: argparse.Namespace, samples: list[Any]
) -> Iterator[Callable[[list[Setting]], list[Outcome]]]:
    """A function that asks all questions under some settings, in processes of one thread each."""
    size = wanted.batch_size
    # Parts are whole batches, so the answers do not depend on the number of processes.
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    options = {"split": wanted.split, "batch_size": size}
    with multiprocessing.get_context("spawn").Pool(
        wanted.jobs, initializer=load_model, initargs=(wanted.model or checkpoint_path(),)
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
    text = report(samples, rows, costs, facts, later_words(results))
    (wanted.output / "report.md").write_text(text)
    plot(samples, rows, wanted.output / "accuracy.png")
    if wanted.readme:
        update_readme(wanted.readme, readme_table(samples, rows, costs, facts))
    print(table(samples, rows))


if __name__ == "__main__":
    main()
