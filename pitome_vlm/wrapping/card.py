"""Model cards: a section between marks, and uploads that keep the card.

What people wrote in a README.md stays; only what stands between our marks is replaced. What the
section says is up to `peft_card` and `model_card`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

CARD_NAME = "README.md"
BEGIN, END = "<!-- pitome-vlm begin -->", "<!-- pitome-vlm end -->"
TAGS = ("pitome-vlm", "token-merging")


def with_section(text: str, section: str) -> str:
    """A card's text with the section in the place of an earlier one, or at its end."""
    marked = f"{BEGIN}\n{section}\n{END}"
    if BEGIN in text and END in text:
        head, rest = text.split(BEGIN, 1)
        return head + marked + rest.split(END, 1)[1]
    return f"{text.rstrip()}\n\n{marked}\n".lstrip()


def shown_base(base: str | None) -> str:
    """A hub name as it is, of a local folder the last part: full paths are nobody's business."""
    if not base:
        return "an unnamed model"
    return Path(base).name if os.path.isabs(base) or os.path.isdir(base) else base


def upload(
    save: Callable[[str], object],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    tags: Sequence[str] | None = None,
    **commit: Any,
) -> Any:
    """Save into a folder with the hub's present card in it, and upload the folder.

    Args:
        save: writes everything, the card's section included, into a folder.
        repo_id: [organisation/]name, made if missing.
        private: whether a new repository is private.
        token: of the hub.
        tags: further tags for the card.
        **commit: of `HfApi.upload_folder`.

    Returns:
        What `HfApi.upload_folder` returns.
    """
    hub = HfApi()
    repo_id = hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        card = os.path.join(folder, CARD_NAME)
        # A new repository has none.
        with contextlib.suppress(EntryNotFoundError, RepositoryNotFoundError):
            ModelCard.load(repo_id, token=token).save(card)
        save(folder)
        if tags:
            written = ModelCard.load(card)
            written.data["tags"] = sorted({*(written.data.get("tags") or ()), *tags})
            written.save(card)
        return hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token, **commit)


class PushesWithCard:
    """Mixin before a class with `save_pretrained`, whose folder has a card with our section."""

    _pitome_commit = "Upload model"
    save_pretrained: Callable[..., Any]

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
            commit_message=commit_message or self._pitome_commit,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
