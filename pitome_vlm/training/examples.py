"""Checked conversations with their images: what every source of training data becomes."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ..common import check_range
from ..loading.images import ImageError, load_image, locate
from ..loading.records import DataError
from .conversations import Conversation


@dataclass(frozen=True)
class Example:
    """A conversation with its images, read."""

    conversation: Conversation
    images: tuple[Image.Image, ...]


class Conversations(Dataset[Example]):
    """Checked conversations, a map-style dataset for any loader; pickles for its workers.

    Attributes:
        name: of the file or dataset, for display.
        fingerprint: changes with the content; a run is only resumed with the same one.
        conversations: all of them, without images.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        conversations: Sequence[Conversation],
        images: Callable[[int], Sequence[Any]],
    ) -> None:
        """Put checked conversations and their images together.

        Args:
            name: for display.
            fingerprint: of the content.
            conversations: at least one.
            images: from the number of a conversation to its images in forms of `load_image`;
                must pickle.

        Raises:
            DataError: no conversation.
        """
        self.name, self.fingerprint = name, fingerprint
        self.conversations = conversations
        self._images = images
        if not conversations:
            raise DataError(f"{name}: holds no conversation")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Example:
        conversation = self.conversations[index]
        try:
            images = tuple(load_image(value) for value in self._images(index))
        except ImageError as error:
            raise DataError(f"{conversation.where}: {error}") from error
        return Example(conversation, images)

    @property
    def has_text_only(self) -> bool:
        """Whether some conversation has no image."""
        return any(not conversation.images for conversation in self.conversations)

    def split(self, fraction: float, seed: int = 0) -> tuple[Conversations, Conversations]:
        """(rest, held out), drawn at random; the same seed draws the same.

        Args:
            fraction: share to hold out, in (0, 1).
            seed: random seed of the draw.

        Raises:
            TypeError: the fraction is no number.
            ValueError: the fraction is out of range, or leaves one side empty.
        """
        check_range("val_fraction", fraction, 0, 1, open_ends=True)
        held = max(1, round(fraction * len(self)))
        if held >= len(self):
            raise ValueError(f"val_fraction={fraction} leaves none of {len(self)} to train on")
        order = list(range(len(self)))
        random.Random(f"pitome-vlm/{seed}").shuffle(order)
        return (
            self._part(sorted(order[held:]), f"{self.name} without {held} held out"),
            self._part(sorted(order[:held]), f"{held} held out of {self.name}"),
        )

    def _part(self, chosen: list[int], name: str) -> Conversations:
        digest = hashlib.sha256(f"{self.fingerprint} {chosen}".encode()).hexdigest()
        rows = [self.conversations[index] for index in chosen]
        return Conversations(name, digest, rows, _Chosen(self._images, chosen))


@dataclass(frozen=True)
class Listed:
    """Images in memory or in files."""

    images: list[list[Any]]

    def __call__(self, index: int) -> list[Any]:
        """The images of one conversation."""
        return self.images[index]

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, a Pillow image loses its orientation or the transparency of its palette.
        plain = [[_plain(image) for image in images] for images in self.images]
        return {"images": plain}


@dataclass(frozen=True)
class _Chosen:
    """Some of the images."""

    images: Callable[[int], Sequence[Any]]
    chosen: list[int]

    def __call__(self, index: int) -> Sequence[Any]:
        return self.images(self.chosen[index])


def _plain(image: Any) -> Any:
    return load_image(image) if isinstance(image, Image.Image) else image


def located(image: Any, folder: Path | None, where: str) -> Any:
    """`locate` with the record's place in its error."""
    try:
        return locate(image, folder)
    except ImageError as error:
        raise DataError(f"{where}: {error}") from error


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """A folder of images that is there; FileNotFoundError if not."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"image_folder {folder} is not a folder")
    return folder
