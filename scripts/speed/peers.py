"""Ways to reduce visual tokens against each other, at equal tokens, in one process, in turns.

Peers are written from their papers as algorithms of ours: ToMe in the tower, selection at the end
of the tower (VisionZip), selection before the language model (DivPrune), average pooling. `none`
is the untouched model of transformers.

    python -m scripts.speed.peers --shape llava-1.5-7b --layers 4 --dtype bfloat16 \
        --threads 2 --minutes 3 --out eval/results/performance/peers_cpu

Every round is written to OUT.json as soon as it is finished; called again, the script continues
from there until there are --repeats rounds. OUT.md holds the tables. With --layers, columns marked
"whole" scale the time inside the language model's layers to its whole depth and count the rest
once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.measure.bench import (
    Bench,
    Budget,
    Case,
    Phases,
    Report,
    build,
    configuration,
    pays_for,
)
from pitome_vlm.measure.bench.report import shown
from pitome_vlm.measure.provenance import in_words, provenance
from pitome_vlm.measure.stats import iqr
from pitome_vlm.merge.config import MergeConfig

PEERS = ("tome", "visionzip", "divprune", "pool", "pitome", "pitome_plus")
LENGTHS = (1, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="language model layers to build")
    parser.add_argument("--tokens", default="144,64", help="visual tokens to compare at")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--answer", type=int, default=8, help="tokens timed for decoding")
    parser.add_argument("--repeats", type=int, default=20, help="rounds in the end")
    parser.add_argument("--minutes", type=float, help="stop early; call again to continue")
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.md")
    options = parser.parse_args()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bench, report = prepare(options)
    if options.out is not None:
        resume(bench, report, options.out.with_suffix(".json"))
    print(f"{bench.results[0].repeats} rounds so far", flush=True)
    if bench.results[0].repeats < options.repeats:
        bench.warm_up(budgets=2)
    while bench.results[0].repeats < options.repeats:
        started = time.monotonic()
        bench.run(repeats=1, warmup=0)
        took = time.monotonic() - started
        print(f"round {bench.results[0].repeats}: {took:.0f} s", flush=True)
        if options.out is not None:
            report.save(options.out.with_suffix(".json"))
        if deadline is not None and time.monotonic() + took > deadline:
            break
    text = markdown(report, bench.results)
    print(text)
    if options.out is not None:
        write_text(options.out.with_suffix(".md"), text)


def prepare(options: argparse.Namespace) -> tuple[Bench, Report]:
    """The model with all its budgets, and an empty report."""
    model = build(
        options.shape,
        layers=options.layers,
        dtype=getattr(torch, options.dtype),
        device=options.device,
    )
    budgets = [Budget("none")]
    for count in map(int, options.tokens.split(",")):
        for name in options.peers.split(","):
            config = MergeConfig(tokens=count, algorithm=name)
            budgets.append(Budget(f"{name} tokens={count}", config))
    whole = configuration(options.shape).text_config.num_hidden_layers
    built = model.config.text_config.num_hidden_layers
    case = Case(options.batch, 64, options.answer)
    bench = Bench(model, budgets, case, depth=whole / built)
    layers = f"{built} of {whole}"
    setup = provenance(model, shape=options.shape, language_model_layers=layers, seed=0)
    return bench, Report(options.shape, [bench.results], depth=whole / built, setup=setup)


def resume(bench: Bench, report: Report, path: Path) -> None:
    """Take over the rounds of an earlier call.

    Raises:
        SystemExit: they were measured on something else.
    """
    if not path.is_file():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    budgets = [(row["budget"], row["batch"], row["answer_tokens"]) for row in earlier["results"]]
    case = bench.case
    wanted = [(one.budget.name, case.batch, case.answer_tokens) for one in bench.results]
    changed = earlier["setup"] != report.setup
    if changed or budgets != wanted:
        what = "setup" if changed else "budgets"
        raise SystemExit(f"{path} was measured with another {what}; name another --out")
    for one, row in zip(bench.results, earlier["results"], strict=True):
        for name, values in row["rounds_ms"].items():
            one.rounds[name].extend(values)


def markdown(report: Report, results: list[Phases]) -> str:
    """What was compared, and the table."""
    known = in_words(report.setup)
    cut = "" if report.depth == 1 else " (whole depth, scaled)"
    columns = ["method", "tokens", "tower + merge", "of it merge", "prefill, built"]
    columns += ["per token, built"]
    columns += [f"prefill{cut}", *(f"{length} new{cut}" for length in LENGTHS), "pays to"]
    rows = [_row(results[0], one) for one in results]
    lines = [
        "# Against others, at equal tokens",
        f"{known}; batch {results[0].case.batch}, 64 tokens of text, {results[0].repeats} rounds "
        "in turns; medians in ms (± distance of the quartiles).",
        markdown_table(columns, rows),
        "`scripts/speed/peers.py`. Peers are algorithms of ours, written from their papers. "
        "`pays to`: the longest answer that is at least 1.1 times faster than `none`. With equal "
        "tokens a further token is the same work whoever chose them: differences between methods "
        "of one budget in the columns of 32 and 128 new tokens, and in `pays to`, are noise of "
        "decoding as far as the ± of `per token` is larger than them (a difference whose quartiles "
        "over the rounds have 0 in between counts as none in `pays to`).",
    ]
    if report.depth != 1:
        lines.append(
            f"Only {report.setup['language_model_layers']} language model layers were built: the "
            f"time between the first layer's start and the last one's end is taken "
            f"{report.depth:g} times, everything else once."
        )
    return "\n\n".join(lines) + "\n"


def _row(base: Phases, one: Phases) -> list[str]:
    rounds = zip(one.rounds["tower"], one.rounds["merge"], strict=True)
    encode = iqr([tower + merge for tower, merge in rounds])
    lengths = pays_for(base, one)
    pays = "-" if one is base else "no" if lengths is None else str(lengths)
    totals = [one.whole.total(length) for length in LENGTHS]
    faster = [base.whole.total(length) / one.whole.total(length) for length in LENGTHS]
    return [
        one.budget.name.split(" ")[0],
        str(one.tokens),
        f"{shown(one.median('tower') + one.median('merge'))} ±{shown(encode)}",
        shown(one.median("merge")),
        *(f"{shown(one.median(x))} ±{shown(iqr(one.rounds[x]))}" for x in ("prefill", "decode")),
        shown(one.whole.prefill),
        *(f"{shown(ms)} ({x:.2f}x)" for ms, x in zip(totals, faster, strict=True)),
        pays,
    ]


if __name__ == "__main__":
    main()
