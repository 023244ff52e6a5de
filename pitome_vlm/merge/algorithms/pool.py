"""Average pooling over the patch grid, whatever is in the image: a baseline for the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algorithm import Algorithm, MergeContext
from ..plan import MergePlan


def grid_cells(rows: int, columns: int, n_out: int) -> Tensor:
    """Cut a grid into exactly `n_out` near-square rectangles.

    Where `n_out` = R x C with R dividing the rows and C the columns the cells are equal (ordinary
    average pooling); otherwise R bands of rows are cut into as many columns as are still needed.

    Returns:
        [rows * columns] int64, the cell of every patch, cells in raster order.
    """
    even = [
        (r, n_out // r)
        for r in range(1, rows + 1)
        if n_out % r == 0 and rows % r == 0 and columns % (n_out // r) == 0
    ]
    shape = rows / columns
    if even:
        bands = min(even, key=lambda rc: abs(math.log(rc[0] / rc[1] / shape)))[0]
    else:
        bands = round(math.sqrt(n_out * shape))
        bands = min(rows, n_out, max(bands, -(-n_out // columns)))
    cells = torch.empty(rows, columns, dtype=torch.int64)
    first = 0
    for band in range(bands):
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        width = (band + 1) * n_out // bands - band * n_out // bands
        # Column x of `columns` lies in part floor(x * width / columns): widths differ by one.
        cells[top:bottom] = first + torch.arange(columns) * width // columns
        first += width
    return cells.flatten()


# A constant of a compiled graph: made on the host, it would be copied in every call, which a CUDA
# graph cannot hold.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cells_on(device: torch.device, rows: int, columns: int, n_out: int) -> Tensor:
    return grid_cells(rows, columns, n_out).to(device)


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Average neighbouring patches into `n_out` cells.

    Raises:
        ValueError: the tokens are no longer the whole grid, which `ctx` must carry.
    """
    batch, n_tokens = keys.shape[:2]
    if ctx.grid is None or ctx.grid[0] * ctx.grid[1] != n_tokens:
        raise ValueError(
            f"algorithm 'pool' needs the whole patch grid, but sees {n_tokens} tokens of a grid "
            f'of {ctx.grid}; use it alone, at stage="projector"'
        )
    cells = _cells_on(keys.device, *ctx.grid, n_out)
    return MergePlan.from_assignment(cells.expand(batch, n_tokens), n_out)


ALGORITHM = Algorithm(
    name="pool",
    plan=plan,
    source="average pooling over the patch grid",
    pairwise=False,
    default_stage="projector",
    one_step=True,
    needs_grid=True,
    compares=False,
)
