"""What `describe` returns of an encoder on its own: tokens per layer and FLOPs."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.encoders import encoder_layers, find_encoder, grid_of, shape_of
from ..adapters.inner_tower import own_weights
from ..merge.budget import schedule_for
from ..merge.config import DEFAULT_KEEP, MergeConfig
from ..merge.schedule import Schedule
from ..wrapping.wrap import base_model, is_wrapped, merge_config
from .flops import layers_flops, linear_flops, pooling_head_flops
from .tables import Table, flops_text, folded

_WIDTH = 79
_NOT_IN_FORCE = "not switched on; with pitome_vlm.wrap(model, ...) and these options:"


@dataclass(frozen=True)
class EncoderCosts:
    """FLOPs of an encoder for one image; one multiply-add is 2 FLOPs.

    Attributes:
        layer_flops: of every layer, with its merge.
        around_flops: of patch embedding and pooling head.
        merge_flops: the part of `layer_flops` that merging adds: comparing tokens, ranking them.
    """

    layer_flops: tuple[int, ...]
    around_flops: int
    merge_flops: int

    @property
    def total_flops(self) -> int:
        """Of the whole encoder. What a model does with its output (text, classes) is not in it."""
        return sum(self.layer_flops) + self.around_flops


@dataclass(frozen=True)
class EncoderDescription:
    """What merging does to an encoder; shown as text of at most 80 columns, as HTML in a notebook.

    Attributes:
        config: the merge options described.
        schedule: token counts.
        image_size: (height, width) of the image in pixels.
        wrapped: whether these options are in force; otherwise they are a plan.
        before: costs without merging.
        after: costs with merging.
    """

    config: MergeConfig
    schedule: Schedule
    image_size: tuple[int, int]
    wrapped: bool
    before: EncoderCosts
    after: EncoderCosts

    @property
    def tokens_in(self) -> int:
        """Tokens per image, leading ones included, before the first layer."""
        return self.schedule.tokens_in

    @property
    def tokens_out(self) -> int:
        """Tokens per image after the last layer, before their values are handed back."""
        return self.schedule.tokens_out

    @property
    def tower_steps(self) -> tuple[tuple[int, int, int], ...]:
        """(layer, patches before, patches after) of every layer that merges."""
        return self.schedule.tower_steps

    @property
    def flops_saved(self) -> float:
        """Percent of the encoder's FLOPs."""
        return 100 * (1 - self.after.total_flops / self.before.total_flops)

    @property
    def summary(self) -> str:
        """One line: algorithm, options, budget, tokens in and out."""
        height, width = self.image_size
        return (
            f"{self.config.summary()}: {self.tokens_in} -> {self.tokens_out} tokens per image of "
            f"{width} x {height} pixels"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "wrapped": self.wrapped,
            "summary": self.summary,
            "config": self.config.to_dict(),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "image_size": list(self.image_size),
            "tower_steps": [list(step) for step in self.tower_steps],
            "flops": {
                "without": self.before.total_flops,
                "with": self.after.total_flops,
                "merging": self.after.merge_flops,
                "saved_percent": self.flops_saved,
            },
        }

    def _rows(self) -> list[tuple[str, str, str, str]]:
        saved = 100 * (1 - self.tokens_out / self.tokens_in)
        before, after = self.before.total_flops, self.after.total_flops
        return [
            (
                "tokens after the last layer",
                str(self.tokens_in),
                str(self.tokens_out),
                _share(saved),
            ),
            ("encoder", flops_text(before), flops_text(after), _share(self.flops_saved)),
        ]

    def _heading(self) -> list[str]:
        return [self.summary] if self.wrapped else [_NOT_IN_FORCE, self.summary]

    def _note(self) -> list[str]:
        if self.schedule.is_identity:
            return ["nothing is merged: the untouched code runs"]
        steps = [f"{layer}: {a} -> {b}" for layer, a, b in self.tower_steps]
        note = (
            "after the last layer every patch is handed its group's value; FLOPs of the encoder "
            "alone, batch 1; one multiply-add is 2 FLOP"
        )
        return [*folded("patches by layer", steps), *textwrap.wrap(note, _WIDTH)]

    def __str__(self) -> str:
        rows = [("", "without", "with", "saved"), *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        heading = [line for text in self._heading() for line in textwrap.wrap(text, _WIDTH)]
        return "\n".join([*heading, *self._note(), "", *table])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        columns = ("", "without", "with", "saved")
        numbers = frozenset((1, 2, 3))
        heading, note = "\n".join(self._heading()), "\n".join(self._note())
        return Table(heading, columns, self._rows(), note, numbers).html()


def _share(percent: float) -> str:
    return f"{percent:.1f} %"


def describe_encoder(
    model: nn.Module,
    *,
    config: MergeConfig | None = None,
    image_size: tuple[int, int] | None = None,
) -> EncoderDescription:
    """What merging does to an encoder, alone or inside a model; nothing is run.

    Args:
        model: a model that `wrap` takes as an encoder, wrapped or not.
        config: describe these options instead of those in force; None takes those in force, or
            keep=0.25 as an example on an unwrapped model.
        image_size: (height, width) of the image in pixels; None for that of the configuration.

    Raises:
        ValueError: the budget of `config` does not fit, or an image smaller than a patch.
    """
    in_force = is_wrapped(model) and (config is None or config == merge_config(model))
    if config is None:
        config = merge_config(model) if in_force else MergeConfig(keep=DEFAULT_KEEP)
    encoder = find_encoder(base_model(model))
    shape, nothing = shape_of(encoder, image_size), MergeConfig(keep=1.0)
    schedule = schedule_for(config, shape)
    return EncoderDescription(
        config=config,
        schedule=schedule,
        image_size=image_size or _own_size(encoder),
        wrapped=in_force,
        before=encoder_costs(encoder, schedule_for(nothing, shape), nothing, image_size),
        after=encoder_costs(encoder, schedule, config, image_size),
    )


def _own_size(encoder: Any) -> tuple[int, int]:
    size = encoder.config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def encoder_costs(
    encoder: Any, schedule: Schedule, config: MergeConfig, size: tuple[int, int] | None = None
) -> EncoderCosts:
    """FLOPs of an encoder for one image.

    Pooling heads read all tokens, which are there again after the last layer; other linear layers
    around the layers read the class token.

    Args:
        encoder: the encoder.
        schedule: token counts.
        config: algorithm, metric, placement.
        size: (height, width) of the image in pixels, None for that of the encoder's configuration.
    """
    width, blocks = encoder.config.hidden_size, list(encoder_layers(encoder))
    has_class = schedule.n_leading > 0
    layers, merging = layers_flops(blocks, schedule, config, width, has_class=has_class)
    rows, columns = grid_of(encoder, size)
    around = sum(2 * rows * columns * own_weights(part) for part in encoder.embeddings.modules())
    around += pooling_head_flops(encoder, encoder.config, schedule.tokens_in)
    pooler = getattr(encoder, "pooler", None)
    if pooler is not None:
        around += linear_flops(pooler)
    return EncoderCosts(layers, around, merging)
