"""The vLLM plugin: LLaVA with merged visual tokens in stock vLLM.

vLLM calls `register` in every process of every model, so nothing heavy is imported here. Without
vLLM this package can be imported, and `options` and `command` work.
"""

from __future__ import annotations

import importlib
import logging
import os

from .options import (
    ARCHITECTURE,
    MEDIA_CONNECTOR,
    PlannedServing,
    hf_overrides,
    plan_serving,
    served_config,
)

__all__ = [
    "ARCHITECTURE",
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
    # A string, so that neither torch nor the model is imported before the model is asked for.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
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
