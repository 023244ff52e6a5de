"""What training knows of a kind of images and questions: words, patches, types.

The demo's is `DEMO`. Another data set that brings its own trains with the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pitome_vlm.demo.processor import GRID, vocabulary
from pitome_vlm.demo.questions import NUMBER_WORDS, QUESTION_TYPES
from pitome_vlm.demo.scenes import COLOURS, KINDS, NUMBER, SHAPES, SIZES


@dataclass(frozen=True)
class World:
    """A kind of images and questions.

    Attributes:
        words: of the tokenizer, with their ids.
        grid: patches of a side.
        types: of questions.
        weights: [types] of their answers' losses.
        kinds: of images; image i is of kind i modulo their number.
        shown_words: what projected patches are to point at.
        shown: rows of `Arrays.objects` [n, fields] to what of it a patch shows, [n, shown words]
            in 0 and 1.
    """

    words: dict[str, int]
    grid: int
    types: tuple[str, ...]
    weights: Tensor
    kinds: tuple[str, ...]
    shown_words: tuple[str, ...]
    shown: Callable[[Tensor], Tensor]

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.grid * self.grid


def _shown(rows: Tensor) -> Tensor:
    colour, shape, size, digit = rows[:, :4].unbind(-1)
    return torch.cat(
        [
            functional.one_hot(colour, len(COLOURS)),
            functional.one_hot(shape, len(SHAPES) + 1),
            functional.one_hot(digit.clamp(min=0), 10) * (digit >= 0)[:, None],
            functional.one_hot(size, len(SIZES)),
        ],
        -1,
    ).float()


DEMO = World(
    vocabulary(),
    GRID,
    QUESTION_TYPES,
    # Counting and comparing places are learnt last; most phrases mean nothing or just one object.
    torch.tensor([{"count": 3.0, "relation": 1.5}.get(name, 1.0) for name in QUESTION_TYPES]),
    KINDS,
    (*COLOURS, *SHAPES, NUMBER, *NUMBER_WORDS, *SIZES),
    _shown,
)
