"""What `describe` returns: what is merged where, and what it saves, as a table for people."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from ..merge.config import MergeConfig
from ..merge.counts import Footprint, TokenCount
from ..merge.schedule import Schedule
from ..wrapping.positions import Calibration
from .accounting import Costs
from .tables import Table, bytes_text, flops_text, folded
from .weights import Weights


@dataclass(frozen=True)
class Description:
    """What merging does to a model; shown as a table of at most 80 columns, in HTML in a notebook.

    Attributes:
        config: the merge options described.
        schedule: token counts of an image, or of a tile where images are cut into tiles.
        pieces: tokens and tiles of what is merged on its own in the image described: all of it,
            or every tile.
        count: tokens of that image without and with merging.
        image_size: (height, width) of that image in pixels; None where all images have one size.
        wrapped: whether these options are in force; otherwise they are a plan.
        before: costs without merging, of a prompt with one image.
        after: costs with merging, of the same prompt.
        calibration: what the language model is told about merged tokens.
        weights: bytes of the model's weights as loaded, quantised or not.
        unit: "tile" where it is one tile of an image that is described.
        frames: of the video described; None for an image.
        untold: "N KIND layers" of every kind of layers of the language model that no size bias
            reaches.
        resized: whether sizes are those after the processor's resizing, which was not asked.
        patch_steps: of a tower that has more patches than tokens, (layer, patches before, patches
            after) of every merging layer; empty for others.
    """

    config: MergeConfig
    schedule: Schedule
    pieces: tuple[Footprint, ...]
    count: TokenCount
    image_size: tuple[int, int] | None
    wrapped: bool
    before: Costs
    after: Costs
    calibration: Calibration
    weights: Weights
    unit: str = "image"
    frames: int | None = None
    resized: bool = False
    untold: tuple[str, ...] = ()
    patch_steps: tuple[tuple[int, int, int], ...] = ()

    @property
    def footprint(self) -> Footprint:
        """Of the first of `pieces`, which is all of the image where it is not cut into tiles."""
        return self.pieces[0]

    @property
    def summary(self) -> str:
        """One line: algorithm, options, budget, tokens in and out."""
        return (
            f"{self.config.summary()}: {self.tokens_in} -> {self.count.shown} visual tokens per "
            f"{self.shown}"
        )

    @property
    def shown(self) -> str:
        """What tokens are counted of: "image of 1024 x 768 pixels", "tile", "video of 8 frames"."""
        return f"{self._thing}{self._of_size()}"

    @property
    def _thing(self) -> str:
        return "video" if self.frames else self.unit

    @property
    def _in_tiles(self) -> bool:
        """Whether the tower's patches are those of a tile, and not of the whole image."""
        if self.schedule.typical:
            return self.unit == "tile" or len(self.pieces) > 1
        return self.schedule.packed

    def _of_size(self) -> str:
        text = f" of {self.frames} frame{'s' * (self.frames > 1)}" if self.frames else ""
        if self.image_size is None:
            return text
        height, width = self.image_size
        return f"{text} of {width} x {height} pixels"

    @property
    def tokens_in(self) -> int:
        """Visual tokens per image without merging."""
        return self.count.full

    @property
    def tokens_out(self) -> int:
        """Visual tokens per image with merging; the maximum where every image has its own count."""
        return self.count.out

    @property
    def tower_steps(self) -> tuple[tuple[int, int, int], ...]:
        """(layer, patches before, patches after) of every merging tower layer, without CLS.

        The patches are those of one tile where images are cut into tiles. In towers that merge
        units of patches, as many as become one token, they are the image's tokens.
        """
        if self.patch_steps:
            return self.patch_steps
        schedule = self.schedule
        if schedule.typical:
            schedule = schedule.of_image(self.count.full, self.count.out)
        return schedule.tower_steps

    @property
    def projector_steps(self) -> tuple[tuple[int, int], ...]:
        """(patches before, patches after) of every merging step before the projector.

        Empty where images are cut into tiles, which are merged after the projector (`count`).
        """
        if self.schedule.packed:
            return ()
        tower, steps = self.schedule.tower, self.schedule.projector
        first = tower[-1][1] if tower else self.schedule.n_tokens
        pairs = zip((first, *steps), steps, strict=False)
        return tuple((entering, leaving) for entering, leaving in pairs if leaving < entering)

    def saved(self, field: str) -> float:
        """Percent saved in a numeric field or property of `Costs`, such as "prefill_flops"."""
        whole = getattr(self.before, field)
        return 100.0 * (1 - getattr(self.after, field) / whole) if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: the options, the counts, and every cost without, with and saved."""
        fields = [name for name, _, _ in _ROWS]
        return {
            "wrapped": self.wrapped,
            "summary": self.summary,
            "config": self.config.to_dict(),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "image_size": None if self.image_size is None else list(self.image_size),
            "tiles": self.footprint.tiles if len(self.pieces) == 1 else len(self.pieces),
            "frames": self.frames,
            "tower_steps": [list(step) for step in self.tower_steps],
            "projector_steps": [list(step) for step in self.projector_steps],
            "calibration": dataclasses.asdict(self.calibration),
            "text_tokens": self.before.text_tokens,
            "weights": dataclasses.asdict(self.weights) | {"total": self.weights.total},
            "costs": {
                name: {
                    "without": getattr(self.before, name),
                    "with": getattr(self.after, name),
                    "saved_percent": self.saved(name),
                }
                for name in fields
            },
        }

    def __str__(self) -> str:
        heading = [line for text in self._heading() for line in textwrap.wrap(text, _WIDTH)]
        rest = [*self._where(), "", *self._table(), "", *self._weights(), *self._footnote()]
        return "\n".join([*heading, *rest])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        note = "\n".join([*self._where(), *self._weights(), *self._footnote()])
        rows, numbers = self._rows(), frozenset((1, 2, 3))
        return Table("\n".join(self._heading()), ("", *_COLUMNS), rows, note, numbers).html()

    def _heading(self) -> list[str]:
        return [self.summary] if self.wrapped else [_NOT_IN_FORCE, self.summary]

    def _where(self) -> list[str]:
        lines = self._tiles()
        if self.count.is_identity:
            return [*lines, "nothing is merged: the untouched code runs"]
        if self.tower_steps:
            steps = [f"{layer}: {a} -> {b}" for layer, a, b in self.tower_steps]
            tile = " of a tile" if self._in_tiles else ""
            units = self.schedule.typical and not self.schedule.spread
            what = "tokens" if units else f"patches{tile}"
            lines += folded(f"{what} by tower layer", steps)
        if self.schedule.typical:
            lines.append(f"tokens after the tower: {self.count.full} -> {self.count.shown}")
        elif self.schedule.packed:
            tiles = f"{self.footprint.tiles} x {self.schedule.tower_out}"
            lines.append(f"tokens after the projector: {tiles} of tiles -> {self.count.shown}")
        if self.projector_steps:
            steps = [f"{a} -> {b}" for a, b in self.projector_steps]
            lines += folded("patches before the projector", steps)
        skipped = self.schedule.n_layers - len(self.after.layer_flops)
        if skipped and not self.schedule.typical:
            lines.append(f"tower layers left out (nothing reads their output): {skipped}")
        lines.append(f"calibration of the language model: {self.calibration}")
        if self.untold and self.calibration.size_bias:
            lines.append(f"not told sizes, for want of a mask: {', '.join(self.untold)}")
        return lines

    def _tiles(self) -> list[str]:
        if self.frames and self.footprint.frames:
            return [self._grids()]
        if len(self.pieces) > 1:
            sizes = sorted({piece.full for piece in self.pieces})
            each = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
            return [f"tiles of {each} tokens, each merged on its own: {len(self.pieces)}"]
        if not self.schedule.packed or self.schedule.typical:
            return []
        tiles, newlines = self.footprint.tiles, self.footprint.newlines
        return [
            f"tiles of {self.schedule.tokens_in} patches: {tiles}, packed to "
            f"{self.footprint.full - newlines} patches and {newlines} newlines"
        ]

    def _grids(self) -> str:
        """How the frames of a video are merged."""
        grids = self.footprint.frames
        each = (self.footprint.full - self.footprint.newlines) // grids
        window = min(self.config.frames_together, grids)
        how = "each merged on its own" if window == 1 else f"{window} merged at a time"
        of = "" if grids == self.frames else f" (one for {-(-(self.frames or 1) // grids)} frames)"
        return f"grids of {each} tokens{of}, {how}: {grids}"

    def _table(self) -> list[str]:
        rows = [("", *_COLUMNS), *self._rows()]
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        return [
            title.ljust(first) + "".join(f"  {c:>{w}}" for c, w in zip(cells, others, strict=True))
            for title, *cells in rows
        ]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """(title, without, with, saved) of every cost."""
        dtype = f" ({self.after.kv_dtype})"
        return [
            (
                title.replace("image", self._thing) + (dtype if name.startswith("kv_") else ""),
                show(getattr(self.before, name)),
                show(getattr(self.after, name)),
                f"{self.saved(name):.1f} %",
            )
            for name, title, show in _ROWS
        ]

    def _weights(self) -> list[str]:
        parts, kind = self.weights, self.weights.quantisation
        sizes = [
            f"language model {bytes_text(parts.language_model)}" + (f" in {kind}" if kind else ""),
            f"vision tower {bytes_text(parts.vision_tower)}",
            f"projector {bytes_text(parts.projector)}",
            f"other {bytes_text(parts.other)}",
        ]
        return folded(f"weights {bytes_text(parts.total)}", sizes)

    def _footnote(self) -> list[str]:
        most = "" if self.schedule.fewest is None else " that keeps the most tokens"
        text = (
            f"computed for one {self._thing}{self._of_size()}{most} and "
            f"{self.before.text_tokens} text tokens, batch 1; one multiply-add is 2 FLOP"
        )
        if self.resized:
            text += "; the size is that after the processor's resizing"
        elif self.unit == "tile":
            text += "; the processor cuts an image into tiles, each of which is merged on its own"
        return textwrap.wrap(text, _WIDTH)


_WIDTH = 79
_COLUMNS = ("without", "with", "saved")
_NOT_IN_FORCE = "not switched on; with pitome_vlm.wrap(model, ...) and these options:"


_ROWS = (
    ("visual_tokens", "visual tokens per image", str),
    ("prompt_tokens", "prompt tokens", str),
    ("tower_flops", "vision tower", flops_text),
    ("projector_flops", "projector", flops_text),
    ("prefill_flops", "language model prefill", flops_text),
    ("total_flops", "all before the first token", flops_text),
    ("kv_bytes_per_image", "KV cache per image", bytes_text),
    ("kv_bytes", "KV cache of the prompt", bytes_text),
)
