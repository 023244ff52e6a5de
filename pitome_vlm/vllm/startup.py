"""Options are checked when vLLM starts, before it loads weights or starts processes.

This is vLLM's hook for it; what is right or wrong is decided in `options.py`.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..releases import vllm_config_checks
from .options import ARCHITECTURE, plan_serving

logger = logging.getLogger("vllm.pitome_vlm")


class PiToMeLlavaConfig(VerifyAndUpdateConfig):
    """What vLLM asks before it builds the model."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse bad options in one line, or else log what is merged.

        Raises:
            TypeError: see `plan_serving`.
            ValueError: see `plan_serving`.
        """
        plan = plan_serving(vllm_config.model_config.hf_config)
        lora = vllm_config.lora_config
        if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
            raise ValueError(
                "--enable-tower-connector-lora cannot be served with merged tokens: vLLM assumes "
                "that tower and projector see as many tokens as come out; leave it out (LoRA on "
                "the language model is served)"
            )
        logger.info("%s", plan)


def register_check() -> None:
    """Let vLLM make the check for this plugin's architecture."""
    checks = vllm_config_checks()
    assert checks is not None
    checks[ARCHITECTURE] = PiToMeLlavaConfig
