"""`load`: one call from a path to a model that answers, wrapped, with its processor.

Knows: in which order checkpoint (`checkpoints.py`), quantisation, PEFT adapter and wrapping go
together, and what old processors lack. Does not know: how any of them works. Pictures are in
`images.py`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.utils import cached_file

from ..adapters import find_adapter
from ..adapters.tower_tokens import has_class_token
from ..merge.config import CONFIG_NAME, MergeConfig
from ..wrapping.wrap import make_config, wrap
from .checkpoints import (
    DTYPES,
    check_model_type,
    existing,
    load_weights,
    read_config,
    squeezed,
    torch_dtype,
)
from .images import FORMATS, ImageError, ImageLimits, load_image
from .peft import SavedAdapter, find_adapter_at
from .quantization import (
    check_quantised,
    keep_unpackable,
    quantization,
    recorded_quantization,
    unquantised_dtype,
)

__all__ = [
    "DTYPES",
    "FORMATS",
    "ImageError",
    "ImageLimits",
    "check_model_type",
    "complete_processor",
    "load",
    "load_image",
    "read_config",
    "saved_merge_config",
]


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
    """A LLaVA and its processor, ready to answer, wrapped where a budget is known.

    A `pitome_config.json` beside the checkpoint restores that wrapping. A budget given here
    replaces its budget and keeps its other options, and `config` replaces it altogether. Without
    a file and a budget the model comes back unwrapped.

    The path of a PEFT adapter gives its base model with the adapter on it, quantised and merged
    as it was trained; what is given here wins.

    Args:
        path: a folder, or a name on the Hugging Face hub; of a model or of a PEFT adapter.
        keep: fraction of an image's visual tokens to keep, in (0, 1].
        tokens: the same as a count per image.
        ratio: the paper's r, the fraction kept at every merging layer.
        config: a ready `MergeConfig`; a budget or options beside it replace its own.
        dtype: "auto" (or None) for the checkpoint's, a torch dtype or one of `DTYPES`. Of a
            quantised model it is the dtype of everything that is not quantised, where "auto"
            makes 16 bits of a float32 checkpoint on devices that are fast with them.
        device_map: as for `from_pretrained`: "auto", a device, or a dict; None for its default.
            Parts that a dict puts on "cpu" or "disk" beside an accelerator are not quantised.
        attn_implementation: as for `from_pretrained`.
        load_in_4bit: quantise the language model to 4 bits (bitsandbytes nf4, double
            quantisation); tower and projector are left alone.
        load_in_8bit: the same to 8 bits.
        quantization_config: a quantisation config of your own, taken as it is. The loaded model
            is checked against its `llm_int8_skip_modules`. False loads the base model of an
            adapter unquantised, however it was trained.
        max_memory: as for `from_pretrained`: how much each device may hold.
        offload_folder: as for `from_pretrained`: where parts on "disk" go.
        base: the model an adapter belongs to, where it is not where it was.
        trainable: leave an adapter's weights open for training.
        trust_remote_code: run Python code that comes with the checkpoint.
        allow_pickle: also load weights that are not safetensors; loading such a file can run
            code that is hidden in it.
        revision: branch, tag or commit on the hub (of the adapter, where it is one).
        local_files_only: do not use the network.
        **options: fields of `MergeConfig`, for instance `algorithm="tome"`.

    Returns:
        (model in eval mode, processor). The model is a `PeftModel` where `path` is an adapter.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the hub does not have it, or cannot be reached.
        TypeError: the checkpoint is no LLaVA this package knows.
        ValueError: the checkpoint is incomplete or damaged, an option is out of range, or an
            adapter belongs to another model.
        ImportError: bitsandbytes or PEFT is needed and not installed.
        RuntimeError: something else was quantised than what was to be.
    """
    source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    adapter = find_adapter_at(path, allow_pickle=allow_pickle, **source)
    if base is not None and adapter is None:
        raise ValueError(f"base={os.fspath(base)} is for PEFT adapters, but {path} is none")
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    quantised = _quantization(adapter, bits, quantization_config, device_map)
    name = existing(path if adapter is None else adapter.base(base))
    if adapter is not None:
        config = config or saved_merge_config(adapter.path, **source)
        dtype = adapter.record.base_dtype if dtype in (None, "auto") else dtype
        source = source | {"revision": adapter.record.base_revision if base is None else None}
    model_config = read_config(name, trust_remote_code=trust_remote_code, **source)
    merging = _merging(name, source, config, dict(options, keep=keep, tokens=tokens, ratio=ratio))
    plain, ours = torch_dtype(dtype), any(bits.values())
    if ours:
        plain = unquantised_dtype(plain, getattr(model_config, "dtype", None), device_map)
    source["trust_remote_code"] = trust_remote_code
    placed = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    extra = {"attn_implementation": attn_implementation, "quantization_config": quantised}
    extra |= {"dtype": plain, "allow_pickle": allow_pickle}
    model = load_weights(name, model_config, **source, **placed, **extra)
    check_quantised(model, language_model_only=ours)
    keep_unpackable(model)
    processor = complete_processor(_load_processor(name, source), model)
    if adapter is not None:
        model = adapter.attach(model, trainable=trainable)
    return (model if merging is None else wrap(model, config=merging)), processor


def saved_merge_config(
    path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> MergeConfig | None:
    """The merge config beside a checkpoint, None where there is none.

    Raises:
        ValueError: the file is damaged or holds a wrong value.
    """
    found = cached_file(
        os.fspath(path),
        CONFIG_NAME,
        revision=revision,
        local_files_only=local_files_only,
        # The file is optional; whatever is wrong with the hub shows when config.json is read.
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else MergeConfig.from_pretrained(found)


def complete_processor(processor: Any, model: Any) -> Any:
    """Give an old processor the numbers it needs to count image placeholders; in place.

    Processors saved before transformers 4.45 lack them and write one placeholder per image,
    which today's models refuse. As the documentation of transformers recommends, the numbers
    are taken from the model.

    Args:
        processor: of a LLaVA.
        model: the LLaVA itself.

    Returns:
        The same processor.
    """
    missing = [
        name
        for name in ("patch_size", "vision_feature_select_strategy")
        if getattr(processor, name, None) is None
    ]
    if "patch_size" in missing:
        processor.patch_size = model.config.vision_config.patch_size
        # A processor so old does not know of the class token either; 0 is only its default.
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
    """What the caller asks for, else how the adapter was trained."""
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
            f"{name} holds no complete processor (no {' and no '.join(lacking)}); copy the "
            "processor files of the model it was made from into the folder"
        )
    return processor
