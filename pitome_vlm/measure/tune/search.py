"""Find the smallest budget within a loss: which cells are measured, in which order.

Every recipe walks down the budgets. It stops at a confident violation (the whole interval lies
above the target) or at the second violation in a row: quality nearly always falls with the
budget, but not always, so one violation that may be chance does not stop it. Later recipes start
only a few budgets above the smallest one known to be good, as many as the check may step up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cells import Cell
from .recipes import Recipe

Measure = Callable[[Recipe, int], Cell | None]
MOST_IN_A_ROW = 2
# A loss that equals the target must not miss it by rounding.
_TOLERANCE = 1e-9


def within(loss: float, target: float) -> bool:
    """Whether a loss is at most the target."""
    return loss <= target + _TOLERANCE


def walk_down(
    recipes: Sequence[Recipe],
    counts: Sequence[int],
    measure: Measure,
    *,
    max_loss: float,
    spare: int,
) -> list[Cell]:
    """Measure what is needed to find the smallest admissible budget.

    Args:
        recipes: in order of preference.
        counts: token counts, largest first.
        measure: makes a cell of the search part; None where the setting does not fit the model.
        max_loss: the target, as a share.
        spare: later recipes start so many budgets above the smallest admissible one.

    Returns:
        The cells, in the order they were measured.
    """
    cells: list[Cell] = []
    best: int | None = None
    for recipe in recipes:
        violations = 0
        for index in range(0 if best is None else max(0, best - spare), len(counts)):
            cell = measure(recipe, counts[index])
            if cell is None:
                break
            cells.append(cell)
            if within(cell.loss.value, max_loss):
                violations, best = 0, max(best or 0, index)
                continue
            violations += 1
            if not within(cell.loss.low, max_loss) or violations == MOST_IN_A_ROW:
                break
    return cells


def admissible(cells: Sequence[Cell], max_loss: float) -> list[Cell]:
    """The best cell of every token count that is within the target, fewest tokens first.

    At equal counts the lower loss wins, then the lower divergence.
    """
    best: dict[int, Cell] = {}
    for cell in cells:
        if not within(cell.loss.value, max_loss):
            continue
        known = best.get(cell.tokens)
        if known is None or _order(cell) < _order(known):
            best[cell.tokens] = cell
    return [best[tokens] for tokens in sorted(best)]


def _order(cell: Cell) -> tuple[float, float]:
    return round(cell.loss.value, 9), cell.divergence
