"""The vLLM plugin: LLaVA and its relatives with merged visual tokens in stock vLLM.

vLLM calls `register` in every process of every model, so nothing heavy is imported here. Without
vLLM this package can be imported, and `options` and `command` work.
"""

from __future__ import annotations

import importlib
import logging
import os

from .options import (
    MEDIA_CONNECTOR,
    PlannedServing,
    hf_overrides,
    plan_serving,
    served_config,
)
from .served import ARCHITECTURE, ARCHITECTURES, SERVED

__all__ = [
    "ARCHITECTURE",
    "ARCHITECTURES",
    "PlannedServing",
    "hf_overrides",
    "plan_serving",
    "register",
    "served_config",
]

CONNECTOR_VARIABLE = "VLLM_MEDIA_CONNECTOR"
logger = logging.getLogger("vllm.pitome_vlm")


def register() -> None:
    """Entry point in the group `vllm.general_plugins`; calling it again changes nothing."""
    from vllm import ModelRegistry

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    # Strings, so that neither torch nor a model is imported before it is asked for.
    for one in SERVED.values():
        ModelRegistry.register_model(
            one.architecture, f"{__name__}.{one.module}:{one.architecture}"
        )
    from ..releases import vllm_config_checks

    if vllm_config_checks() is None:
        # A plugin must not take down a vLLM that serves something else. The model makes the same
        # check, only later.
        logger.warning("this vLLM has no hook for checks of a model's options")
    else:
        from .startup import register_check

        register_check()
    if os.environ.get(CONNECTOR_VARIABLE) == MEDIA_CONNECTOR:
        # Registers itself. Somebody asked for it by name, so a vLLM without that hook fails here.
        importlib.import_module(".images", __name__)
