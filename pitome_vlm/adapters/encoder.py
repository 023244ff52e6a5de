"""The adapter of all encoders that are wrapped on their own (`encoders.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tokens import Encoded, VisualTokens
from .base import Adapter
from .encoder_tower import EncoderLayer, EncoderPass
from .encoders import find_encoder, is_encoder_model, shape_of, size_of
from .layer_parts import ENCODER_LAYERS
from .parts import ModelParts
from .tower import encoding, install_tower, uninstall_tower


class EncoderAdapter(Adapter):
    """Encoders alone or inside a model that is no language model with placeholders."""

    calls = "encoder"
    # How many patches there are follows from the pixels of a call.
    feature_options = ("pixel_values",)

    @override
    def matches(self, model: Any) -> bool:
        return is_encoder_model(model)

    @override
    def parts(self, model: Any) -> ModelParts:
        encoder = find_encoder(model)
        return ModelParts(encoder, encoder.config, nn.Identity(), ())

    @override
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        return shape_of(find_encoder(model), size_of(feature_options.get("pixel_values")))

    @override
    def install(self, model: Any, *, inside_tower: bool) -> None:
        del inside_tower  # there is no other place
        install_tower(find_encoder(model), EncoderLayer, rotary=True, known=ENCODER_LAYERS)

    @override
    def uninstall(self, model: Any) -> None:
        uninstall_tower(model)

    @override
    def text_config(self, model: Any) -> Any:
        del model
        return None

    @override
    def placeholder_ids(self, model: Any) -> dict[str, int]:
        del model
        return {}

    @override
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        shape = shape_of(find_encoder(model), size or size_of(options.get("pixel_values")))
        return Footprint(shape.n_tokens + shape.leading_kept)

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            raise ValueError("pixel_values is missing")
        shape = shape_of(find_encoder(model), size_of(pixels))
        return {"image": [Footprint(shape.n_tokens + shape.n_leading)] * len(pixels)}

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        encoder, pixels = find_encoder(model), inputs["pixel_values"]
        own = EncoderPass.of(merge_pass, short=True)
        with encoding(encoder, own):
            hidden: Tensor = encoder(pixels).last_hidden_state
        sources, anchors = own.maps(len(hidden), hidden.device)
        full = [own.schedule.tokens_in] * len(hidden)
        visual = VisualTokens(list(hidden), sources, full, anchors)
        return [Encoded("image", -1, visual)]


ENCODER_ADAPTER = EncoderAdapter()
