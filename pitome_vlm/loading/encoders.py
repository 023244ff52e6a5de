"""Checkpoints of encoders on their own (CLIP, ViT, DINO, ...), as transformers saves them."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor

from ..adapters import model_types
from ..adapters.encoders import ENCODERS
from .checkpoints import existing, is_original, only_local, raw_config, squeezed
from .peft import find_adapter_at

_CLASSES = {name for record in ENCODERS for name in record.classes}
# A pooling layer that was not trained with the encoder; features do not depend on it.
_UNTRAINED = "pooler."


def encoder_class(path: str | os.PathLike[str], **source: Any) -> Any:
    """The class of transformers that a checkpoint of an encoder names; None for other checkpoints.

    Args:
        path: a folder or a name on the hub.
        **source: `revision`, `local_files_only`.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the hub does not have it, or cannot be reached.
        ValueError: config.json is missing or cannot be read.
    """
    raw = raw_config(existing(path), **source)
    if raw.get("model_type") in model_types() or is_original(raw):
        return None
    names = [name for name in raw.get("architectures") or () if name in _CLASSES]
    return getattr(transformers, names[0], None) if names else None


def is_encoder(path: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Whether a checkpoint is one of an encoder on its own; raises what `encoder_class` does."""
    local = only_local(path, revision=revision)
    source: dict[str, Any] = {"revision": revision, "local_files_only": local}
    return find_adapter_at(path, **source) is None and encoder_class(path, **source) is not None


def refuse_encoder(path: str | os.PathLike[str], revision: str | None = None) -> None:
    """Say that an encoder cannot be asked, before its weights are read.

    Raises:
        ValueError: the checkpoint is one of an encoder on its own; or see `encoder_class`.
    """
    if is_encoder(path, revision):
        raise ValueError(
            f"{path} is an encoder on its own and answers no questions; info, visualize and "
            "bench take it"
        )


def empty_encoder(path: str | os.PathLike[str], kind: Any) -> Any:
    """The model of a checkpoint without its weights, on the meta device."""
    config = AutoConfig.from_pretrained(existing(path))
    with torch.device("meta"):
        return kind(_own_config(kind, config))


def _own_config(kind: Any, config: Any) -> Any:
    """The part of a configuration that a class takes: an image tower's, saved with its text's."""
    if isinstance(config, kind.config_class):
        return config
    return getattr(config, "vision_config", config)


def load_encoder(name: str, kind: Any, *, allow_pickle: bool, **arguments: Any) -> tuple[Any, Any]:
    """A complete model in eval mode, and its processor or image processor.

    Args:
        name: a folder or hub name.
        kind: of `encoder_class`.
        allow_pickle: also load weights that are not safetensors.
        **arguments: of `from_pretrained`; None means not given.

    Raises:
        OSError: the hub cannot be reached.
        ValueError: weights are missing, damaged or not safetensors, or there is no processor.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    source = {key: given[key] for key in ("revision", "local_files_only") if key in given}
    try:
        processor = AutoProcessor.from_pretrained(name, **source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{name}: the processor cannot be loaded: {squeezed(error)}") from error
    if not allow_pickle:
        given["use_safetensors"] = True
    try:
        model, info = kind.from_pretrained(name, output_loading_info=True, **given)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: weights cannot be loaded: {squeezed(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if _UNTRAINED not in key)
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {kind.__name__}, the first is {missing[0]}; "
            "give a complete checkpoint"
        )
    return model.eval(), processor
