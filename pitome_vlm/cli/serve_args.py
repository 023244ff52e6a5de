"""`pitome-vlm serve-args`: what to pass to vLLM for a merge config.

Neither weights nor vLLM are loaded; `pitome_vlm.vllm.options` says what vLLM supports.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .terminal import quiet, say, write

if TYPE_CHECKING:
    from ..vllm import PlannedServing

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="Folder or Hub name of a checkpoint, or `demo`.",
        show_default=False,
    ),
]
MaxKeep = Annotated[
    float | None,
    o.plain(
        "Largest fraction of an image's visual tokens that a request may ask for "
        "(default: the server's budget).",
        None,
        "--max-keep",
    ),
]


def serve_args(
    model: Checkpoint,
    merging: o.FixedMerging = o.FixedMerging(),
    max_keep: MaxKeep = None,
    as_json: Annotated[
        bool, o.plain("Print the bare JSON object, for LLM(hf_overrides=...).", None, "--json")
    ] = False,
    verbose: o.Verbose = False,
) -> None:
    """Print the --hf-overrides that make vLLM serve a checkpoint with merged tokens.

    What is merged is printed to stderr. Without a budget, a quarter of the visual tokens is kept,
    or what the checkpoint's own pitome_config.json says.

    Example: `pitome-vlm serve-args llava-hf/llava-1.5-7b-hf --keep 0.25`
    """
    given = merging.given()
    with quiet(verbose):
        plan = planned(model, given, max_keep)
    from ..vllm.command import overrides_argument

    say(str(plan))
    text = json.dumps(plan.overrides()) if as_json else overrides_argument(plan)
    write(text, fold=False)


def planned(model: str, merging: dict[str, Any], max_keep: float | None) -> PlannedServing:
    """What a server would merge; wrong options are refused here, before anything is started."""
    from ..vllm.options import config_of, plan_serving
    from .session import model_path, planned_config, summary

    config, origin = planned_config(model, merging)
    if origin:
        say(f"Merging with {summary(config, origin)}")
    return plan_serving(config_of(model_path(model)), config, max_keep=max_keep)
