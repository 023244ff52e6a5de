"""Find out at which load merging pays: vLLM servers driven in turn with 1, 2, 4, ... clients.

    python -m scripts.serving.load --model demo --keep 1.0 0.25 -o eval/results/serving/load
    python -m scripts.serving.load --url http://a:8000 http://b:8000 --label whole merged -o load

The first form starts a server for every budget, all at once on this machine; on a GPU they share
its memory: --vllm "--gpu-memory-utilization 0.4". The second drives servers that run already. For
every number of clients the servers take turns, `--rounds` times, with new images in every round;
only one is asked at a time. The first server is what the others are compared with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pitome_vlm.common import write_text
from pitome_vlm.demo import load_split

from ..command import command_line
from .client import ask, chat, data_url, environment, httpx, server
from .load_report import plot, report

METRICS = {
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "image_cache_hits": "vllm:mm_cache_hits_total",
    "image_cache_queries": "vllm:mm_cache_queries_total",
    "preemptions": "vllm:num_preemptions_total",
}
CACHE_USE = "vllm:kv_cache_usage_perc"
CACHE_SIZE = "vllm:cache_config_info"
# Seconds between two looks at how full the KV cache is.
LOOK = 0.25


def workload(
    options: argparse.Namespace, model: str, first: int, count: int
) -> list[dict[str, Any]]:
    """Chat requests about test scenes, `--questions` in a row about each image.

    Args:
        options: the command's.
        model: name of the served model.
        first: number of the first image; no two numbers are the same image to a cache.
        count: of requests.
    """
    # Special tokens are shown then, or the first token's time could be that of a later one.
    fixed = {"ignore_eos": True, "skip_special_tokens": False} if options.ignore_eos else {}
    by_scene: dict[int, list[str]] = {}
    for sample in load_split("test"):
        by_scene.setdefault(sample.scene_id, []).append(sample.question)
    scenes, bodies = list(by_scene), []
    for number in range(first, first + -(-count // options.questions)):
        scene = scenes[number % len(scenes)]
        url, asked = data_url(scene, number), by_scene[scene]
        for turn in range(options.questions):
            question = asked[turn % len(asked)]
            bodies.append(chat(model, url, question, options.max_tokens) | fixed)
    return bodies[:count]


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def cache_tokens(text: str) -> int:
    """Tokens that the KV cache holds, 0 where the server does not say."""
    line = next((line for line in text.splitlines() if line.startswith(CACHE_SIZE)), "")
    found = [re.search(rf'{name}="(\d+)"', line) for name in ("num_gpu_blocks", "block_size")]
    return math.prod(int(one[1]) if one else 0 for one in found)


@contextlib.contextmanager
def watched_cache(url: str) -> Iterator[list[float]]:
    """How full the KV cache is, 0 to 1, several times a second while the block runs."""
    seen, done = [0.0], threading.Event()

    def look() -> None:
        with httpx.Client(timeout=30) as client:
            while not done.wait(LOOK):
                # A busy server may not answer in time; there is a next look.
                with contextlib.suppress(httpx.HTTPError):
                    seen.append(metric(client.get(f"{url}/metrics").text, CACHE_USE))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def drive(
    url: str, label: str, clients: int, first: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Send one load with so many clients at once and sum it up.

    As many requests as there are clients go before, uncounted, so that a server is warm.
    """
    limits = httpx.Limits(max_connections=clients)
    with httpx.Client(timeout=options.timeout, limits=limits) as client:
        served = client.get(f"{url}/v1/models").json()["data"][0]["id"]
        bodies = workload(options, served, first, max(options.requests, 2 * clients))
        with ThreadPoolExecutor(clients) as pool:
            warm = workload(options, served, -clients, clients)
            list(pool.map(lambda body: ask(client, url, body), warm))
            before, started = client.get(f"{url}/metrics").text, time.perf_counter()
            with watched_cache(url) as seen:
                sent = pool.map(lambda body: ask(client, url, body), bodies)
                outcomes = list(tqdm(sent, total=len(bodies), desc=label, disable=None))
            wall = time.perf_counter() - started
        after = client.get(f"{url}/metrics").text
    found = {key: metric(after, name) - metric(before, name) for key, name in METRICS.items()}
    room = cache_tokens(after)
    errors = Counter(one["error"] for one in outcomes if "error" in one)
    good = [one for one in outcomes if "error" not in one]
    if not good:
        raise SystemExit(
            f"{label}: no request was answered, {dict(errors)}; is this a vLLM server?"
        )
    return {
        "clients": clients,
        **summary(good, wall),
        "kv_tokens": round(max(seen) * room),
        "kv_room": room,
        **found,
        "errors": dict(errors),
    }


def summary(good: list[dict[str, Any]], wall: float) -> dict[str, float]:
    """What is reported of the answered requests."""
    first = [one["first_token_s"] for one in good]
    return {
        "answered": len(good),
        "requests_per_s": len(good) / wall,
        "tokens_per_s": sum(one["completion_tokens"] for one in good) / wall,
        "first_token_p50_s": statistics.median(first),
        "first_token_p95_s": percentile(first, 95),
        "prompt_tokens": statistics.fmean(one["prompt_tokens"] for one in good),
        "completion_tokens": statistics.fmean(one["completion_tokens"] for one in good),
    }


def percentile(values: list[float], percent: int) -> float:
    """The value below which `percent` of all lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@contextlib.contextmanager
def servers(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The address of every server by its label."""
    if options.url:
        labels = options.label or options.url
        if len(labels) != len(options.url):
            raise SystemExit(f"--label: {len(labels)} of them for {len(options.url)} addresses")
        yield {label: url.rstrip("/") for label, url in zip(labels, options.url, strict=True)}
        return
    with contextlib.ExitStack() as stack:
        found = {}
        for number, keep in enumerate(options.keep):
            words = ["--keep", str(keep), *shlex.split(options.vllm)]
            started = server(options.model, words, options.port + number)
            found[f"keep={keep:g}"], _ = stack.enter_context(started)
        yield found


def sweep(found: dict[str, str], options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All entries so far, one for every round and server, after each number of clients."""
    runs: list[dict[str, Any]] = []
    first = 1
    for clients in options.clients:
        for number in range(options.rounds):
            for label, url in found.items():
                shown = f"{clients} at once, round {number + 1}, {label}"
                one = drive(url, shown, clients, first, options)
                runs.append({"server": label, "round": number, **one})
            first += max(options.requests, 2 * clients)
        yield runs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint of the servers to start")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.25], help="their budgets")
    parser.add_argument("--vllm", default="", help="further options of vLLM's servers, one string")
    parser.add_argument("--port", type=int, default=8765, help="of the first one")
    parser.add_argument("--url", nargs="+", help="servers that run already, instead of --model")
    parser.add_argument("--label", nargs="+", help="what the report calls them")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--requests", type=int, default=64, help="in a round, at least two per client"
    )
    parser.add_argument("--questions", type=int, default=1, help="about every image in a row")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--ignore-eos", action="store_true", help="answers of --max-tokens each")
    parser.add_argument("--timeout", type=float, default=120, help="of one request, in seconds")
    parser.add_argument("-o", "--output", required=True, help="folder of report.md and the plot")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(options, name) for name in ("rounds", "requests", "max_tokens")}
    result = {"command": command_line(), "machine": environment(), **asked}
    with servers(options) as found:
        for runs in sweep(found, options):
            result["runs"] = runs
            write_text(folder / "results.json", json.dumps(result, indent=2) + "\n")
            write_text(folder / "report.md", report(result))
    print(report(result))
    try:
        plot(result, folder / "load.png")
    except ImportError as error:
        # All that was measured is written.
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
