"""Rotary positions between two whole ones, with vLLM's own kernel.

vLLM's rotary embedding looks angles up in a table, by integer positions. It is given another table:
one row for every token of the step, and the numbers of the rows as positions. Where a token has a
time, a row and a column, every pair of channels turns by one of them.

Axes: n tokens of a step, D numbers of a place, P positions of vLLM's own table, R channels that are
rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding, RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import apply_interleaved_rope

from .language_config import UNCALIBRATED

# Of cosines and sines of a table whose angles are rounded in float32, where they reach thousands.
_TOLERANCE = 0.05


class StepTable(nn.Module):
    """Cosines and sines of the tokens of one step, for one rotary embedding of the model."""

    cos: Tensor
    sin: Tensor
    step: Tensor
    axes: Tensor
    pairs: Tensor
    table: Tensor

    def __init__(self, rotary: Any, room: int) -> None:
        """Read off what is needed to place tokens anywhere.

        Args:
            rotary: vLLM's rotary embedding.
            room: most tokens of a step.

        Raises:
            ValueError: its angles do not grow evenly with the position.
        """
        super().__init__()
        same = type(rotary) is MRotaryEmbedding or all(
            getattr(type(rotary), name, None) is getattr(RotaryEmbedding, name)
            for name in ("forward_native", "forward_static", "forward_cuda", "forward_cpu")
        )
        # In float32: vLLM rounds its own table to the model's dtype.
        exact = rotary._compute_cos_sin_cache().float() if same else torch.zeros(1, 2)
        cos, sin = exact.chunk(2, -1)
        if len(exact) > 1:
            turned = torch.cat(_turned(cos[:-1], sin[:-1], _step(cos, sin)), -1)
            same = same and bool((turned - exact[1:]).abs().max() < _TOLERANCE)
        if not same or len(exact) < 2:
            raise ValueError(
                f"{type(rotary).__name__} has no places between two positions, so the language "
                f"model cannot be told where merged tokens sit; serve it with {UNCALIBRATED}"
            )
        self.register_buffer("cos", cos.contiguous(), persistent=False)
        self.register_buffer("sin", sin.contiguous(), persistent=False)
        self.register_buffer("step", _step(cos, sin), persistent=False)
        axes = _axes(rotary, cos.shape[1]).to(cos.device)
        self.register_buffer("axes", axes, persistent=False)
        self.register_buffer("pairs", torch.arange(len(axes), device=cos.device), persistent=False)
        table = torch.zeros(room, exact.shape[1], dtype=rotary.dtype, device=exact.device)
        self.register_buffer("table", table, persistent=False)

    @override
    def forward(self, places: Tensor) -> None:
        """Write the rows of a step's tokens, which sit at `places` [D, n] float32."""
        # [n, R / 2], by the number that turns a pair of channels.
        places = places[self.axes].T
        whole = places.floor().clamp(0, len(self.cos) - 1).long()
        # What lies past vLLM's table, as unreduced positions may, is all turned from its last row.
        rest = (places - whole) * self.step
        cos, sin = _turned(self.cos[whole, self.pairs], self.sin[whole, self.pairs], rest)
        half = cos.shape[1]
        self.table[: len(places), :half] = cos
        self.table[: len(places), half:] = sin

    def embedding(self, rotary: Any) -> RotaryEmbedding:
        """A rotary embedding that looks up this table."""
        own = RotaryEmbedding(
            rotary.head_size,
            rotary.rotary_dim,
            rotary.max_position_embeddings,
            rotary.base,
            rotary.is_neox_style,
            rotary.dtype,
            init_cache=False,
        )
        own.register_buffer("cos_sin_cache", self.table, persistent=False)
        return own


def _axes(rotary: Any, pairs: int) -> Tensor:
    """[R / 2] int64: the number of a place by which every pair of channels turns."""
    sections = getattr(rotary, "mrope_section", None)
    if not sections:
        return torch.zeros(pairs, dtype=torch.long)
    numbers = torch.arange(len(sections))
    if getattr(rotary, "mrope_interleaved", False):
        turned_by: Tensor = apply_interleaved_rope(numbers[:, None].repeat(1, pairs), sections)
        return turned_by
    return numbers.repeat_interleave(torch.tensor(sections))


def _step(cos: Tensor, sin: Tensor) -> Tensor:
    """Angles from one position to the next, [R / 2]; at most one, so position 1 tells them."""
    return torch.atan2(sin[1], cos[1])


def _turned(cos: Tensor, sin: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines after a turn; whatever they are scaled by (YaRN) stays."""
    more_cos, more_sin = angle.cos(), angle.sin()
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin
