"""Whether there is anything to learn: answers that are left once rows are cut to `max_length`.

A row without answer tokens has a loss of 0 and trains nothing, without an error from anyone.
"""

from __future__ import annotations

import warnings

from ..loading.records import DataError
from ..wrapping.columns import IGNORED_LABEL
from .collate import Collator
from .examples import Conversations

LOOKED_AT = 64
_BATCH = 8


def check_answers(
    collator: Collator, data: Conversations, *, batch_size: int = _BATCH, tell: bool = True
) -> None:
    """Check all texts, prepare some records as training will, count those with no answer left.

    At most `LOOKED_AT` records, evenly spaced, because their images have to be decoded: how many
    tokens an image takes depends on its size in some families. `answers_lost` counts the rest.

    Args:
        collator: of the run.
        data: of the run.
        batch_size: of the run; at most 8 are prepared at once.
        tell: warn of records without an answer; one process of several does.

    Raises:
        DataError: no record looked at has an answer left, one of them cannot be prepared, or a
            text holds a token that it must not (`Collator.check`).
    """
    for conversation in data.conversations:
        collator.check(conversation)
    count = min(len(data), LOOKED_AT)
    chosen = [index * len(data) // count for index in range(count)]
    size, needed = min(batch_size, _BATCH), []
    for start in range(0, count, size):
        examples = [data[index] for index in chosen[start : start + size]]
        batch = collator.whole(examples)
        kept = collator.cut(batch, examples)["labels"] != IGNORED_LABEL
        first = (batch["labels"] != IGNORED_LABEL).int().argmax(1) + 1
        needed += first[~kept.any(1)].tolist()
    if not needed:
        return
    looked = "records" if count == len(data) else f"records looked at (of {len(data)})"
    cut = f"max_length={collator.max_length} cuts"
    least, most = min(needed), max(needed)
    places = f"token {least}" if least == most else f"tokens {least} to {most}"
    where = f"their first answers begin at {places}, counted before merging"
    if len(needed) == count:
        raise DataError(
            f"{data.name}: {cut} every answer off in all {count} {looked}, so that nothing could "
            f"be learnt; {where}. Raise max_length"
        )
    if tell:
        warnings.warn(
            f"{data.name}: {cut} every answer off in {len(needed)} of {count} {looked}; nothing "
            f"is learnt from those; {where}",
            stacklevel=3,
        )


def answers_lost(lost: int, rows: int, max_length: int | None) -> None:
    """Warn at the end of a run of rows from which nothing was learnt."""
    if lost:
        warnings.warn(
            f"{lost} of the {rows} rows trained on had no answer left after "
            f"max_length={max_length}; nothing was learnt from those",
            stacklevel=3,
        )
