"""Encoders of transformers that are wrapped on their own: a record per type, how to find them.

The encoder is the module that holds embeddings and layers, alone or inside a model (CLIP, a
classifier, BLIP). It is known by the type of its configuration, so that text towers, whose layers
look the same, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..merge.schedule import TowerShape
from ..merge.steps import every_other_layer
from .layer_parts import ENCODER_LAYERS, parts_of
from .tower import find_encoder_layers


@dataclass(frozen=True)
class Encoder:
    """What is known of the encoders of a type.

    Attributes:
        model_type: of their configuration.
        title: what people call them.
        leading: names of the embeddings' parameters that are put before the patches.
        hidden: of a configuration, the fraction of patches that are left out before the first
            layer; the others come in random order then. None for encoders that read all of them.
        classes: of transformers, that are or contain such an encoder; for the table of models.
    """

    model_type: str
    title: str
    leading: tuple[str, ...]
    classes: tuple[str, ...]
    hidden: Callable[[Any], float] | None = None


_CLASS, _BLIP = ("cls_token",), ("class_embedding",)
_REGISTERS = ("cls_token", "register_tokens")
ENCODERS = (
    Encoder(
        *("clip_vision_model", "CLIP", ("class_embedding",)),
        (
            *("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
            "CLIPForImageClassification",
        ),
    ),
    Encoder(
        *("siglip_vision_model", "SigLIP, SigLIP2 of one image size", ()),
        ("SiglipModel", "SiglipVisionModel", "SiglipForImageClassification"),
    ),
    Encoder("vit", "ViT", _CLASS, ("ViTModel", "ViTForImageClassification")),
    Encoder(
        *("deit", "DeiT", ("cls_token", "distillation_token")),
        ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    ),
    Encoder(
        *("vit_mae", "MAE", _CLASS, ("ViTMAEModel", "ViTMAEForPreTraining")),
        hidden=lambda config: float(config.mask_ratio),
    ),
    Encoder("dinov2", "DINOv2", _CLASS, ("Dinov2Model", "Dinov2ForImageClassification")),
    Encoder(
        *("dinov2_with_registers", "DINOv2 with registers", _REGISTERS),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    ),
    Encoder("dinov3_vit", "DINOv3 ViT", _REGISTERS, ("DINOv3ViTModel",)),
    Encoder(
        *("blip_vision_model", "BLIP", _BLIP),
        (
            *("BlipVisionModel", "BlipModel", "BlipForImageTextRetrieval"),
            *("BlipForConditionalGeneration", "BlipForQuestionAnswering"),
        ),
    ),
    Encoder(
        *("blip_2_vision_model", "BLIP-2", _BLIP),
        ("Blip2VisionModel", "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"),
    ),
)
_BY_TYPE = {record.model_type: record for record in ENCODERS}

# Encoders that are refused, by the end of their class's name, its package or the type of
# their configuration, and why.
REFUSED_ENCODERS = {
    "Backbone": "a backbone hands on the states of several layers as maps of all patches; wrap the "
    "model of the same weights, for instance Dinov2Model",
    "siglip2_vision_model": "a NaFlex SigLIP2 takes images of any number of patches with a mask, "
    "so no count can be promised; SigLIP2 checkpoints of one image size can be wrapped",
    "timm": "its blocks are timm's, with which merging was never run; convert the weights "
    "to ViTForImageClassification or DeiTForImageClassification of transformers",
}


def record_of(encoder: Any) -> Encoder | None:
    """The record of a module that holds embeddings and layers of a known type."""
    record = _BY_TYPE.get(_model_type(encoder))
    return record if record is not None and hasattr(encoder, "embeddings") else None


def _model_type(module: Any) -> str:
    found = getattr(getattr(module, "config", None), "model_type", None)
    return found if isinstance(found, str) else ""


def find_encoder(model: nn.Module) -> Any:
    """The encoder in a model, or the model itself; None where there is none that merging knows."""
    if why_no_encoder(model) is not None:
        return None
    return next((module for module in model.modules() if record_of(module) is not None), None)


def is_encoder_model(model: nn.Module) -> bool:
    """Whether a model is an encoder, or of a class that is known to do with its output only."""
    encoder = find_encoder(model)
    if encoder is None or encoder is model:
        return encoder is not None
    record = record_of(encoder)
    assert record is not None
    return any(kind.__name__ in record.classes for kind in type(model).__mro__)


def part_of(model: nn.Module) -> str | None:
    """The name of an encoder within a model, None where there is none."""
    encoder = find_encoder(model)
    return next((name for name, one in model.named_modules() if one is encoder), None)


def why_no_encoder(model: nn.Module) -> str | None:
    """Why an encoder is refused; None where nothing speaks against it."""
    names = {type(model).__module__.partition(".")[0]}
    # Asked in every call of a wrapped encoder, whose parts are none.
    for module in [model] if record_of(model) is not None else model.modules():
        # "Backbone" is the end of a name.
        names |= {type(module).__name__[-8:], _model_type(module).removesuffix("_wrapper")}
    return next((why for name, why in REFUSED_ENCODERS.items() if name in names), None)


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """The layers of an encoder.

    Raises:
        TypeError: they have other parts than merging knows.
    """
    for module in encoder.modules():
        first = module[0] if isinstance(module, nn.ModuleList) and len(module) else None
        if first is not None and parts_of(first, ENCODER_LAYERS) is not None:
            return module  # type: ignore[return-value]
    # Says what is expected.
    return find_encoder_layers(encoder, rotary=True, known=ENCODER_LAYERS)[0]


def leading_of(encoder: Any) -> int:
    """Tokens before the patches: class and distillation token, registers."""
    record, found = record_of(encoder), 0
    assert record is not None
    for name in record.leading:
        token = getattr(encoder.embeddings, name, None)
        if token is not None:
            found += token.shape[-2] if token.dim() == 3 else 1
    return found


def grid_of(encoder: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(rows, columns) of patches.

    Args:
        encoder: an encoder.
        size: (height, width) of the image in pixels; None for that of the configuration.

    Raises:
        ValueError: an image smaller than a patch.
    """
    high, wide = _pair(encoder.config.patch_size)
    height, width = size or _pair(encoder.config.image_size)
    if height < high or width < wide:
        raise ValueError(
            f"an image must have at least {high} x {wide} pixels, a patch, got {height} x {width}"
        )
    return height // high, width // wide


def size_of(pixel_values: Tensor | None) -> tuple[int, int] | None:
    """(height, width) of images [B, 3, H, W]; None for none."""
    return None if pixel_values is None else (pixel_values.shape[-2], pixel_values.shape[-1])


def shape_of(encoder: Any, size: tuple[int, int] | None = None) -> TowerShape:
    """The numbers of an encoder that a schedule needs.

    Args:
        encoder: an encoder.
        size: (height, width) of the images in pixels; None for that of the configuration.

    Raises:
        ValueError: an image smaller than a patch.
    """
    record = record_of(encoder)
    assert record is not None
    rows, columns = grid_of(encoder, size)
    patches, leading = rows * columns, leading_of(encoder)
    if record.hidden is not None:
        patches = int(patches * (1 - record.hidden(encoder.config)))
    layers = len(encoder_layers(encoder))
    return TowerShape(
        n_tokens=patches,
        n_leading=leading,
        leading_kept=leading,
        n_layers=layers,
        used_layers=layers,
        grid=None if record.hidden is not None else (rows, columns),
        tower_only=True,
        spread=True,
        usual_layers=every_other_layer(layers),
    )


def _pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
