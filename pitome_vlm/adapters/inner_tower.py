"""What the generic adapter asks of a kind of vision tower in which tokens merge.

A kind is named by a record (`Family.tower`) and knows nothing of families; whether a tower is of
that kind is told by its parts. The last of its layers hands every place of the unmerged tower its
group's value, so that the model's own code after it finds the shapes that it expects.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import Schedule
from ..merge.tiles import CellGroups, PackedItem
from .grids import Grid


@dataclass(frozen=True)
class Reading:
    """How a call reads a tower.

    Attributes:
        depths: numbers of layers after which states are read.
        patches: (frames, rows, columns) of the patches of every image (or tile).
        row: patches that the tower has a row for, of which an image fills as many as it has; 0
            where nothing is filled up.
    """

    depths: tuple[int, ...] = ()
    patches: tuple[Grid, ...] = ()
    row: int = 0


@dataclass(frozen=True)
class Comparison:
    """Tokens that a layer compares with each other, for the count of FLOPs.

    Attributes:
        layer: its number, from 0.
        entering: tokens of one set that is merged on its own.
        leaving: tokens that are left of it.
        times: sets.
        key_width: channels of what tokens are compared by where that is attention keys.
        state_width: the same for hidden states.
        ranking: FLOPs of the attention logits that rank the tokens of all sets, where an algorithm
            asks for them.
    """

    layer: int
    entering: int
    leaving: int
    times: int
    key_width: int
    state_width: int
    ranking: int = 0


class TowerKind(abc.ABC):
    """How tokens merge in one kind of tower; without state.

    `Schedule.tower` is in tokens of a typical image as the prompt shows them. A kind merges in
    proportion, whatever its own tokens are and however many an image has.

    Attributes:
        spread: groups end with the tower, because its values are mixed afterwards. Otherwise
            `groups` says what the tower merged, and merging goes on from there.
    """

    spread: bool = False

    @abc.abstractmethod
    def layers(self, tower: nn.Module) -> int:
        """Layers that are run; 0 where a tower is not of this kind."""

    @abc.abstractmethod
    def install(self, tower: nn.Module) -> None:
        """Let the layers merge where an encoding says so; all or nothing."""

    @abc.abstractmethod
    def uninstall(self, tower: nn.Module) -> None:
        """Undo `install` completely; a no-op on an untouched tower."""

    @abc.abstractmethod
    def encoding(
        self,
        tower: nn.Module,
        merge_pass: MergePass,
        items: Sequence[PackedItem],
        reading: Reading,
    ) -> contextlib.AbstractContextManager[MergePass]:
        """Let a tower merge for the length of a block, in which the model reads its features.

        Args:
            tower: an installed one, unless `merge_pass` merges nothing in it.
            merge_pass: what is asked for.
            items: the images that are read, in order; every canvas is a frame (or tile) of tokens.
            reading: how they are read.

        Returns:
            The pass that holds the tower's plans afterwards.

        Raises:
            RuntimeError: the tower has to merge and is not installed.
        """

    def groups(self, merge_pass: MergePass, items: Sequence[PackedItem]) -> list[CellGroups] | None:
        """What the tower merged, by image; None for nothing, or where groups end with it.

        Args:
            merge_pass: of `encoding`.
            items: as there.
        """
        del merge_pass, items
        return None

    @abc.abstractmethod
    def flops(
        self,
        tower: nn.Module,
        reading: Reading,
        footprint: Footprint,
        schedule: Schedule | None,
    ) -> int | None:
        """FLOPs of a tower for an image or video, without those of `comparisons`.

        Args:
            tower: the tower.
            reading: how the image is read.
            footprint: the image.
            schedule: what is merged, None for nothing.

        Returns:
            None for a tower that is counted as a whole.
        """

    def comparisons(
        self, tower: nn.Module, reading: Reading, footprint: Footprint, schedule: Schedule
    ) -> list[Comparison]:
        """What merging compares in the tower; arguments as for `flops`."""
        del tower, reading, footprint, schedule
        return []


class WholeTower(TowerKind):
    """A tower that is left alone."""

    @override
    def layers(self, tower: nn.Module) -> int:
        return 0

    @override
    def install(self, tower: nn.Module) -> None:
        pass

    @override
    def uninstall(self, tower: nn.Module) -> None:
        pass

    @override
    def encoding(
        self,
        tower: nn.Module,
        merge_pass: MergePass,
        items: Sequence[PackedItem],
        reading: Reading,
    ) -> contextlib.AbstractContextManager[MergePass]:
        return contextlib.nullcontext(merge_pass)

    @override
    def flops(
        self,
        tower: nn.Module,
        reading: Reading,
        footprint: Footprint,
        schedule: Schedule | None,
    ) -> int | None:
        return None


def weights(module: nn.Module) -> int:
    """Weights of all linear layers and convolutions of a module."""
    return sum(map(own_weights, module.modules()))


def own_weights(module: nn.Module) -> int:
    """Weights of a linear layer or convolution; 0 of any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel() if isinstance(module, (nn.Conv2d, nn.Conv3d)) else 0
