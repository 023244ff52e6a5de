"""Options are checked when vLLM starts, before it loads weights or starts processes.

Knows: vLLM's hook for checks of a model's config. Does not know: what is right or wrong
(`options.py`).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from . import logger
from .options import ARCHITECTURE, plan_serving


class PiToMeLlavaConfig(VerifyAndUpdateConfig):
    """What vLLM asks before it builds the model."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse bad options in one line; say what is merged otherwise.

        Raises:
            TypeError: see `plan_serving`.
            ValueError: see `plan_serving`.
        """
        plan = plan_serving(vllm_config.model_config.hf_config)
        lora = vllm_config.lora_config
        if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
            raise ValueError(
                "--enable-tower-connector-lora cannot be served with merged tokens: vLLM counts "
                "the tokens of tower and projector by those that come out; leave it out (LoRA on "
                "the language model is served)"
            )
        logger.info("%s", plan)


def register_check() -> None:
    """Let vLLM make the check for our architecture."""
    MODELS_CONFIG_MAP[ARCHITECTURE] = PiToMeLlavaConfig
