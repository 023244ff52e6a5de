"""What the tiny models of a family share: weights, words, rows of images and padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

IMAGE, VIDEO, START, END = 99, 98, 97, 96
SPECIAL = 90  # Words are below it; placeholders and separators are from here on.
VOCABULARY = 128


@dataclass(frozen=True)
class Shown:
    """One image as the processor writes it."""

    ids: list[int]  # Placeholders with the separators between and around them.
    inputs: dict[str, torch.Tensor]  # What the processor returns for it, one entry or more.
    tiles: tuple[int, ...]  # Placeholders of every tile, crop or the image itself.


def joined(rows: list[list[Shown]]) -> dict[str, torch.Tensor]:
    """The inputs of all images, one after the other."""
    shown = [one.inputs for row in rows for one in row]
    return {name: torch.cat([one[name] for one in shown]) for name in (shown or [{}])[0]}


def nothing_more(ids, mask):
    return {}


def no_label(place):
    return []


def modality(name: str, *tokens: int):
    """A field that is 1 where the processor counts a token as one of an image."""

    def more(ids, mask):
        return {name: torch.isin(ids, torch.tensor(tokens or [IMAGE])).long()}

    return more


@dataclass(frozen=True)
class Family:
    """`family()` makes a model and a batch, `family.batch(...)` another batch for it."""

    build: Callable  # () -> model with any weights
    show: Callable  # (number of the image, generator) -> Shown
    image_token: int = IMAGE
    collate: Callable = joined  # rows of Shown -> inputs
    more: Callable = nothing_more  # (ids, mask) -> inputs
    first: bool = False  # Images come before the first word (PaliGemma).
    label: Callable = no_label  # place of the image in its row -> ids before it
    spread: dict = field(default_factory=dict)  # Part of a name: standard deviation.

    def __call__(self, **batch):
        return self.model(), self.batch(**batch)

    def model(self, *, seed: int = 0):
        torch.manual_seed(seed)
        return drawn(self.build(), self.spread)

    def shown(self, images=(1, 2), *, seed: int = 1) -> list[list[Shown]]:
        generator = torch.Generator().manual_seed(seed)
        numbers = iter(range(sum(images)))
        return [[self.show(next(numbers), generator) for _ in range(n)] for n in images]

    def tokens(self, images=(1, 2)) -> list[list[tuple[int, ...]]]:
        """Placeholders of every tile of every image of every row."""
        return [[one.tiles for one in row] for row in self.shown(images)]

    def batch(self, images=(1, 2), texts=(3, 5), *, side: str = "left", seed: int = 1):
        """`images[i]` images and `texts[i]` closing words in row i, padded on `side`."""
        rows = self.shown(images, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)

        def words(n):
            return torch.randint(3, SPECIAL, (n,), generator=generator).tolist()

        lines = []
        for row, text in zip(rows, texts, strict=True):
            line = [] if self.first else [1]
            for place, one in enumerate(row):
                line += ([] if self.first else words(2)) + self.label(place) + one.ids
            lines.append(line + [1] * self.first + words(text))
        ids, mask = padded(lines, side)
        batch = {"input_ids": ids, "attention_mask": mask}
        return batch | self.more(ids, mask) | (self.collate(rows) if sum(images) else {})


def padded(lines: list[list[int]], side: str):
    width = max(map(len, lines))
    ids = torch.zeros(len(lines), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, line in enumerate(lines):
        place = slice(width - len(line), None) if side == "left" else slice(len(line))
        ids[i, place], mask[i, place] = torch.tensor(line), 1
    return ids, mask


def drawn(model, spread):
    """Weights large enough for outputs to differ by word and pixel."""
    model = model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, _spread(name, spread))
        head = model.get_output_embeddings()
        head.weight[SPECIAL:] *= 0.01  # Answers have no placeholder in them.
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def _spread(name: str, spread: dict) -> float:
    for part, value in spread.items():
        if part in name:
            return value
    if "embed_tokens" in name or "lm_head" in name:
        return 1.0
    return 0.3 if "language_model" in name else 0.2


def text(model_type: str, **more) -> dict:
    """A language model of two layers and grouped heads of 8 channels."""
    words = {"model_type": model_type, "vocab_size": VOCABULARY, "hidden_size": 32}
    words |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096}
    return words | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | more


def vision(model_type: str, **more) -> dict:
    tower = {"model_type": model_type, "hidden_size": 32, "intermediate_size": 64}
    return tower | {"num_hidden_layers": 2, "num_attention_heads": 4} | more
