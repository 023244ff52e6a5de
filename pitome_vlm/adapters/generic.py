"""Models of Hugging Face whose own forward puts visual features into the prompt.

One adapter for all of them, told by a record what differs (`families.py`). Merged features and a
shortened prompt are handed to the model's forward (`mm_encoder_outputs`), so that levels of deeper
layers, masks of both directions, indicator tokens and whatever else a family does to its prompt are
its own code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import Schedule, TowerShape
from ..merge.steps import few_layers
from ..merge.tiles import PackedItem, merge_grids
from ..merge.tokens import Encoded, HandedOver
from ..releases import TRANSFORMERS, accepted, dict_wanted, features_from, takes_features
from .base import Adapter
from .family import Family
from .features import FEATURE_OPTIONS, token_id
from .grid_tower import GridTower
from .grids import Grid, footprint_of, item_of, item_with_gaps, rope_places
from .inner_tower import Comparison, Reading, TowerKind, WholeTower
from .parts import PROJECTORS, TOWERS, ModelParts
from .random_inputs import random_pixels
from .tower_reading import depths_read, reading_of, reading_of_one, whole_flops
from .unit_tower import UnitTower

# How tokens merge inside a tower, by `Family.tower`.
TOWER_KINDS: dict[str | None, TowerKind] = {
    None: WholeTower(),
    "units": UnitTower(),
    "grid": GridTower(),
}

_LANGUAGE_MODELS = ("language_model", "text_model")


_ADAPTERS: dict[tuple[str, ...], GenericAdapter] = {}


class GenericAdapter(Adapter):
    """The adapter of one record; merging is done on what `get_image_features` returns."""

    default_image_size: tuple[int, int] | None = (768, 1024)
    own_scatter = True
    sized_by_processor = True

    def __init__(self, family: Family) -> None:
        self.family = family
        _ADAPTERS.setdefault(family.model_types, self)
        self.model_types = family.model_types
        self.pixel_inputs = {names[0]: kind for kind, names in family.inputs.items()}
        names = tuple(name for own in family.inputs.values() for name in own)
        self.vision_inputs = (*dict.fromkeys(names), *family.places)
        self.place_inputs = family.places
        self.feature_options = tuple(name for name in names if name in FEATURE_OPTIONS)
        self.own_positions = bool(family.places)
        self.first_place = family.first_place
        self.one_mask = family.one_mask
        if family.cells is None:
            self.default_image_size = None
            self.counted_per = family.unit

    def __reduce__(self) -> tuple[Any, ...]:
        # Records hold functions; whoever reads a pickled model has them.
        return _adapter_of, (self.model_types,)

    @override
    def matches(self, model: Any) -> bool:
        if not super().matches(model) or not hasattr(_core(model), "get_image_features"):
            return False
        tower = getattr(model.config, "vision_config", None)
        return self.family.of_tower in (None, getattr(tower, "model_type", None))

    @override
    def is_same(self, other: Adapter) -> bool:
        return isinstance(other, GenericAdapter) and other.family == self.family

    @override
    def parts(self, model: Any) -> ModelParts:
        core = _core(model)
        tower, language_model = _first(core, TOWERS), _first(core, _LANGUAGE_MODELS)
        projector = next((getattr(core, n) for n in PROJECTORS if hasattr(core, n)), nn.Identity())
        return ModelParts(tower, model.config.vision_config, projector, (language_model,))

    @override
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """The numbers of a typical image; budgets of others follow from their own footprint."""
        layers = self._kind(model).layers(self.parts(model).vision_tower)
        return self.shape_from_config(model.config, layers, **feature_options)

    def shape_from_config(self, config: Any, layers: int, **feature_options: Any) -> TowerShape:
        """The same without a model.

        Args:
            config: of the model.
            layers: of its tower, 0 where tokens merge after it only.
            **feature_options: as for `tower_shape`.
        """
        full = footprint_of(self._typical(config, self.default_image_size), "image").full
        kind = TOWER_KINDS[self.family.tower if layers else None]
        used = 1
        if layers:
            used = max(depths_read(self.family, config, feature_options, layers))
        return TowerShape(
            *(full, 0, 0, layers or 1, used),
            packed=True,
            projector_only=not layers,
            typical=True,
            spread=kind.spread,
            usual_layers=few_layers(used),
        )

    def _kind(self, model: Any) -> TowerKind:
        kind = TOWER_KINDS[self.family.tower]
        known = kind.layers(self.parts(model).vision_tower)
        return kind if known else TOWER_KINDS[None]

    @override
    def install(self, model: Any, *, inside_tower: bool) -> None:
        if self.own_scatter and not takes_features(model):
            first = ".".join(map(str, features_from(model.config.model_type)))
            raise TypeError(
                f"merging in {type(model).__name__} needs transformers {first} or later, whose "
                f"forward takes mm_encoder_outputs, found {TRANSFORMERS}"
            )
        if inside_tower:
            self._kind(model).install(self.parts(model).vision_tower)

    @override
    def uninstall(self, model: Any) -> None:
        self._kind(model).uninstall(self.parts(model).vision_tower)

    @override
    def text_config(self, model: Any) -> Any:
        return model.config.get_text_config()

    @override
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        return footprint_of(self._typical(model.config, size), "image")

    @override
    def video_footprint(
        self, model: Any, frames: int, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        _, rows, columns = self._typical(model.config, size)
        step = self.family.frames_per_grid(model.config)
        return footprint_of((-(-frames // step), rows, columns), "video")

    def _typical(self, config: Any, size: tuple[int, int] | None) -> Grid:
        if self.family.cells is not None:
            assert size is not None
            return self.family.cells(config, size)
        # One tile, whatever its size.
        name = self.family.inputs["image"][0]
        return self.family.grids(config, {name: torch.ones(1, 1, 1, 1, 1)}, "image")[0]

    @override
    def tower_flops(
        self, model: Any, footprint: Footprint, schedule: Schedule | None = None
    ) -> int | None:
        inner, tower, reading = self._one(model, footprint)
        found = inner.flops(tower, reading, footprint, schedule)
        return whole_flops(self.family, tower, model.config, footprint) if found is None else found

    @override
    def tower_comparisons(
        self, model: Any, footprint: Footprint, schedule: Schedule
    ) -> list[Comparison]:
        inner, tower, reading = self._one(model, footprint)
        return inner.comparisons(tower, reading, footprint, schedule)

    def _one(self, model: Any, footprint: Footprint) -> tuple[TowerKind, nn.Module, Reading]:
        """How tokens merge in the tower, the tower, and how it reads one image."""
        inner, tower = self._kind(model), self.parts(model).vision_tower
        layers = inner.layers(tower)
        return inner, tower, reading_of_one(self.family, model.config, footprint, layers)

    @override
    def placeholder_ids(self, model: Any) -> dict[str, int]:
        named = self.family.placeholders
        return {kind: token_id(model.config, named.get(kind, kind)) for kind in self.family.inputs}

    @override
    def random_images(
        self,
        model: Any,
        ids: Tensor,
        n_images: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        grid = self._typical(model.config, image_size or self.default_image_size)
        made = random_pixels(self.family, model, grid, (len(ids), n_images), generator)
        return made | self.image_marks(model, ids)

    @override
    def image_marks(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        if self.one_mask:
            return {}
        kinds = (ids == self.placeholder_ids(model)["image"]).long()
        return accepted(
            model.forward, dict.fromkeys(("mm_token_type_ids", "token_type_ids"), kinds)
        )

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        found = [
            kind for kind, names in self.family.inputs.items() if inputs.get(names[0]) is not None
        ]
        if any(
            kind in found and other in found for kind, other in self.family.placeholders.items()
        ):
            raise ValueError(
                f"{type(model).__name__} has one placeholder for {' and '.join(found)}; pass them "
                "in calls of their own (turns on one cache)"
            )
        return {
            kind: [item.footprint for item in self._items(model, inputs, kind)] for kind in found
        }

    @override
    def image_planes(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        if self.family.several_grids:
            return super().image_planes(model, inputs)
        return [item.canvases for item in self._items(model, inputs, "image")]

    def _shown(self, inputs: Mapping[str, Any], kind: str) -> Tensor | None:
        return inputs.get(self.family.shown.get(kind, ""))

    def _items(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[PackedItem]:
        grids, shown = self.family.grids(model.config, inputs, kind), self._shown(inputs, kind)
        if shown is None:
            return [item_of(grid, kind) for grid in grids]
        lengths = [math.prod(grid) for grid in grids]
        if len(shown) != sum(lengths):
            raise ValueError(
                f"{self.family.shown[kind]} is about {len(shown)} tokens, but the {kind}s have "
                f"{sum(lengths)}; pass both as the processor returned them"
            )
        parts = torch.split(shown.cpu() != 0, lengths)
        return [item_with_gaps(*pair, kind) for pair in zip(grids, parts, strict=True)]

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        encoded: list[Encoded] = []
        inner, tower = self._kind(model), self.parts(model).vision_tower
        for kind, names in self.family.inputs.items():
            if inputs.get(names[0]) is None:
                continue
            items, shown = self._items(model, inputs, kind), self._shown(inputs, kind)
            own = merge_pass.fresh() if encoded else merge_pass
            reading = Reading()
            if own.schedule.tower:
                n = inner.layers(tower)
                reading = reading_of(self.family, model.config, inputs, kind, len(items), n)
            with inner.encoding(tower, own, items, reading) as found:
                output = _read(_core(model), kind, {n: inputs[n] for n in names if n in inputs})
            footprints = [item.footprint for item in items]
            own_form = getattr(output, self.family.field, output)
            features = _by_image(own_form, footprints, kind, shown)
            visual = merge_grids(features, items, own, inner.groups(found, items))
            handed = None
            if self.own_scatter:
                handed = HandedOver(output, self.family.field, self.family.levels)
                levels = getattr(output, self.family.levels) if self.family.levels else []
                handed = handed.with_levels(
                    [visual.means(_by_image(level, footprints, kind, shown)) for level in levels]
                ).without_states()
            encoded.append(Encoded(kind, self.placeholder_ids(model)[kind], visual, handed))
        return encoded

    @override
    def prompt_places(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor | None:
        if self.own_positions:
            return rope_places(model, self.placeholder_ids(model), inputs, mask)
        ids, given = inputs.get("input_ids"), inputs.get("position_ids")
        if ids is None:
            raise ValueError(
                f"{type(model).__name__} finds the places of visual tokens by input_ids; pass them "
                "instead of inputs_embeds"
            )
        if isinstance(given, Tensor):
            return given.expand_as(ids)[..., None].float()
        steps = torch.ones_like(ids) if mask is None else (mask != 0).long()
        counted = (steps.cumsum(1) - 1).clamp(min=0) + self.first_place
        return counted[..., None].float()


def _adapter_of(model_types: tuple[str, ...]) -> GenericAdapter:
    if model_types not in _ADAPTERS:
        raise ValueError(
            f"the model was wrapped as one of {', '.join(model_types)}, of which nothing is known "
            "here; call pitome_vlm.adapters.register() with its record before it is read"
        )
    return _ADAPTERS[model_types]


def _core(model: Any) -> Any:
    return getattr(model, "model", model)


def _first(core: Any, names: tuple[str, ...]) -> nn.Module:
    found: nn.Module = next(getattr(core, name) for name in names if hasattr(core, name))
    return found


def _read(core: Any, kind: str, inputs: dict[str, Any]) -> Any:
    """The output of a model's own function for features."""
    read = getattr(core, f"get_{kind}_features", None) or core.get_image_features
    given = {name: value for name, value in inputs.items() if value is not None}
    # Releases before 5 return the features alone.
    return read(**accepted(read, given), **dict_wanted(read))


def _by_image(
    features: Any, footprints: list[Footprint], kind: str, shown: Tensor | None
) -> list[Tensor]:
    """Features in any form as one [n_i, C] tensor per image.

    Args:
        features: of all images.
        footprints: of every image.
        kind: of the placeholders.
        shown: [tokens of all images], 0 where the prompt does not show one; None for all.

    Raises:
        ValueError: there are more or fewer than the images have tokens.
    """
    parts = [features] if isinstance(features, Tensor) else list(features)
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    if shown is not None:
        flat = flat[shown.to(flat.device) != 0]
    lengths = [footprint.full for footprint in footprints]
    if len(flat) != sum(lengths):
        raise ValueError(
            f"the model made {len(flat)} visual tokens where {sum(lengths)} were expected for "
            f"{len(lengths)} {kind}s; pass everything that the processor returned for them"
        )
    return list(torch.split(flat, lengths))
