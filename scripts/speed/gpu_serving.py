"""The GPU benchmark's part on serving: vLLM under load, in processes of its own.

The other steps are in `gpu_bench.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from pitome_vlm.vllm.command import PLUGIN

from .gpu_run import Run

# Two servers start, one after the other, and are asked with 1 to 32 clients.
SECONDS, MOST_SECONDS = 240, 330
KEEPS = ("1.0", "0.11")


def has_vllm() -> bool:
    """Whether it is installed, and finds this package as a plugin; importing it takes long."""
    plugins = metadata.entry_points(group="vllm.general_plugins")
    return importlib.util.find_spec("vllm") is not None and PLUGIN in plugins.names


def serving(run: Run, name: str) -> None:
    """Answers per second and time to the first token from two servers on one device, in turns.

    Args:
        run: the whole run.
        name: of the shape whose random weights are served, unless `--served` names a checkpoint.

    Raises:
        RuntimeError: a command failed, or took all the time that was left.
    """
    title, out = "## vLLM under load", run.options.out.resolve() / "serving"
    if not has_vllm() or run.left < SECONDS:
        why = f"{run.left:.0f} s were left" if has_vllm() else "vLLM or its plugin is missing"
        run.add("", title, "", f"Left out: {why}.")
        return
    words = ["--keep", *KEEPS, "--rounds", "2", "--max-tokens", "16", "--ignore-eos"]
    words += ["--requests", str(run.options.requests), f"--vllm={run.options.vllm}"]
    with tempfile.TemporaryDirectory() as folder:
        if not run.options.served:
            make = ("random_llava", folder, "--shape", name, "--no-weights")
            command(run, Path(folder), *make)
        model = run.options.served or folder
        try:
            command(run, Path(folder), "load", "--model", model, *words, "--output", str(out))
        finally:
            # Written after every number of clients.
            if (out / "report.md").is_file():
                run.add("", title, "", shown(out))


def shown(out: Path) -> str:
    """The report of a load test without its title, its plot linked from the folder above."""
    _, _, report = (out / "report.md").read_text(encoding="utf-8").partition("\n\n")
    drawn = (out / "load.png").is_file()
    lines = [line for line in report.rstrip().split("\n") if drawn or "(load.png)" not in line]
    return "\n".join(lines).replace("(load.png)", f"({out.name}/load.png)")


def command(run: Run, folder: Path, script: str, *words: str) -> None:
    """One of the scripts of `scripts.serving`; nothing that it starts outlives it."""
    log = folder / "log"
    with log.open("w") as file:
        # In a session of its own, so that it is stopped together with its servers.
        process = subprocess.Popen(
            [sys.executable, "-m", f"scripts.serving.{script}", *words],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=max(1.0, min(run.left, MOST_SECONDS)))
        except subprocess.TimeoutExpired:
            status = "none, as the time was up"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status != 0:
        last = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        raise RuntimeError(f"scripts.serving.{script} ended with status {status}: {last}")
