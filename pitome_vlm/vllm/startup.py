"""Options are checked when vLLM starts, before it loads weights or starts processes.

This is vLLM's hook for it. What is right or wrong is decided in `options.py`; here is what follows
for vLLM's own config, and which of vLLM's features go together with calibration.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.selector import get_attn_backend

from ..releases import vllm_config_checks
from .language_config import UNCALIBRATED
from .options import OPTIONS_KEY, PlannedServing, plan_serving
from .served import ARCHITECTURES, SERVED

logger = logging.getLogger("vllm.pitome_vlm")

# The widest head of any backend.
WIDEST = 512
# Drafts from the text so far; other methods run models of their own on hidden states or embeddings.
DRAFTS_FROM_TEXT = ("ngram", "ngram_gpu", "suffix")


class MergedConfig(VerifyAndUpdateConfig):
    """What vLLM asks before it builds the model."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse bad options in one line, or else log what is merged and prepare vLLM for it.

        Raises:
            TypeError: see `plan_serving`.
            ValueError: see `plan_serving`, or an option of vLLM that does not go with it.
        """
        model = vllm_config.model_config
        plan = plan_serving(model.hf_config)
        # What vLLM checks of its own class, by its name.
        own = (vllm_config_checks() or {}).get(plan.architecture.removeprefix("PiToMe"))
        if own is not None:
            own.verify_and_update_config(vllm_config)
        if plan.architecture not in model.hf_config.architectures:
            raise ValueError(
                f"hf_overrides chose {model.hf_config.architectures[0]}, but a model of type "
                f"{plan.model_type!r} is served by {plan.architecture}; give hf_overrides the "
                "model as well, or take what `pitome-vlm serve-args PATH` prints"
            )
        if OPTIONS_KEY in (model.multimodal_config.mm_processor_kwargs or {}):
            raise ValueError(
                f'--mm-processor-kwargs holds "{OPTIONS_KEY}", which is for single requests; what '
                "a server merges belongs into --hf-overrides"
            )
        lora = vllm_config.lora_config
        if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
            raise ValueError(
                "--enable-tower-connector-lora cannot be served with merged tokens: vLLM assumes "
                "that tower and projector see as many tokens as come out; leave it out (LoRA on "
                "the language model is served)"
            )
        if plan.merges:
            leave_out(vllm_config)
        if plan.is_calibrated:
            refuse(vllm_config, plan)
        if plan.places and not SERVED[plan.model_type].grid_places:
            # All that vLLM looks at to ask a model for positions. The language model's own config
            # stays as it is, and with it the rotary embedding that it builds.
            half = model.get_head_size() // 2
            section = {"rope_type": "default", "mrope_section": [half, 0, 0]}
            model.hf_config.rope_parameters = section
        if plan.size_bias:
            widen(vllm_config)
        if plan.merges and model.is_mm_prefix_lm and current_platform.is_cpu():
            logger.warning(
                "on a CPU vLLM lets no token of an image see a later one, merged or not, which "
                "models of type %r were trained to do; answers are worse than transformers'",
                plan.model_type,
            )
        logger.info("%s", plan)


def leave_out(vllm_config: Any) -> None:
    """Switch off what would run an encoder without its merges."""
    own = vllm_config.compilation_config
    for name in ("cudagraph_mm_encoder", "compile_mm_encoder"):
        if getattr(own, name, False):
            logger.warning("%s is off: it would pass by where tokens are merged", name)
            setattr(own, name, False)


def refuse(vllm_config: Any, plan: PlannedServing) -> None:
    """Refuse what cannot be combined with calibration.

    Raises:
        ValueError: something of it is asked for.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model, drafts = vllm_config.model_config, vllm_config.speculative_config
    embeds = getattr(model.multimodal_config, "enable_mm_embeds", False)
    dtypes = ("auto", str(model.dtype).removeprefix("torch."))
    found = {
        "--pipeline-parallel-size": (
            parallel.pipeline_parallel_size > 1 and parallel.pipeline_parallel_size,
            "only its first stage sees sizes and places; use --tensor-parallel-size",
        ),
        "--prefill-context-parallel-size": (
            parallel.prefill_context_parallel_size > 1 and parallel.prefill_context_parallel_size,
            "a step's tokens are divided after their sizes are known; leave it out",
        ),
        "--enable-dbo": (
            parallel.use_ubatching,
            "two halves of a batch would share one table of sizes and places; leave it out",
        ),
        "--kv-cache-dtype": (
            cache.cache_dtype not in dtypes and cache.cache_dtype,
            f"it would round sizes; use {' or '.join(dtypes)}",
        ),
        "--speculative-config method": (
            drafts is not None and drafts.method not in DRAFTS_FROM_TEXT and drafts.method,
            f"a draft model would not know sizes; use {', '.join(DRAFTS_FROM_TEXT)}",
        ),
        "--video-pruning-rate": (
            getattr(model.multimodal_config, "video_pruning_rate", None),
            "what vLLM prunes has no sizes; leave it out",
        ),
        "--enable-mm-embeds": (
            embeds,
            "embeddings from outside have no sizes; send images",
        ),
    }
    for name, (value, reason) in found.items():
        if value:
            shown = name if value is True else f"{name}={value}"
            advice = f", or serve with {UNCALIBRATED} (which costs accuracy)"
            # Without places at all these models cannot be told anything.
            advice = "" if SERVED[plan.model_type].grid_places else advice
            raise ValueError(f"{shown} cannot be combined with calibration: {reason}{advice}")


def widen(vllm_config: Any) -> None:
    """Make heads wide enough for the size bias, for layers and builders of metadata alike.

    Raises:
        ValueError: the attention backend takes no such head.
    """
    from ..merge.size_channels import channel_width

    model = vllm_config.model_config
    head = model.get_head_size()
    least = channel_width(head)
    found = smallest_head(vllm_config, least)
    if found is None:
        chosen = vllm_config.attention_config.backend
        other = copy.copy(vllm_config)
        other.attention_config = copy.copy(vllm_config.attention_config)
        other.attention_config.backend = None
        better = smallest_head(other, least)
        advice = f"--attention-backend {better[1]} takes {better[0]}; use it, or" if better else ""
        raise ValueError(
            f"attention backend {getattr(chosen, 'name', 'of this platform')} takes no head of "
            f"{least} channels or more, which the size bias needs ({head} of the model and its "
            f"own): {advice} serve with {UNCALIBRATED} (which costs accuracy)"
        )
    wide, backend = found
    model.model_arch_config.head_size = wide
    logger.info(
        "size bias: heads of %d channels become %d in the KV cache (%s), which takes %.0f %% more "
        "memory per token",
        head,
        wide,
        backend,
        100 * (wide - head) / head,
    )


def smallest_head(vllm_config: Any, least: int) -> tuple[int, str] | None:
    """The smallest head size from `least` on that a backend takes, and the backend's name."""
    model, cache_dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    dtype, both_ways = model.dtype, model.is_mm_prefix_lm
    for size in range(least, WIDEST + 1, 8):
        with set_current_vllm_config(vllm_config):
            try:
                backend = get_attn_backend(size, dtype, cache_dtype, use_mm_prefix=both_ways)
            except (ValueError, NotImplementedError):
                continue
        # Not every platform asks its backend.
        if backend.supports_head_size(size):
            return size, backend.get_name()
    return None


def register_check() -> None:
    """Let vLLM make the check for this plugin's architectures."""
    checks = vllm_config_checks()
    assert checks is not None
    for architecture in ARCHITECTURES.values():
        checks[architecture] = MergedConfig
