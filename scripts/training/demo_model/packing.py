"""Packing many questions about one image into one sequence.

Token layout, block mask and positions. An image is encoded once; each
conversation (one question, sometimes two turns) sees the image and itself, never another
conversation, exactly as if it had been asked alone. Leaves losses and models to
`language.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pitome_vlm.demo.processor import (
    ASSISTANT,
    BOS,
    EOS,
    FILLER_WORDS,
    IMAGE,
    PAD,
    UNKNOWN,
    USER,
)

from .data import Arrays
from .world import DEMO, World


@dataclass
class Packed:
    """A batch of sequences and where its answers and mentions are (image, token) pairs."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    answer_at: Tensor
    answers: Tensor
    types: Tensor
    question: Tensor
    mention_at: Tensor
    mentions: Tensor


@dataclass
class _Sequence:
    ids: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, ids: list[int], block: int, position: int) -> int:
        self.ids += ids
        self.block += [block] * len(ids)
        self.positions += range(position, position + len(ids))
        return position + len(ids)


def prefix(rng: random.Random | None, world: World = DEMO) -> list[int]:
    """Tokens up to and including the image, with 0 to 10 random words around "user:"."""
    filler: list[int] = []
    if rng is not None and rng.random() < 0.6:
        filler = [
            UNKNOWN if rng.random() < 0.08 else world.words[rng.choice(FILLER_WORDS)]
            for _ in range(rng.randint(1, 10))
        ]
    cut = 0 if rng is None else rng.choice((0, len(filler)))
    return [BOS, *filler[:cut], world.words[USER], *filler[cut:], *[IMAGE] * world.patches]


def pack(
    arrays: Arrays,
    scenes: np.ndarray,
    per_scene: int | None,
    rng: random.Random | None,
    world: World = DEMO,
) -> Packed:
    """Sequences for some scenes; without `rng` every question stands alone, without filler."""
    user, assistant = world.words[USER], world.words[ASSISTANT]
    sequences: list[_Sequence] = []
    answer_at, chosen, mention_at, mentions = [], [], [], []
    for index, scene in enumerate(scenes):
        questions = list(range(arrays.scene_start[scene], arrays.scene_start[scene + 1]))
        if rng is not None:
            questions = rng.sample(questions, min(len(questions), per_scene or len(questions)))
        sequence = _Sequence()
        start = sequence.add(prefix(rng, world), 0, 0)
        block, position = 0, start
        for q in questions:
            first, length, answer, _ = arrays.questions[q]
            text = arrays.tokens[first : first + length].tolist()
            if block and rng is not None and rng.random() < 0.2:
                position = sequence.add([EOS, user], block, position)
            else:
                block, position = block + 1, start
            base = len(sequence.ids)
            position = sequence.add([*text, assistant, int(answer)], block, position)
            answer_at.append((index, base + length))
            chosen.append(q)
            for word, number, row, column in arrays.mentions[q]:
                if word >= 0:
                    mention_at.append((index, base + word))
                    mentions.append((number, row, column))
        sequences.append(sequence)
    rows = arrays.questions[chosen]
    return Packed(
        *_tensors(sequences),
        torch.tensor(answer_at).T,
        torch.from_numpy(rows[:, 2]).long(),
        torch.from_numpy(rows[:, 3]).long(),
        torch.tensor(chosen),
        torch.tensor(mention_at).T,
        torch.tensor(np.array(mentions)).long(),
    )


def _tensors(sequences: list[_Sequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids, positions and the additive attention mask."""
    longest = max(len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), longest), PAD)
    block = torch.full((len(sequences), longest), -1)
    positions = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, s in enumerate(sequences):
        ids[row, : len(s.ids)] = torch.tensor(s.ids)
        block[row, : len(s.ids)] = torch.tensor(s.block)
        positions[row, : len(s.ids)] = torch.tensor(s.positions)
    keys, queries = block[:, None, :], block[:, :, None]
    seen = ((keys == 0) | (keys == queries)) & (keys >= 0)
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    seen |= torch.eye(longest, dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return ids, positions, mask[:, None]
