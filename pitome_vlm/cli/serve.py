"""`pitome-vlm serve`: vLLM's own server, with merging switched on and the options checked first.

Knows: its options, and that all others are vLLM's. Does not know: how the server is started
(`pitome_vlm.vllm.command`) or what it does then.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from . import options as o
from .serve_args import Checkpoint, planned
from .terminal import quiet, say

LongVerbose = Annotated[bool, typer.Option("--verbose", help="Details on stderr.")]


def serve(
    context: typer.Context,
    model: Checkpoint,
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    algorithm: o.Algorithm = None,
    preset: o.Preset = None,
    verbose: LongVerbose = False,
    debug: o.Debug = False,
) -> None:
    """Start vLLM's OpenAI-compatible server with merged visual tokens.

    Every option that is not listed here goes to vLLM as it is: `--port`, `--max-model-len`,
    `--tensor-parallel-size`, ... Without a budget: what the checkpoint's own pitome_config.json
    says, else a quarter is kept.

    Example: `pitome-vlm serve PATH --keep 0.25 --port 8000 --limit-mm-per-prompt '{"image": 2}'`
    """
    del debug  # read by the command group
    if model.startswith("-"):
        raise ValueError(f"PATH comes first: pitome-vlm serve PATH {model} ...")
    with quiet(verbose):
        plan = planned(model, o.MergeOptions(keep, tokens, ratio, algorithm, preset))
    from ..vllm.command import server_command, server_environment
    from .session import model_path

    command = server_command(model_path(model), plan.config, context.args)
    environment = server_environment()
    say(str(plan))
    # In place of this process, so that signals and the exit status are vLLM's own.
    os.execve(command[0], command, environment)
