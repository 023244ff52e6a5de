"""What every wrapped model does alike: it saves its options, and says in `print` what is on."""

from __future__ import annotations

from typing import Any

from ..adapters.swap import BASE
from .arguments import by_name
from .card import PushesWithCard
from .merging import Merging, note_of
from .model_card import write_card


class WrappedModel(PushesWithCard):
    """Mixin before the class of a wrapped model, of a LLaVA as of what contains an encoder."""

    # Methods whose signature callers read (Trainer's column names, generate's validation): the
    # swapped class shows the signature of the original ones.
    _pitome_mirrored: tuple[str, ...] = ("save_pretrained",)

    _pitome: Merging

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the untouched checkpoint with `pitome_config.json` and a section in README.md."""
        if not hasattr(type(self), BASE):
            return handed_on(self, "save_pretrained", args, kwargs)
        original = super().save_pretrained
        call = by_name(original, args, kwargs)
        main = call.get("is_main_process", True)
        if main:
            # First, so that it is there when the folder is pushed to a hub.
            self._pitome.config.save_pretrained(call["save_directory"])
        saved = original(**call)
        if main:
            # Last, because transformers writes a card of its own into a folder that it pushes.
            write_card(call["save_directory"], self, self._pitome)
        return saved

    def extra_repr(self) -> str:
        """Say in `print(model)` what is on."""
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(part for part in (own, note_of(self, self._pitome)) if part)


def handed_on(model: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the class's own method: the model was unwrapped while another library held on to ours.

    accelerate's autocast and `torch.compile` keep the method they find when they are put on.
    """
    return getattr(type(model), name)(model, *args, **kwargs)
