"""What every wrapped model does alike: it saves its options, and says in `print` what is on."""

from __future__ import annotations

import functools
from typing import Any

from ..adapters.swap import BASE
from .arguments import by_name
from .card import upload
from .merging import Merging, note_of
from .model_card import write_card


class WrappedModel:
    """Mixin before the class of a wrapped model, of a LLaVA as of what contains an encoder."""

    # Methods whose signature callers read (Trainer's column names, generate's validation): the
    # swapped class shows the signature of the original ones.
    _pitome_mirrored: tuple[str, ...] = ("save_pretrained",)

    _pitome: Merging

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the untouched checkpoint with `pitome_config.json` and a section in README.md."""
        if not hasattr(type(self), BASE):
            return handed_on(self, "save_pretrained", args, kwargs)
        original = super().save_pretrained  # type: ignore[misc]
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **saving: Any,
    ) -> Any:
        """Upload what `save_pretrained` writes, its section of the card included.

        As transformers does it, but the card on the hub is kept and its section replaced:
        transformers would put an empty card in its place.

        Args:
            repo_id: [organisation/]name.
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a new repository is private.
            token: of the hub.
            revision: branch to commit to.
            create_pr: open a pull request instead.
            tags: further tags for the card.
            **saving: of `save_pretrained`, for instance `max_shard_size`.

        Returns:
            What `HfApi.upload_folder` returns.
        """
        return upload(
            functools.partial(self.save_pretrained, **saving),
            repo_id,
            private=private,
            token=token,
            tags=tags,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

    def extra_repr(self) -> str:
        """Say in `print(model)` what is on."""
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(part for part in (own, note_of(self, self._pitome)) if part)


def handed_on(model: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the class's own method: the model was unwrapped while another library held on to ours.

    accelerate's autocast and `torch.compile` keep the method they find when they are put on.
    """
    return getattr(type(model), name)(model, *args, **kwargs)
