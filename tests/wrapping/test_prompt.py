"""Prompt compaction against a row-by-row reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pitome_vlm.wrapping.columns import compact_positions, compaction, surplus_placeholders

FULL, KEPT, IMAGE = 6, 2, -1


@st.composite
def conversations(draw):
    """Rows of words and images, as lists in which an image is FULL placeholders."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        pieces = draw(st.lists(st.booleans(), min_size=1, max_size=5))
        row = []
        for image in pieces:
            row += [IMAGE] * FULL if image else list(range(1, 1 + draw(st.integers(1, 4))))
        rows.append(row)
    return rows


def pad(rows, left, fill=0):
    width = max(map(len, rows))
    fills = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for f, r in zip(fills, rows, strict=True)])


def shorten(row):
    out, seen = [], 0
    for word in row:
        seen = seen + 1 if word == IMAGE else seen
        if word != IMAGE or (seen - 1) % FULL < KEPT:
            out.append(word)
    return out


@settings(deadline=None)
@given(rows=conversations(), left=st.booleans())
def test_rows_are_shortened_as_if_one_by_one(rows, left):
    ids = pad(rows, left)
    mask = pad([[1] * len(row) for row in rows], left)
    images = sum(row.count(IMAGE) for row in rows) // FULL
    drop = surplus_placeholders(ids == IMAGE, [FULL] * images, [KEPT] * images)
    moves = compaction(ids == IMAGE, drop, mask, left=left)
    short = [shorten(row) for row in rows]
    assert torch.equal(moves.take(ids, 0), pad(short, left))
    assert torch.equal(moves.take(mask, 0), pad([[1] * len(row) for row in short], left))
    assert torch.equal(moves.valid.long(), moves.take(mask, 0))
    assert moves.removed == ids.shape[1] - max(map(len, short))


@given(rows=conversations())
def test_positions_close_the_gaps(rows):
    ids = torch.tensor([rows[0]])
    images = rows[0].count(IMAGE) // FULL
    drop = surplus_placeholders(ids == IMAGE, [FULL] * images, [KEPT] * images)
    positions = torch.arange(ids.shape[1])[None] + 5
    kept = compact_positions(positions, drop)[~drop]
    assert kept.tolist() == list(range(5, 5 + len(kept)))


def test_masked_columns_inside_a_row_stay():
    drop = torch.zeros(2, 6, dtype=torch.bool)
    mask = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]])
    moves = compaction(drop, drop, mask)
    assert moves.take(mask, 0).tolist() == [[0, 1, 0, 1, 1], [1, 1, 1, 1, 0]]


def test_matching_counts_pass_and_others_name_both_numbers():
    short = torch.ones(1, 4, dtype=torch.bool)
    assert not surplus_placeholders(short, [6, 6], [2, 2]).any()
    with pytest.raises(ValueError, match=r"5 image placeholders for 2 images.*12.*4"):
        surplus_placeholders(torch.ones(1, 5, dtype=torch.bool), [6, 6], [2, 2])
