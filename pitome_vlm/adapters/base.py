"""The base class of all adapters: what wrapping and measuring ask of a family of models.

One adapter serves every model of its family in the process, so adapters hold no state. Counts must
be known without running anything, on models whose weights are on the meta device as well.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common import whole_number
from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import Schedule, TowerShape
from ..merge.tokens import Encoded
from ..releases import accepted
from .features import token_id
from .inner_tower import Comparison
from .parts import ModelParts
from .tower import find_encoder_layers, install_tower, uninstall_tower


class Adapter(abc.ABC):
    """Where the parts of a family's models are, and how their features are read.

    Attributes:
        model_types: values of `config.model_type`.
        part_names: names of the parts in `model.model`, by what they are: `vision_tower`,
            `projector`, `language_model`.
        calls: calling convention, "transformers" or "original"; it decides which class is put
            before the model's own (`wrapping.wrap.MIXINS`).
        counted_per: what `tower_shape` describes: "image", "tile" or "frame".
        pixel_inputs: arguments of the model that hold pixels, and the kind of placeholder
            ("image", "video") each is for.
        vision_inputs: all arguments that `encode` consumes, pixels included; the language model
            does not see them.
        feature_options: arguments of a call that change how features are read.
        default_image_size: (height, width) in pixels of a typical image, used where only numbers
            are printed; None where every image is resized to one size.
        videos_pooled_first: videos are pooled and merged before the projector.
        sized_by_processor: how many tokens an image of a size has depends on the options of its
            processor, which the model's configuration does not hold.
        own_positions: the model places tokens by the grid of their image (`prompt_places`).
        own_scatter: the model's own forward puts visual tokens into a prompt of ids.
        first_place: position of a prompt's first token.
        one_mask: the language model takes no masks by layer type.
        place_inputs: those of `vision_inputs` that only say where tokens are; features do not
            depend on them.
    """

    model_types: tuple[str, ...] = ()
    part_names: Mapping[str, str] = {}
    calls: str = "transformers"
    counted_per: str = "image"
    pixel_inputs: Mapping[str, str] = {"pixel_values": "image"}
    vision_inputs: tuple[str, ...] = ("pixel_values",)
    feature_options: tuple[str, ...] = ()
    default_image_size: tuple[int, int] | None = None
    videos_pooled_first: bool = False
    sized_by_processor: bool = False
    own_positions: bool = False
    own_scatter: bool = False
    first_place: int = 0
    one_mask: bool = False
    place_inputs: tuple[str, ...] = ()

    def matches(self, model: Any) -> bool:
        """Whether this adapter serves the model.

        By model type and parts, not by class path, which differs between releases.
        """
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        core = getattr(model, "model", None)
        return model_type in self.model_types and all(
            hasattr(core, name) for name in self.part_names.values()
        )

    def is_same(self, other: Adapter) -> bool:
        """Whether another adapter serves the same models in the same way."""
        return type(other) is type(self) and other.model_types == self.model_types

    @abc.abstractmethod
    def parts(self, model: Any) -> ModelParts:
        """Where the weights are."""

    @abc.abstractmethod
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """Numbers of the vision tower, from the configuration alone.

        Features are read as it says, but for `feature_options`.

        Raises:
            TypeError: the number of patches is not known before an image is seen.
            ValueError: features are to be read in a way that the tower does not have.
        """

    def install(self, model: Any, *, inside_tower: bool) -> None:
        """Prepare the vision tower; all or nothing.

        Raises:
            TypeError: tokens merge `inside_tower` and merging does not know this tower, which is
                otherwise left alone.
        """
        towers = self.parts(model).towers
        try:
            for tower in towers:
                find_encoder_layers(tower)
        except TypeError:
            if inside_tower:
                raise
            return
        for tower in towers:
            install_tower(tower)

    def uninstall(self, model: Any) -> None:
        """Undo `install` completely."""
        for tower in self.parts(model).towers:
            uninstall_tower(tower)

    def text_config(self, model: Any) -> Any:
        """Configuration of the language model, the object its attention layers read."""
        return getattr(model.model, self.part_names["language_model"]).config

    def placeholder_ids(self, model: Any) -> dict[str, int]:
        """The placeholder id of every kind that the model knows.

        Raises:
            ValueError: the configuration names none.
        """
        return {kind: token_id(model.config, kind) for kind in self.pixel_inputs.values()}

    def footprint(
        self,
        model: Any,
        *,
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        **feature_options: Any,
    ) -> Footprint:
        """Token counts of one image or video, without running anything.

        Args:
            model: the model.
            image_size: (height, width) in pixels, None for `default_image_size`; ignored by models
                that resize every image to one size.
            frames: of a video, None for an image.
            **feature_options: as for `tower_shape`.

        Raises:
            ValueError: `frames` of a model that takes no videos, or less than one.
        """
        size = image_size or self.default_image_size
        if frames is None:
            return self.image_footprint(model, size, feature_options)
        if "video" not in self.pixel_inputs.values():
            raise ValueError(
                f"{type(model).__name__} takes no videos, so frames must be left out, got {frames}"
            )
        return self.video_footprint(model, whole_number("frames", frames, 1), size, feature_options)

    @abc.abstractmethod
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        """Token counts of one image (height, width); called by `footprint`."""

    def video_footprint(
        self, model: Any, frames: int, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        """Token counts of one video; called by `footprint` where `pixel_inputs` names videos."""
        raise NotImplementedError(f"{type(self).__name__}.video_footprint")

    @abc.abstractmethod
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        """Token counts of every image of a call by kind, in the order of the placeholders.

        Args:
            model: the model.
            inputs: those of `vision_inputs` and `feature_options` that the call has.

        Raises:
            ValueError: an input is missing, or inputs do not belong together.
        """

    def image_planes(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        """Where the tokens of every image (or tile) of a call lie, for drawing.

        Returns:
            For every one of `footprints`, planes [rows, columns] int64 that cover it: the unmerged
            token in every place.

        Raises:
            ValueError: they lie on no grid, or this family does not say.
        """
        del inputs
        raise ValueError(
            f"the visual tokens of a {type(model).__name__} form no grid that can be drawn on an "
            "image"
        )

    @abc.abstractmethod
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        """Tower, merging and projector for all images and videos of a call.

        Args:
            model: an installed model.
            inputs: as for `footprints`.
            merge_pass: a fresh pass for the first kind, which holds the plans afterwards;
                `merge_pass.fresh()` serves each further kind.

        Returns:
            One entry per kind; every image has the count that `merge_pass.count` promises.
        """

    def looked_at(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """The pixels that decide about each image with adapt="pixels", by kind.

        Returns:
            One [F, 3, H, W] per image (F = 1; of one in tiles the overview) or video.

        Raises:
            ValueError: this family has no such pixels.
        """
        del inputs
        raise ValueError(
            f"adapt='pixels' is not available for {type(model).__name__}; use adapt='features' or "
            "a fixed keep"
        )

    def select(
        self, model: Any, inputs: Mapping[str, Any], kind: str, members: list[int]
    ) -> dict[str, Any]:
        """The inputs of some of the images of one kind, for families that have `looked_at`."""
        raise NotImplementedError(f"{type(self).__name__}.select")

    def prompt_places(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor | None:
        """[B, T, D] positions of all tokens of the unmerged prompt; None where they count up."""
        del model, inputs, mask
        return None

    def tower_flops(
        self, model: Any, footprint: Footprint, schedule: Schedule | None = None
    ) -> int | None:
        """FLOPs of a tower for one image of any size; None where layers are counted one by one.

        Args:
            model: the model.
            footprint: the image.
            schedule: what is merged in the tower, None for nothing.
        """
        del model, footprint, schedule
        return None

    def tower_comparisons(
        self, model: Any, footprint: Footprint, schedule: Schedule
    ) -> list[Comparison]:
        """What merging compares in a tower of `tower_flops`, which it leaves out."""
        del model, footprint, schedule
        return []

    def opening_token(self, model: Any) -> int | None:
        """The id that has to stand before every image's placeholders; None for none."""
        del model
        return None

    def image_marks(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        """Arguments by which a processor says where in a prompt [B, T] of ids images are."""
        del model, ids
        return {}

    def random_images(
        self,
        model: Any,
        ids: Tensor,
        n_images: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """What a processor would return with `input_ids` on the CPU, with noise for pixels.

        Args:
            model: the model.
            ids: [B, T] int64 with all placeholders in place.
            n_images: in all rows together.
            image_size: (height, width) of every image, None for `default_image_size`.
            generator: draws the pixels.

        Raises:
            TypeError: inputs of this family cannot be made up.
        """
        del ids, image_size
        vision = getattr(model.config, "vision_config", None)
        if vision is None:
            raise TypeError(f"inputs of a {type(model).__name__} cannot be made up; pass your own")
        shape = (n_images, 3, vision.image_size, vision.image_size)
        names = [name for name, kind in self.pixel_inputs.items() if kind == "image"]
        name = next(iter(accepted(model.forward, dict.fromkeys(names))), names[0])
        return {name: torch.randn(shape, generator=generator)}

    def options_of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that are `feature_options`."""
        return {name: inputs[name] for name in self.feature_options if name in inputs}
