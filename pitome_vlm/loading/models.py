"""`load`: from a path to a model and its processor, wrapped if a budget is known.

Puts checkpoint, quantisation, PEFT adapter and wrapping together in the right order, and completes
old processors.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.utils import cached_file

from ..adapters import find_adapter
from ..adapters.tower_tokens import has_class_token
from ..demo import resolve
from ..merge.config import CONFIG_NAME, MergeConfig
from ..wrapping.wrap import make_config, wrap
from .checkpoints import existing, load_weights, only_local, read_config, squeezed, torch_dtype
from .encoders import encoder_class, load_encoder
from .peft import SavedAdapter, find_adapter_at
from .quantization import (
    check_quantised,
    keep_unpackable,
    quantization,
    recorded_quantization,
    unquantised_dtype,
)


def load(
    path: str | os.PathLike[str],
    *,
    keep: float | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    config: MergeConfig | None = None,
    dtype: str | torch.dtype | None = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quantization_config: Any = None,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """A model and its processor, ready to answer, wrapped if a budget is known.

    A `pitome_config.json` in the checkpoint's folder restores that wrapping. A budget given here
    replaces its budget and keeps its other options; `config` replaces it altogether. Without
    either, the model comes back unwrapped.

    The path of a PEFT adapter gives its base model with the adapter on it, quantised and merged
    as it was trained; arguments given here take precedence.

    Args:
        path: a folder or a name on the Hugging Face hub, of a model (an encoder on its own, too;
            its processor may be an image processor), or a PEFT adapter; or "demo"
            for the bundled model (a folder `demo` in the working directory with a model in it
            comes first).
        keep: fraction of an image's visual tokens to keep, in (0, 1].
        tokens: the same as a count per image.
        ratio: the paper's r, the fraction kept at every merging layer.
        config: a ready `MergeConfig`; a budget or options given as well replace its own.
        dtype: "auto" (or None) for the checkpoint's, a torch dtype, or one of `DTYPES`. For a
            quantised model, the dtype of everything that is not quantised; "auto" then turns a
            float32 checkpoint to 16 bits if the device computes fast in them.
        device_map: as for `from_pretrained`. If a dict uses an accelerator, the modules that it
            puts on "cpu" or "disk" are not quantised.
        attn_implementation: as for `from_pretrained`, like `max_memory`, `offload_folder` and
            `local_files_only`.
        load_in_4bit: quantise the language model (bitsandbytes nf4, double quantisation).
        load_in_8bit: the same with LLM.int8().
        quantization_config: your own, checked after loading against its
            `llm_int8_skip_modules`. False loads the base model of an adapter unquantised.
        max_memory: how much each device may hold.
        offload_folder: where parts on "disk" go.
        base: the base model of an adapter, if it has moved.
        trainable: leave an adapter's weights trainable.
        trust_remote_code: run Python code that comes with the checkpoint.
        allow_pickle: also load weights that are not safetensors; such a file can run any code.
        revision: branch, tag or commit on the hub (of the adapter, if `path` is one).
        local_files_only: do not use the network.
        **options: fields of `MergeConfig`, for instance `algorithm="tome"`.

    Returns:
        (model in eval mode, processor). The model is a `PeftModel` if `path` is an adapter.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the hub does not have it, or cannot be reached.
        TypeError: not a supported model.
        ValueError: the checkpoint is incomplete or damaged, an option is out of range, or an
            adapter belongs to another model.
        ImportError: bitsandbytes or PEFT is needed and not installed.
        RuntimeError: the wrong layers were quantised.
    """
    path = resolve(path)
    if isinstance(path, (str, os.PathLike)):
        local_files_only = only_local(path, revision=revision, local_files_only=local_files_only)
    source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    adapter = find_adapter_at(path, allow_pickle=allow_pickle, **source)
    if base is not None and adapter is None:
        raise ValueError(f"base={os.fspath(base)} is for PEFT adapters, which {path} is not")
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    quantised = _quantization(adapter, bits, quantization_config, device_map)
    name = existing(path if adapter is None else adapter.base(base))
    if adapter is not None:
        config = config or saved_merge_config(adapter.path, **source)
        dtype = adapter.record.base_dtype if dtype in (None, "auto") else dtype
        source = source | {"revision": adapter.record.base_revision if base is None else None}
    given = dict(options, keep=keep, tokens=tokens, ratio=ratio)
    encoder = None if adapter is not None else encoder_class(name, **source)
    if encoder is not None:
        if quantised:
            raise ValueError(f"{name} is an encoder on its own, which cannot be loaded quantised")
        merging = _merging(name, source, config, given)
        own: dict[str, Any] = {
            "attn_implementation": attn_implementation,
            "dtype": torch_dtype(dtype),
        }
        own |= {"device_map": device_map, "allow_pickle": allow_pickle, **source}
        model, processor = load_encoder(name, encoder, **own)
        return (model if merging is None else wrap(model, config=merging)), processor
    model_config = read_config(name, trust_remote_code=trust_remote_code, **source)
    merging = _merging(name, source, config, given)
    plain, ours = torch_dtype(dtype), any(bits.values())
    if ours:
        plain = unquantised_dtype(plain, getattr(model_config, "dtype", None), device_map)
    source["trust_remote_code"] = trust_remote_code
    placed = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    extra = {"attn_implementation": attn_implementation, "quantization_config": quantised}
    extra |= {"dtype": plain, "allow_pickle": allow_pickle}
    # First, because weights take long to read.
    processor = _load_processor(name, source)
    model = load_weights(name, model_config, **source, **placed, **extra)
    check_quantised(model, language_model_only=ours)
    keep_unpackable(model)
    processor = complete_processor(processor, model)
    if adapter is not None:
        model = adapter.attach(model, trainable=trainable)
    return (model if merging is None else wrap(model, config=merging)), processor


def saved_merge_config(
    path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> MergeConfig | None:
    """The merge config saved with a checkpoint; None if there is none.

    Raises:
        ValueError: the file is damaged or holds a wrong value.
    """
    found = cached_file(
        os.fspath(path),
        CONFIG_NAME,
        revision=revision,
        local_files_only=local_files_only,
        # The file is optional; problems with the hub show up when config.json is read.
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else MergeConfig.from_pretrained(found)


def complete_processor(processor: Any, model: Any) -> Any:
    """Give an old processor what it needs to count image placeholders; in place.

    Processors saved before transformers 4.45 lack `patch_size` and others, and write one
    placeholder per image, which today's models refuse. As the documentation of transformers
    recommends, the values are taken from the model.

    Args:
        processor: of a LLaVA; others are left alone.
        model: the LLaVA itself.

    Returns:
        The same processor.
    """
    if find_adapter(model).own_scatter:
        return processor
    missing = [
        name
        for name in ("patch_size", "vision_feature_select_strategy")
        if getattr(processor, name, None) is None
    ]
    if "patch_size" in missing:
        processor.patch_size = model.config.vision_config.patch_size
        # Such a processor does not count the class token either; 0 is only its default.
        processor.num_additional_image_tokens = int(
            has_class_token(find_adapter(model).parts(model).vision_tower)
        )
    if "vision_feature_select_strategy" in missing:
        # ViP-LLaVA has no such option: it always drops the class token.
        strategy = getattr(model.config, "vision_feature_select_strategy", None)
        processor.vision_feature_select_strategy = strategy or "default"
    return processor


def _quantization(
    adapter: SavedAdapter | None, bits: dict[str, bool], config: Any, device_map: Any
) -> Any:
    """As the caller asks, else as the adapter was trained."""
    asked = config is not None or any(bits.values())
    if adapter is not None and adapter.record.quantization and not asked:
        return recorded_quantization(adapter.record.quantization, device_map)
    own = None if config is False else config
    return quantization(**bits, quantization_config=own, device_map=device_map)


def _merging(
    name: str, source: dict[str, Any], config: MergeConfig | None, options: dict[str, Any]
) -> MergeConfig | None:
    start = saved_merge_config(name, **source) if config is None else config
    given = any(value is not None for value in options.values())
    return make_config(start, **options) if given else start


def _load_processor(name: str, source: dict[str, Any]) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(name, **source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{name}: the processor cannot be loaded: {squeezed(error)}") from error
    lacking = [part for part in ("tokenizer", "image_processor") if not hasattr(processor, part)]
    if lacking:
        raise ValueError(
            f"{name} has no complete processor (no {' and no '.join(lacking)}); copy the "
            "processor files of the model it was made from into the folder"
        )
    return processor
