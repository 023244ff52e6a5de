"""How many answers are right, from one forward pass over the references.

An answer is right if the most likely token at each of its places is the reference's: greedy
decoding would then write exactly the reference, including the end token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..wrapping.columns import IGNORED_LABEL


def most_likely(logits: Any, labels: Any) -> Tensor:
    """[B, S] token ids from [B, S, V] logits; a Trainer's `preprocess_logits_for_metrics`."""
    del labels
    scores: Tensor = logits[0] if isinstance(logits, (tuple, list)) else logits
    return scores.argmax(-1)


def answer_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy by answer token and by whole answer; a Trainer's `compute_metrics`.

    Args:
        prediction: `predictions` [N, S] token ids and `label_ids` [N, S], -100 if ignored.

    Returns:
        `token_accuracy`, `answer_accuracy` in [0, 1] and `answers`, their number.
    """
    labels = np.asarray(prediction.label_ids)[:, 1:]
    guesses = np.asarray(prediction.predictions)[:, :-1]
    counted = labels != IGNORED_LABEL
    right = guesses == labels
    # Every answer is a run of labelled tokens; they are numbered over all rows.
    begins = counted & ~np.pad(counted, ((0, 0), (1, 0)))[:, :-1]
    number = np.cumsum(begins.ravel()).reshape(begins.shape) - 1
    answers = int(begins.sum())
    wrong = np.bincount(number[counted & ~right], minlength=answers) if answers else np.zeros(0)
    return {
        "token_accuracy": float(right[counted].mean()) if counted.any() else 0.0,
        "answer_accuracy": float((wrong == 0).mean()) if answers else 0.0,
        "answers": answers,
    }
