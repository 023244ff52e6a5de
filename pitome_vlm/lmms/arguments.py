"""`--model_args`: every name that is understood, checked before a checkpoint is read.

lmms-eval turns `name=value` text into Python values; `loader.py` loads what they describe.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common import suggest, whole_number
from ..demo import DEMO, resolve
from ..loading.checkpoints import torch_dtype
from ..merge import algorithms
from ..merge.config import BUDGET_WORDS, MergeConfig, option_names


@dataclass(frozen=True)
class ModelArguments:
    """What `--model_args` and the command line may say.

    Attributes:
        pretrained: folder or hub name of a LLaVA, or `demo` for the bundled one.
        merging: what `pitome_vlm.load` is told about merging: a `config`, or fields of
            `MergeConfig`. Empty leaves it to a `pitome_config.json` in the checkpoint's folder.
        dtype: `auto` for the checkpoint's; None for float32 on a CPU and the checkpoint's
            elsewhere.
        device: where to run, in a single process.
        device_map: the same as `from_pretrained` takes it, in a single process.
        attn_implementation: as for `from_pretrained`.
        load_in_4bit: quantise the language model to 4 bits.
        load_in_8bit: quantise the language model to 8 bits.
        peft: folder or hub name of a PEFT adapter to put on the model.
        revision: branch, tag or commit on the hub.
        max_pixels: scale larger images down to this many pixels before the processor sees
            them; None leaves them alone.
        system_prompt: text of a system turn at the start of every prompt, or a file that holds it.
        batch_size: requests at a time.
    """

    pretrained: str
    merging: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    device: str | None = None
    device_map: Any = None
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    peft: str | None = None
    revision: str | None = None
    max_pixels: int | None = None
    system_prompt: str | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("load_in_4bit", "load_in_8bit"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        for name in ("batch_size", "max_pixels"):
            value = getattr(self, name)
            if value is not None:
                whole_number(name, value, 1)
        if self.device is not None and self.device_map is not None:
            raise ValueError(
                f"only one of device and device_map can be given, got device={self.device} and "
                f"device_map={self.device_map}"
            )
        torch_dtype(self.dtype)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ModelArguments:
        """Sort names into loading and merging, and check everything that needs no model.

        Args:
            values: names with the Python values lmms-eval makes of their text.

        Raises:
            ValueError: an unknown name, two budgets, or a value out of range.
            TypeError: a value of the wrong type.
            FileNotFoundError: `system_prompt` or `peft` looks like a path that does not exist.
        """
        values = {name: _cleaned(name, value) for name, value in values.items()}
        # Whose option a name is shows when the algorithm is known, perhaps with the checkpoint.
        options = (*option_names(), "preset")
        known = sorted({*options, *(item.name for item in dataclasses.fields(cls))})
        known.remove("merging")
        for name in values:
            if name not in known:
                raise ValueError(
                    f"unknown model argument {name!r}.{suggest(name, known)} Known arguments: "
                    f"{', '.join(known)}"
                )
        given = {name: value for name, value in values.items() if value is not None}
        if not given.get("pretrained"):
            raise ValueError(
                "pretrained is missing; give model_args pretrained=PATH,keep=0.25 with the folder "
                f"or hub name of a LLaVA, or pretrained={DEMO} for the bundled one"
            )
        merging = {name: given.pop(name) for name in options if name in given}
        for name in ("pretrained", "peft", "system_prompt", "dtype", "device", "revision"):
            if name in given:
                given[name] = str(given[name])
        given["pretrained"] = resolve(given["pretrained"])
        return cls(merging=_merging(merging), **given)


def _merging(values: dict[str, Any]) -> dict[str, Any]:
    """What `load` takes, checked as far as it can be without a checkpoint."""
    if "algorithm" in values:
        algorithms.get(values["algorithm"])
    preset = values.pop("preset", None)
    if preset is not None:
        return {"config": MergeConfig.preset(preset, **values)}
    if values.keys() & set(BUDGET_WORDS):
        MergeConfig.from_dict(values)
    return values


def _cleaned(name: str, value: Any) -> Any:
    """What was meant: lmms-eval knows numbers and booleans and leaves the rest as text."""
    if isinstance(value, float) and value.is_integer() and name in ("seed", "batch_size"):
        return int(value)
    if not isinstance(value, str):
        return value
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    # "none" is an algorithm, so only the spellings of Python and JSON mean "not given".
    if value in ("None", "null") and name != "algorithm":
        return None
    if value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is no valid JSON: {value!r} ({error})") from error
    if name in ("batch_size", "max_pixels") and value.isdigit():
        return int(value)
    return value


def combined(model_args: Mapping[str, Any], command_line: Mapping[str, Any]) -> dict[str, Any]:
    """`--model_args` with `--batch_size` and `--device`, which lmms-eval passes separately.

    lmms-eval always passes a batch size, 1 by default, which gives way.

    Raises:
        ValueError: both name the same thing and disagree.
    """
    merged = dict(model_args)
    for name, value in command_line.items():
        # A limit for automatic batch sizes, which there are none of here.
        if name == "max_batch_size" or value is None:
            continue
        default = name == "batch_size" and str(value) == "1"
        if name in merged and not default and str(merged[name]) != str(value):
            raise ValueError(
                f"{name} is given twice: --{name} {value} and model_args {name}={merged[name]}"
            )
        merged.setdefault(name, value)
    return merged
