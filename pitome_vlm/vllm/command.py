"""The command line that starts vLLM's own server with merging.

vLLM is not imported, only looked for. What the options mean is in `options.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from ..loading.images import ImageLimits
from . import CONNECTOR_VARIABLE
from .options import MEDIA_CONNECTOR, PlannedServing

OVERRIDES = "--hf-overrides"
PIXEL_LIMIT = "VLLM_MAX_IMAGE_PIXELS"
PLUGINS = "VLLM_PLUGINS"
PLUGIN = "pitome_vlm"


def overrides_argument(plan: PlannedServing) -> str:
    """`--hf-overrides '{...}'` for a shell."""
    return f"{OVERRIDES} {shlex.quote(json.dumps(plan.overrides()))}"


def server_command(model: str, plan: PlannedServing, extra: Sequence[str] = ()) -> list[str]:
    """The words that start vLLM's OpenAI-compatible server.

    Args:
        model: folder or hub name of the checkpoint.
        plan: what is merged.
        extra: further arguments for vLLM, as `vllm serve` takes them.

    Raises:
        ImportError: vLLM is not installed here.
        ValueError: `extra` sets what is set here.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed in this environment; run `pip install vllm`, or print the "
            "options for a server elsewhere with `pitome-vlm serve-args`"
        )
    for word in extra:
        # vLLM takes --hf-overrides.field and shortened names as well, and the last one wins.
        name = word.split("=")[0].split(".")[0].replace("_", "-")
        shortened = len(name) > len("--hf-") and OVERRIDES.startswith(name)
        if shortened or name == "--model":
            raise ValueError(
                f"{word.split('=')[0]} is set by this command; for further overrides start vLLM "
                "itself with what `pitome-vlm serve-args` prints"
            )
    own = [OVERRIDES, json.dumps(plan.overrides())]
    return [sys.executable, "-m", *_entry(model), *own, *extra]


def _entry(model: str) -> list[str]:
    """The command `vllm serve`, or the module that it runs where the command cannot start."""
    # Late, because it imports torch.
    from ..releases import vllm_command_starts

    if vllm_command_starts():
        return ["vllm.entrypoints.cli.main", "serve", model]
    return ["vllm.entrypoints.openai.api_server", "--model", model]


def server_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The server's environment variables: the caller's, and how images are read.

    Args:
        environment: to add to, None for this process's.

    Raises:
        ValueError: the environment keeps vLLM from loading the plugin.
    """
    given = dict(os.environ if environment is None else environment)
    allowed = given.get(PLUGINS)
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise ValueError(
            f"{PLUGINS}={allowed!r} keeps vLLM from loading this plugin; add {PLUGIN} to it or "
            "unset it"
        )
    reading = {PIXEL_LIMIT: str(ImageLimits().max_pixels), CONNECTOR_VARIABLE: MEDIA_CONNECTOR}
    return reading | given
