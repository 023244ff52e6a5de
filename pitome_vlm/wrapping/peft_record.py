"""What an adapter has to remember of the model it was trained on, in addition to PEFT's own files.

Base model, its quantisation and dtype, and how a base model is recognised. How tokens are merged is
in `pitome_config.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..common import __version__, read_json, write_text

RECORD_NAME = "pitome_adapter.json"
FORMAT_VERSION = 1
# Enough numbers to tell two models apart, few enough to read.
PROBED = 32
# Two roundings of one number to bfloat16 are this close.
TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class PeftRecord:
    """`pitome_adapter.json`. Plain JSON values.

    Attributes:
        base_model: folder or hub name of the model the adapter belongs to.
        base_revision: its commit on the hub, where it came from there.
        base_dtype: what its unquantised weights were loaded in, for instance "bfloat16".
        base_probe: some numbers of its embedding table, by which another model of the same shape
            is noticed; None where they were out of reach (offloaded).
        quantization: see `recorded`.
        training: what `pitome_vlm.training.train` wrote down, None for other adapters.
    """

    base_model: str | None = None
    base_revision: str | None = None
    base_dtype: str | None = None
    base_probe: tuple[float, ...] | None = None
    quantization: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    @classmethod
    def of(cls, base: Any, training: dict[str, Any] | None = None) -> PeftRecord:
        """The record of an adapter on a LLaVA."""
        return cls(
            base_model=_absolute(getattr(base, "name_or_path", None)),
            base_revision=getattr(base.config, "_commit_hash", None),
            base_dtype=str(base.dtype).removeprefix("torch."),
            base_probe=probe(base),
            quantization=recorded(base),
            training=training,
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file into a folder (made if missing); atomic."""
        head = {"format_version": FORMAT_VERSION, "pitome_vlm_version": __version__}
        text = json.dumps(head | dataclasses.asdict(self), indent=2) + "\n"
        return write_text(Path(folder) / RECORD_NAME, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PeftRecord:
        """Read the file; keys of newer versions are left out.

        Raises:
            ValueError: it is damaged, or a value has the wrong type.
        """
        values = read_json(path)
        known = {name: values.get(name) for name in (item.name for item in dataclasses.fields(cls))}
        for name, kind in _KINDS.items():
            value = known[name]
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{path}: {name} has the wrong type, got {value!r}")
        numbers = known["base_probe"]
        if numbers is not None:
            known["base_probe"] = tuple(float(number) for number in numbers)
        return cls(**known)

    def fits(self, base: Any) -> bool:
        """Whether a model may be the one the adapter was trained on, as far as can be seen."""
        found = probe(base)
        if found is None or self.base_probe is None:
            return True
        if len(found) != len(self.base_probe):
            return False
        return torch.allclose(
            torch.tensor(found), torch.tensor(self.base_probe), rtol=TOLERANCE, atol=1e-6
        )


_KINDS: dict[str, type] = {
    "base_model": str,
    "base_revision": str,
    "base_dtype": str,
    "base_probe": list,
    "quantization": dict,
    "training": dict,
}


def recorded(model: nn.Module) -> dict[str, Any] | None:
    """Plain JSON values that say how a loaded model is quantised, None where it is not."""
    config = quantization_of(model)
    return None if config is None else dict(config.to_dict(), quant_method="bitsandbytes")


def quantization_of(model: nn.Module) -> BitsAndBytesConfig | None:
    """The bitsandbytes config a model was loaded with, None without one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if isinstance(config, BitsAndBytesConfig) else None


def probe(base: Any) -> tuple[float, ...] | None:
    """Numbers spread over the embedding table, which no quantisation touches."""
    table: nn.Module = base.get_input_embeddings()
    # PEFT trains a copy where the table is trained as a whole.
    weight = getattr(getattr(table, "original_module", table), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta":
        return None
    flat = weight.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, PROBED, dtype=torch.float64).long()
    return tuple(flat[places.to(flat.device)].float().tolist())


def _absolute(name: Any) -> str | None:
    """A folder's full path, because an adapter is loaded from anywhere; hub names stay."""
    if not name:
        return None
    return os.path.abspath(name) if os.path.isdir(name) else str(name)
