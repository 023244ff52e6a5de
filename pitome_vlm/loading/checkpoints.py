"""Checkpoints in folders and on the hub: checked, then loaded completely or not at all.

Errors are reported before weights are read wherever that is possible. Processors, images and
merging are handled elsewhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from ..adapters import model_types, why_not
from ..common import suggest
from ..demo import DEMO, resolve
from ..releases import RENAMES_TOWER_WEIGHTS

DTYPES = ("float32", "float16", "bfloat16")
# Parts of a tower that LLaVA reads nothing from; checkpoints may leave them out.
_UNREAD = re.compile(r"vision_tower\..*\b(head|post_layernorm)\.")
_RENAMED_TOWERS = ("clip_vision_model", "siglip_vision_model")


def read_config(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The checked config of a checkpoint; weights are not touched.

    Args:
        path: a folder, or a name on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        local_files_only: do not use the network.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the hub does not have it, or cannot be reached.
        TypeError: not a supported model.
        ValueError: config.json is missing or cannot be read.
    """
    name = existing(path)
    source = {"revision": revision, "local_files_only": local_files_only}
    raw = raw_config(name, **source)
    if is_original(raw):
        raise TypeError(
            f"{name} is a checkpoint of the original llava package (no vision_config in its "
            "config.json), which transformers cannot load; take the converted one, for instance "
            "llava-hf/llava-1.5-7b-hf, or load it with that package and wrap() the model "
            "(docs/original-llava.md)"
        )
    check_model_type(raw.get("model_type"), name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **source)
    except Exception as error:
        # Depending on the field and the release, a wrong value can raise anything.
        raise ValueError(f"{name}: config.json cannot be used: {squeezed(error)}") from error


def raw_config(path: str | os.PathLike[str], **source: Any) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Args:
        path: a folder, or a name on the Hugging Face hub.
        **source: `revision`, `local_files_only`.

    Raises:
        OSError: the hub does not have it, or cannot be reached.
        ValueError: config.json is missing or cannot be read.
    """
    name = existing(path)
    try:
        raw, _ = PretrainedConfig.get_config_dict(name, **source)
    except (OSError, ValueError) as error:
        raise _one_line(name, error) from error
    except TypeError:
        # transformers 4.57 looks up keys even if the JSON is not an object.
        raw = None
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{name}: config.json is missing or is not a JSON object")
    return raw


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json was written by the original llava package."""
    named = str(raw.get("model_type")).startswith("llava")
    return "vision_config" not in raw and ("mm_vision_tower" in raw or named)


def check_model_type(model_type: Any, source: str) -> None:
    """Check that a model type is supported.

    Raises:
        TypeError: it is not; the message names `source`.
    """
    if model_type not in model_types():
        raise TypeError(
            f"{source} has model_type {model_type!r}, which is not supported: {why_not(model_type)}"
        )


def existing(path: str | os.PathLike[str]) -> str:
    """The path as a string, if it is a folder with a config or may be a name on the hub.

    "demo" gives the folder of the bundled model; see `demo.resolve`.

    Raises:
        FileNotFoundError: it looks like a path, but does not exist.
        NotADirectoryError: it is a file.
        ValueError: a folder without a config.json.
        TypeError: neither a string nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a folder or a hub name, got {type(path).__name__}")
    text: str = os.path.expanduser(os.fspath(resolve(path)))
    if os.path.isdir(text):
        _check_folder(Path(text))
    elif os.path.exists(text):
        raise NotADirectoryError(f"{text} is a file; give the folder of the checkpoint")
    elif isinstance(path, os.PathLike) or _looks_local(text):
        raise FileNotFoundError(
            f"no such folder: {text!r}; give the folder of a checkpoint, or a hub name such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    elif "/" not in text:
        raise FileNotFoundError(
            f"no such folder: {text!r}, and a hub name has the form ORGANISATION/NAME."
            + suggest(text, [DEMO])
        )
    return text


def only_local(
    path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> bool:
    """Whether only local files of a checkpoint or adapter can be read; asks the hub at most once.

    Where the hub cannot be reached, every file that is read would be asked for many times.

    Args:
        path: see `existing`.
        revision: branch, tag or commit on the hub.
        local_files_only: do not use the network.

    Raises:
        FileNotFoundError: no such folder, and no name on the hub.
        OSError: the hub cannot be reached, and nothing of it was downloaded before.
    """
    text = os.path.expanduser(os.fspath(resolve(path)))
    if local_files_only or os.path.exists(text):
        return local_files_only
    name = existing(path)
    failure = hub_failure(name, "config.json", revision=revision)
    if failure is None or isinstance(failure, OfflineModeIsEnabled):
        return failure is not None
    files = ("config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(name, f, revision=revision), str) for f in files):
        return True
    raise _one_line(name, failure) from failure


def hub_failure(name: str, file: str, **options: Any) -> Exception | None:
    """Why the hub cannot be asked for a file; None where it answers. Asks once.

    Libraries ask again and again, for many files, where there is no network.

    Args:
        name: of a repository.
        file: in it.
        **options: `revision`, `repo_type`.
    """
    try:
        file_exists(name, file, **options)
    except (HfHubHTTPError, ValueError):
        return None  # it has answered, or it is no name; whoever reads the file will say so
    except Exception as error:
        # Releases of huggingface_hub differ in what they raise where there is no network.
        return error
    return None


def _looks_local(text: str) -> bool:
    """Whether a name that does not exist was meant as a path; hub names look like [org/]name."""
    parent = os.path.dirname(text)
    return (
        text.startswith((".", "~", os.sep))
        or text.endswith(("/", os.sep))
        or text.count("/") > 1
        or not text
        or (bool(parent) and os.path.isdir(parent))
    )


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a PEFT adapter, not a model; give the folder of its base model "
            "here, or load both with pitome_vlm.load"
        )
    raise ValueError(f"{folder} has no config.json; give the folder of a complete checkpoint")


def torch_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """The floating point dtype of a name; "auto" for None and "auto".

    Raises:
        ValueError: anything else.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    named = getattr(torch, dtype) if dtype in DTYPES else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)} or a torch dtype, got {dtype!r}")
    return named


def load_weights(name: str, config: Any, *, allow_pickle: bool, **arguments: Any) -> Any:
    """The complete model of a checkpoint, in eval mode.

    Args:
        name: a folder or hub name that `read_config` accepted.
        config: what `read_config` returned.
        allow_pickle: also load weights that are not safetensors.
        **arguments: of `from_pretrained`; None means not given.

    Raises:
        OSError: the hub cannot be reached.
        ValueError: weights are missing, damaged, of other shapes, or not safetensors.
    """
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if not allow_pickle:
        arguments["use_safetensors"] = True
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, output_loading_info=True, **_renamed_keys(config), **arguments
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _weights_error(name, error) from error
    missing = sorted(key for key in info["missing_keys"] if not _UNREAD.search(key))
    if missing:
        # transformers would fill these weights with random numbers and only warn.
        other = len(info["unexpected_keys"])
        raise ValueError(
            f"{name} lacks {len(missing)} of the model's weights, the first is {missing[0]}, and "
            f"has {other} under other names; give a complete checkpoint of this architecture"
            + (", or use the release of transformers that saved it" if other else "")
        )
    return model.eval()


def _renamed_keys(config: Any) -> dict[str, Any]:
    """The key mapping that transformers 4.57 needs for a tower saved by transformers 5.

    Release 5 dropped the level `vision_model` and reads both forms. 4.57 reads only its own form
    and would leave the tower with random weights.
    """
    vision = getattr(config.vision_config, "model_type", None)
    if RENAMES_TOWER_WEIGHTS or vision not in _RENAMED_TOWERS:
        return {}
    model_class = AutoModelForImageTextToText._model_mapping[type(config)]
    pattern = r"^(?:model\.)?vision_tower\.(?!vision_model\.)"
    renamed = {pattern: "model.vision_tower.vision_model."}
    return {"key_mapping": renamed | model_class._checkpoint_conversion_mapping}


def _weights_error(name: str, error: Exception) -> Exception:
    text = str(error)
    if isinstance(error, SafetensorError):
        return ValueError(
            f"{name}: the weights are damaged or cut off ({squeezed(error)}); download them again"
        )
    if isinstance(error, OSError) and "safetensors" in text:
        return ValueError(
            f"{name} has no safetensors weights ({squeezed(error)}); convert them, or pass "
            "allow_pickle=True if you trust whoever made the file with your machine"
        )
    if isinstance(error, OSError):
        return _one_line(name, error)
    if "mismatch" in text:
        return ValueError(
            f"{name}: the weights do not have the shapes in config.json; give a folder whose files "
            "belong together"
        )
    return error


def _one_line(name: str, error: Exception) -> Exception:
    """An error of the hub (or of a damaged folder), which may have many lines, on one line."""
    if os.path.isdir(name):
        return ValueError(f"{name}: {squeezed(error)}")
    return OSError(
        f"cannot load {name!r} from the Hugging Face hub: {squeezed(error)} (for a "
        "local checkpoint, give the path of its folder)"
    )


def squeezed(error: BaseException) -> str:
    """The first sentence or so of an error message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200].rsplit(" ", 1)[0] + " ..."
