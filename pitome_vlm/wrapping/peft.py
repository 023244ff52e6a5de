"""A `PeftModel` around a wrapped LLaVA remembers the merging wherever it is saved.

PEFT's saving conventions and the files that belong to an adapter. How an adapter is loaded again
is left to `loading/peft.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..adapters.swap import BASE, is_swapped
from .arguments import by_name
from .card import CARD_NAME, PushesWithCard
from .merging import STATE, Merging
from .peft_card import card_section, update_card
from .peft_record import PeftRecord

TRAINING = "_pitome_training"


class WrappedPeft(PushesWithCard):
    """Mixin that `wrap` puts before the class of a `PeftModel`; `forward` is not touched."""

    _pitome_mirrored = ("save_pretrained",)
    _pitome_commit = "Upload adapter"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the adapter with `pitome_config.json` and `pitome_adapter.json` next to it."""
        if not hasattr(type(self), BASE):
            # Unwrapped while another library held on to this method.
            return type(self).save_pretrained(self, *args, **kwargs)
        original = super().save_pretrained
        call = by_name(original, args, kwargs)
        merging = _merging(self)
        if merging is not None and call.get("is_main_process", True):
            record = _record(self)
            names = call.get("selected_adapters") or list(self.peft_config)  # type: ignore[attr-defined]
            for name in names:
                folder = Path(call["save_directory"])
                folder = folder if name == "default" else folder / name
                merging.config.save_pretrained(folder)
                record.save(folder)
        return original(*args, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's card with a section on merging, data and accuracy; a person's text is kept."""
        path, merging = Path(output_dir) / CARD_NAME, _merging(self)
        previous = ModelCard.load(path).text if path.is_file() else None
        super().create_or_update_model_card(output_dir)  # type: ignore[misc]
        if merging is not None:
            base, record = self.get_base_model(), _record(self)  # type: ignore[attr-defined]
            section = card_section(record, merging.config, merging.plan(base).schedule)
            update_card(path, previous, section, record.base_model)


def can_remember(model: Any) -> bool:
    """Whether this is a PEFT model that saves adapters (`PeftMixedModel` does not)."""
    return hasattr(type(model), "peft_config") and hasattr(type(model), "get_base_model")


def remember_training(model: Any, training: dict[str, Any] | None) -> None:
    """Facts about the training that go into the record and the card from now on."""
    model.__dict__[TRAINING] = training


def _record(model: Any) -> PeftRecord:
    return PeftRecord.of(model.get_base_model(), model.__dict__.get(TRAINING))


def _merging(model: Any) -> Merging | None:
    """What is on the model inside, None once that was unwrapped on its own."""
    base = model.get_base_model()
    merging: Merging | None = base.__dict__.get(STATE) if is_swapped(base) else None
    return merging
