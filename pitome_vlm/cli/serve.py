"""`pitome-vlm serve`: vLLM's own server, with merging switched on and the options checked first.

All options that are not listed here are passed to vLLM as they are.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from . import options as o
from .serve_args import Checkpoint, MaxKeep, planned
from .terminal import quiet, say

LongVerbose = Annotated[bool, o.plain("Print details to stderr.", None, "--verbose")]


def serve(
    context: typer.Context,
    model: Checkpoint,
    merging: o.FixedMerging = o.FixedMerging(),
    max_keep: MaxKeep = None,
    verbose: LongVerbose = False,
) -> None:
    """Start vLLM's OpenAI-compatible server with merged visual tokens.

    Every option that is not listed here is passed to vLLM: `--port`, `--max-model-len`,
    `--tensor-parallel-size`, ... Without a budget, a quarter of the visual tokens is kept, or what
    the checkpoint's own pitome_config.json says.

    Example: `pitome-vlm serve PATH --keep 0.25 --port 8000 --limit-mm-per-prompt '{"image": 2}'`
    """
    if model.startswith("-"):
        raise ValueError(f"PATH comes first: pitome-vlm serve PATH {model} ...")
    given = merging.given()
    with quiet(verbose):
        plan = planned(model, given, max_keep)
    from ..vllm.command import server_command, server_environment
    from .session import model_path

    command = server_command(model_path(model), plan, context.args)
    environment = server_environment()
    say(str(plan))
    # This replaces the process, so that signals and the exit status are vLLM's own.
    os.execve(command[0], command, environment)
