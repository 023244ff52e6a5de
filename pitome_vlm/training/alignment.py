"""Answers in rows whose images are written with more than their placeholders.

Families put marks, line breaks and the names of tiles around and between the placeholders of an
image, so the row is not the text with placeholders repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def answers_among_marks(
    ids: Tensor,
    mask: Tensor,
    tokens: Sequence[tuple[int, bool]],
    visual: Tensor,
    image_id: int,
) -> Tensor | None:
    """Which columns of a row are answers.

    The text is cut at its images. What follows the last one ends the row; of each earlier part, the
    tokens from its first answer to its last stand somewhere before the next image.

    Args:
        ids: [T] of the row.
        mask: [T], 0 where it is padded.
        tokens: of the text without images, each with whether it belongs to an answer.
        visual: ids that only stand in images.
        image_id: the token that stands for an image in the text.

    Returns:
        [T] bool, or None where a part is not found.
    """
    columns = mask.nonzero().flatten()
    row = ids[columns].tolist()
    shown = torch.isin(ids[columns], visual.to(ids.device)).tolist()
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    *earlier, last = _parts(tokens, image_id)
    start = len(row)
    for part in (last, *reversed(earlier)):
        answers = [index for index, (_, answer) in enumerate(part) if answer]
        if not answers:
            continue
        stop = len(part) if part is last else answers[-1] + 1
        found = part[answers[0] : stop]
        if part is not last:
            while start > 0 and not shown[start - 1]:
                start -= 1
        start = _last_place(row[:start], [token for token, _ in found])
        if start < 0 or (part is last and start + len(found) != len(row)):
            return None
        inside = columns[start : start + len(found)]
        wanted[inside] = torch.tensor([answer for _, answer in found], device=ids.device)
    return wanted


def _parts(tokens: Sequence[tuple[int, bool]], image_id: int) -> list[list[tuple[int, bool]]]:
    """The text before, between and after its images."""
    parts: list[list[tuple[int, bool]]] = [[]]
    for token, answer in tokens:
        if token == image_id:
            parts.append([])
        else:
            parts[-1].append((token, answer))
    return parts


def _last_place(row: list[int], wanted: list[int]) -> int:
    """Where `wanted` stands in a row for the last time; -1 for nowhere."""
    length = len(wanted)
    starts = range(len(row) - length, -1, -1)
    return next((at for at in starts if row[at : at + length] == wanted), -1)
