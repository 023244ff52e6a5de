"""The vLLM plugin: LLaVA with merged visual tokens in stock vLLM.

Knows: the name under which vLLM finds the model class. Does not know: anything else; vLLM calls
`register` in every process of every model, so nothing heavy is imported here. Without vLLM this
package can be imported, and `options` and `command` used.
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
    # A string, so that neither torch nor the model is imported before somebody asks for it.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    from vllm.model_executor.models import config as checks

    if hasattr(checks, "MODELS_CONFIG_MAP"):
        from .startup import register_check

        register_check()
    else:
        # A plugin must not take down a vLLM that serves something else. The model makes the
        # same check later, only less early.
        logger.warning("this vLLM has no hook for checks of a model's options")
    if os.environ.get(CONNECTOR_VARIABLE) == MEDIA_CONNECTOR:
        # Registers itself; asked for by name, so a vLLM that lacks the hook may say so.
        importlib.import_module(".pictures", __name__)
