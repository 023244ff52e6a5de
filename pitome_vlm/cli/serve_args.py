"""`pitome-vlm serve-args`: what to pass to vLLM for a merge config.

Knows: its options. Does not know: what vLLM can and cannot do (`pitome_vlm.vllm.options`). Neither
weights nor vLLM are loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..merge.config import CONFIG_NAME, MergeConfig
from . import options as o
from .terminal import quiet, say, write

if TYPE_CHECKING:
    from ..vllm import PlannedServing

DEFAULT_KEEP = 0.25

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="Folder or Hub name of a LLaVA checkpoint, or `demo`.",
        show_default=False,
    ),
]


def serve_args(
    model: Checkpoint,
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    algorithm: o.Algorithm = None,
    preset: o.Preset = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The bare JSON object, for LLM(hf_overrides=...).")
    ] = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Print the --hf-overrides that make vLLM serve a checkpoint with merged tokens.

    What is merged goes to stderr. Without a budget: what the checkpoint's own pitome_config.json
    says, else a quarter is kept.

    Example: `pitome-vlm serve-args llava-hf/llava-1.5-7b-hf --keep 0.25`
    """
    del debug  # read by the command group
    with quiet(verbose):
        plan = planned(model, o.MergeOptions(keep, tokens, ratio, algorithm, preset))
    from ..vllm.command import overrides_argument
    from ..vllm.options import hf_overrides

    say(str(plan))
    text = json.dumps(hf_overrides(plan.config)) if as_json else overrides_argument(plan.config)
    write(text)


def planned(model: str, options: o.MergeOptions) -> PlannedServing:
    """What a server would merge; everything that can be wrong with the options is said here.

    Args:
        model: what the user named.
        options: of the command line.

    Raises:
        OSError: the checkpoint's config cannot be read.
        TypeError: see `plan_serving`.
        ValueError: see `plan_serving`.
    """
    from ..vllm.options import plan_serving
    from ..wrapping.wrap import make_config
    from .session import check_algorithm, model_path

    # A preset's other fields need a budget beside them.
    merging = options.given(DEFAULT_KEEP if options.preset else None)
    check_algorithm(merging)
    name = model_path(model)
    if "config" in merging:
        return plan_serving(_config_of(name), merging["config"])
    saved = MergeConfig.from_pretrained(name) if (Path(name) / CONFIG_NAME).is_file() else None
    if saved is None and not {"keep", "tokens", "ratio"} & merging.keys():
        merging = {"keep": DEFAULT_KEEP, **merging}
    return plan_serving(_config_of(name), make_config(saved, **merging))


def _config_of(name: str) -> Any:
    from transformers import AutoConfig

    from ..loading.checkpoints import existing

    # Not `read_config`: models that the library cannot wrap are refused with vLLM's reasons.
    try:
        return AutoConfig.from_pretrained(existing(name))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
        raise ValueError(f"{name}: its config.json cannot be read: {error}") from error
