"""Model cards: a section between marks, and uploads that keep the card.

What people wrote in a README.md stays; only what stands between our marks is replaced. What the
section says is up to `peft_card` and `model_card`.
"""

from __future__ import annotations

import contextlib
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
