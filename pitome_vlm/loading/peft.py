"""PEFT adapters: found, read with the record of their base model, and attached to it.

An adapter that belongs to another base model is refused. Loading and wrapping the base model is
left to `models.py`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from ..common import require
from ..wrapping.peft import remember_training
from ..wrapping.peft_record import RECORD_NAME, PeftRecord
from .checkpoints import squeezed

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk or on the hub, not loaded yet.

    Attributes:
        path: its folder or hub name.
        config: its PEFT configuration.
        record: what was recorded about its base model and training.
        source: `revision` and `local_files_only` for the adapter's files.
    """

    path: str
    config: Any
    record: PeftRecord
    source: dict[str, Any]

    def base(self, given: str | os.PathLike[str] | None) -> str:
        """Folder or hub name of the base model.

        Args:
            given: by the caller; None to use what the adapter recorded.

        Raises:
            ValueError: neither names it.
            FileNotFoundError: the recorded folder does not exist.
        """
        if given is not None:
            return os.path.expanduser(os.fspath(given))
        name = self.record.base_model or self.config.base_model_name_or_path
        if not name:
            raise ValueError(f"{self.path} does not name its base model; give it with base=PATH")
        if os.path.isabs(name) and not os.path.isdir(name):
            raise FileNotFoundError(
                f"{self.path} belongs to the model at {name}, which does not exist; give its "
                "folder with base=PATH"
            )
        return str(name)

    def attach(self, base: Any, *, trainable: bool = False) -> Any:
        """The base model with the adapter on it, as a `PeftModel` in eval mode.

        Args:
            base: a loaded LLaVA; unusable after an error.
            trainable: leave the adapter's weights trainable.

        Raises:
            ValueError: the adapter belongs to another model, or its weights are damaged.
        """
        from peft import get_peft_model

        if not self.record.fits(base):
            raise ValueError(
                f"{self.path} was trained on another model than {base.name_or_path} (its "
                f"embeddings differ from those of {self.record.base_model}); load it with the one "
                "it was trained on"
            )
        self.config.inference_mode = not trainable
        try:
            with warnings.catch_warnings():
                # PEFT warns if the base has another name than recorded, which base= is for.
                warnings.simplefilter("ignore")
                model = get_peft_model(base, self.config)
                result = model.load_adapter(
                    self.path, "default", is_trainable=trainable, **self.source
                )
        except SafetensorError as error:
            raise ValueError(f"{self.path}: the adapter's weights are damaged: {error}") from error
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(self._no_fit(base, squeezed(error))) from error
        own = [key for key in result.missing_keys if ".default" in key]
        if own or result.unexpected_keys:
            where = f"it lacks {own[0]}" if own else f"no place for {result.unexpected_keys[0]}"
            raise ValueError(self._no_fit(base, where))
        # After further training, the recorded accuracies would no longer be true.
        remember_training(model, None if trainable else self.record.training)
        return model.train(trainable)

    def _no_fit(self, base: Any, why: str) -> str:
        return (
            f"{self.path} does not fit {base.name_or_path}: {why}; load it with the model it was "
            f"trained on ({self.record.base_model or self.config.base_model_name_or_path})"
        )


def find_adapter_at(path: Any, *, allow_pickle: bool = False, **source: Any) -> SavedAdapter | None:
    """The adapter at a path; None if there is a model or nothing (or `path` is not a path).

    Args:
        path: a folder, or a name on the hub.
        allow_pickle: also take weights that are not safetensors.
        **source: `revision` and `local_files_only`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the adapter's files are damaged, or its weights are not safetensors.
    """
    if not isinstance(path, (str, os.PathLike)):
        return None
    name = os.path.expanduser(os.fspath(path))
    if not os.path.isdir(name) and (os.path.exists(name) or isinstance(path, os.PathLike)):
        return None  # neither a folder nor a name on the hub
    if _found(name, "config.json", source) or not _found(name, ADAPTER_CONFIG, source):
        return None
    require("peft", "train", f"{name} (a PEFT adapter)")
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(name, **source)
        if config.peft_type is None:
            raise ValueError("peft_type is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name} holds a PEFT adapter whose {ADAPTER_CONFIG} cannot be used "
            f"({squeezed(error)}); give the folder of a complete adapter, or of its base model"
        ) from error
    if not allow_pickle and not _found(name, ADAPTER_WEIGHTS, source):
        raise ValueError(
            f"{name} holds a PEFT adapter without {ADAPTER_WEIGHTS}; give the folder of a complete "
            "adapter or of its base model, or pass allow_pickle=True if its weights are in "
            "another file and you trust whoever made it with your machine"
        )
    record = _found(name, RECORD_NAME, source)
    return SavedAdapter(name, config, PeftRecord.load(record) if record else PeftRecord(), source)


def _found(name: str, file: str, source: dict[str, Any]) -> str | None:
    """A file of a folder or hub repository; None if it is missing or cannot be reached."""
    if os.path.isdir(name):
        path = Path(name) / file
        return str(path) if path.is_file() else None
    try:
        found: str | None = cached_file(
            name,
            file,
            **source,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None  # not a name on the hub; reading config.json will say so
    return found
