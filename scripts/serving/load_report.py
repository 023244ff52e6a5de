"""A load test as a table, a verdict for every number of clients, and a plot.

    python -m scripts.serving.load_report eval/results/serving/load

draws the report of a finished test again, where matplotlib is not next to vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pitome_vlm.common import counted, markdown_table, write_text
from pitome_vlm.measure.plots import panels, save, style

Run = dict[str, Any]
# Less than this is no gain that a user would notice, whatever the rounds say.
NOTICEABLE = 0.03


def middle(runs: list[Run], name: str) -> float:
    """The median over rounds."""
    return statistics.median(run[name] for run in runs)


def of(result: dict[str, Any], server: str, clients: int) -> list[Run]:
    """The rounds of one server."""
    return [run for run in result["runs"] if (run["server"], run["clients"]) == (server, clients)]


def ratios(ours: list[Run], base: list[Run], name: str) -> list[float]:
    """Ours against the base of the same round."""
    return [own[name] / other[name] for own, other in zip(ours, base, strict=True)]


def verdict(ours: list[Run], base: list[Run], clients: int) -> str:
    """What merging does for throughput at this load, in words."""
    found = sorted(ratios(ours, base, "requests_per_s"))
    middle_one = statistics.median(found)
    span = f"{middle_one:.2f}x the requests/s ({found[0]:.2f} to {found[-1]:.2f})"
    if found[0] > 1 and middle_one > 1 + NOTICEABLE:
        return f"pays at {clients}: {span}"
    if found[-1] < 1 and middle_one < 1 - NOTICEABLE:
        return f"costs at {clients}: {span}"
    return f"no gain at {clients}: {span}"


def table(result: dict[str, Any]) -> str:
    """A row for every number of clients and server."""
    header = ["clients", "server", "requests/s", "tokens/s", "first token p50 (ms)", "p95 (ms)"]
    header += ["KV cache (tokens)", "prefix cache", "image cache", "errors"]
    rows = []
    for clients, server in _cells(result):
        runs = of(result, server, clients)
        wrong: dict[str, int] = {}
        for run in runs:
            for name, times in run["errors"].items():
                wrong[name] = wrong.get(name, 0) + times
        rows.append(
            [
                clients,
                server,
                f"{middle(runs, 'requests_per_s'):.1f}",
                f"{middle(runs, 'tokens_per_s'):.0f}",
                f"{1000 * middle(runs, 'first_token_p50_s'):.0f}",
                f"{1000 * middle(runs, 'first_token_p95_s'):.0f}",
                f"{middle(runs, 'kv_tokens'):.0f}",
                _hits(runs, "prefix_cache"),
                _hits(runs, "image_cache"),
                ", ".join(f"{times} x {name}" for name, times in wrong.items()) or "none",
            ]
        )
    return markdown_table(header, rows)


def report(result: dict[str, Any]) -> str:
    """The whole page."""
    names = list(dict.fromkeys(run["server"] for run in result["runs"]))
    lines = ["# Load on a vLLM server", ""]
    for clients in dict.fromkeys(run["clients"] for run in result["runs"]):
        base = of(result, names[0], clients)
        lines += [
            f"- {name} against {names[0]}: {verdict(of(result, name, clients), base, clients)}"
            for name in names[1:]
        ]
    first, machine = result["runs"][0], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    tokens = ", ".join(
        f"{middle([run for run in result['runs'] if run['server'] == name], 'prompt_tokens'):.0f} "
        f"with {name}"
        for name in names
    )
    lines += ["", table(result), ""]
    lines += ["![Throughput and time to the first token by clients](load.png)", ""]
    lines += [
        f"Medians of {counted(result['rounds'], 'round')} in which the servers took turns, "
        f"{result['requests']} requests each, at least two per client; in brackets the "
        f"smallest and largest ratio of a round. Prompt tokens: {tokens}; "
        f"{first['completion_tokens']:.0f} answer tokens. KV cache: the most in use at "
        f"one time, of room for {first['kv_room']} tokens. "
        f"{machine['processor']}, {versions}, python {machine['python']}.",
        "",
        f"Command: `{result['command']}`",
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput and time to the first token by the number of clients."""
    drawn, (left, right) = panels(2, 2, 4.2, 3.2)
    shown = (
        (left, "requests_per_s", 1, "requests/s"),
        (right, "first_token_p50_s", 1000, "time to the first token, p50 (ms)"),
    )
    clients = list(dict.fromkeys(run["clients"] for run in result["runs"]))
    names = list(dict.fromkeys(run["server"] for run in result["runs"]))
    for axes, name, scale, label in shown:
        for index, server in enumerate(names):
            values = [scale * middle(of(result, server, count), name) for count in clients]
            axes.plot(clients, values, **style(index, server))
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [str(count) for count in clients])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients at once")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    save(drawn, path)


def _cells(result: dict[str, Any]) -> list[tuple[int, str]]:
    return list(dict.fromkeys((run["clients"], run["server"]) for run in result["runs"]))


def _hits(runs: list[Run], name: str) -> str:
    asked = sum(run[name + "_queries"] for run in runs)
    return f"{100 * sum(run[name + '_hits'] for run in runs) / asked:.0f} %" if asked else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of results.json")
    folder = parser.parse_args().folder
    result = json.loads((folder / "results.json").read_text())
    write_text(folder / "report.md", report(result))
    plot(result, folder / "load.png")


if __name__ == "__main__":
    main()
