"""Memory of vLLM servers that are asked thousands of questions, every fifth of them broken.

    python -m scripts.serving.memory --keep 0.25 1.0 --kernels 16 1024 --thousands 6 -o memory

One server after the other for every model, budget and `--kernels`. Memory is what a process holds
for itself (RssAnon of /proc/PID/status): neither the files it maps nor the buffers that vLLM's
processes share, which have a fixed size and are touched bit by bit.

`--kernels` is how many compiled kernels oneDNN keeps in a process
(ONEDNN_PRIMITIVE_CACHE_CAPACITY, 1024 by default): one for every shape of every matrix product, and
the shapes depend on which requests a batch happens to hold. Until that many were made a server on
a CPU grows, whatever it serves.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import random
import shlex
import struct
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pitome_vlm.demo import load_split

from ..command import command_line
from .client import chat, data_url, environment, httpx, server

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
QUESTIONS = 60
BROKEN_SHARE = 0.2
WARM_UP = 250
SERVER = (
    "--dtype float32 --enforce-eager --max-model-len 400 --max-num-seqs 16 "
    "--mm-processor-cache-gb 0.05"
)
MEANING = """Memory that belongs to a process and no file (RssAnon), in MiB; "workers" are all
processes that the front end started. A fifth of the requests hold a broken image, of nine kinds.
keep=1 runs stock vLLM's own code on every image. "Kernels" is ONEDNN_PRIMITIVE_CACHE_CAPACITY,
how many compiled kernels oneDNN keeps in a process: one for every shape of every matrix product,
1024 where nobody sets it."""


def as_url(content: bytes) -> str:
    """What a browser would send as a PNG file."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def broken_urls(good: str) -> dict[str, str]:
    """Addresses of images that no server can read, by what is wrong with them.

    Args:
        good: one that can be read, as `data:` address.
    """
    raw = base64.b64decode(good.partition(",")[2])
    damaged = bytearray(raw)
    damaged[12:16] = b"XXXX"  # the name of its first part
    return {
        "bad base64": "data:image/png;base64,@@@ this is not base64",
        "text as image": as_url(b"hello, I am a text"),
        "empty": as_url(b""),
        "cut off": as_url(raw[: len(raw) // 2]),
        "damaged": as_url(bytes(damaged)),
        "damaged later": as_url(_damaged_later(raw)),
        "oversized": as_url(_blank(9000)),
        "decompression bomb": as_url(_blank(20000)),
        "a file of the server": "file:///etc/passwd",
        "no address": "nonsense",
    }


def _damaged_later(png: bytes) -> bytes:
    """The same image with its pixels in two parts, of which the second has no readable name."""
    start = png.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", png[start : start + 4])
    pixels = png[start + 8 : start + 8 + length]
    first = b"IDAT" + pixels[: length // 2]
    checked = struct.pack(">I", len(first) - 4) + first + struct.pack(">I", zlib.crc32(first))
    return png[:start] + checked + struct.pack(">I", length) + b"\0\0\0\0" + pixels


def _blank(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def held(pid: int) -> dict[str, int]:
    """Bytes that a server's front end holds for itself, and all processes it started."""
    started, front = [], own_memory(pid)
    waiting = children(pid)
    while waiting:
        child = waiting.pop()
        started.append(own_memory(child))
        waiting += children(child)
    return {"front end": front, "workers": sum(started)}


def children(pid: int) -> list[int]:
    """Ids of the processes that a process started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def own_memory(pid: int) -> int:
    """Bytes of memory that belong to one process and no file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has ended")


def requests(
    model: str, count: int, seed: int, sizes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Questions about scenes of the test split with broken ones among them.

    Args:
        model: as the server calls it.
        count: of requests.
        seed: of the draw.
        sizes: in pixels, in turns; empty for the scenes' own.
    """
    draw = random.Random(seed)
    asked = load_split("test", QUESTIONS)
    scenes = dict.fromkeys(one.scene_id for one in asked)
    turns = itertools.cycle(sizes or [None])
    good = {one: data_url(one, size=own) for one, own in zip(scenes, turns, strict=False)}
    bad = list(broken_urls(next(iter(good.values()))).values())
    found = []
    for _ in range(count):
        one = draw.choice(asked)
        url = draw.choice(bad) if draw.random() < BROKEN_SHARE else good[one.scene_id]
        body = chat(model, url, one.question, 3)
        del body["stream"], body["stream_options"]
        found.append(body)
    return found


def size(words: str) -> tuple[int, int]:
    """Width and height of "640x480"."""
    width, height = words.split("x")
    return int(width), int(height)


def watch(url: str, pid: int, label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of one server after every thousand requests."""
    rows, codes = [], Counter[int]()
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(options.clients) as pool:
        model = client.get(f"{url}/v1/models").json()["data"][0]["id"]

        def send(body: dict[str, Any]) -> int:
            return client.post(f"{url}/v1/chat/completions", json=body).status_code

        sent = 0
        for step in tqdm(range(options.thousands + 1), desc=label, disable=None):
            count = 1000 if step else WARM_UP
            codes.update(pool.map(send, requests(model, count, step, options.sizes)))
            sent += count
            rows.append({"requests": sent, **held(pid)})
    return {"label": label, "rows": rows, "codes": dict(sorted(codes.items()))}


def report(runs: list[dict[str, Any]], machine: dict[str, Any], command: str) -> str:
    """One table; MiB after every thousand requests."""
    sent = [row["requests"] for row in runs[0]["rows"]]
    lines = [f"| after requests | {' | '.join(map(str, sent))} |", "|---" * (len(sent) + 1) + "|"]
    for run in runs:
        for name in ("front end", "workers"):
            cells = [f"{row[name] / 2**20:.0f}" for row in run["rows"]]
            lines.append(f"| {run['label']}: {name} | {' | '.join(cells)} |")
    codes = "; ".join(
        f"{run['label']}: "
        + ", ".join(f"{count} times HTTP {code}" for code, count in run["codes"].items())
        for run in runs
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += ["", MEANING, "", f"Answers: {codes}.", "", f"{machine['processor']}, {versions}."]
    lines += ["", f"Command: `{command}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["demo"])
    parser.add_argument("--sizes", type=size, nargs="+", default=[], help="of images, as 640x480")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--kernels", type=int, nargs="+", default=[16], help="that oneDNN keeps")
    parser.add_argument("--thousands", type=int, default=6, help="of requests")
    parser.add_argument("--clients", type=int, default=12, help="requests in flight at most")
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--vllm", default=SERVER, help="options of vLLM's server, one string")
    parser.add_argument("-o", "--output", required=True, help="without suffix: .md and .json")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for model, kernels, keep in itertools.product(options.model, options.kernels, options.keep):
        words = ["--keep", str(keep), *shlex.split(options.vllm)]
        label = f"{Path(model).name}, keep={keep:g}, {kernels} kernels"
        with server(model, words, options.port, {KERNELS: str(kernels)}) as (url, pid):
            runs.append(watch(url, pid, label, options))
        # Every time, so that hours are not lost with the last server.
        write(runs, Path(options.output))
    print(Path(options.output + ".md").read_text())


def write(runs: list[dict[str, Any]], output: Path) -> None:
    """Into two files, called as `output` with a suffix."""
    machine, command = environment(), command_line()
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": command, "machine": machine, "runs": runs}
    output.with_name(output.name + ".json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"# Memory of a vLLM server in MiB\n\n{report(runs, machine, command)}"
    output.with_name(output.name + ".md").write_text(text)


if __name__ == "__main__":
    main()
