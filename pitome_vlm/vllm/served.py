"""Which models the plugin serves: their classes here, and the numbers of their vision towers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adapters.generic import GenericAdapter
    from ..merge.schedule import TowerShape

# Class tokens before the patches, by the kind of tower that vLLM's LLaVA can have.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


@dataclass(frozen=True)
class Served:
    """One model of vLLM.

    Attributes:
        architecture: the plugin's class.
        module: of this package, where it is.
        shape: from the model's config to the numbers of its tower.
        patches: the same to (rows, columns) of an image's patches; None where images of any size
            have as many as they like.
        grid_places: tokens have a time, a row and a column, in vLLM's own model already.
    """

    architecture: str
    module: str
    shape: Callable[[Any], TowerShape]
    patches: Callable[[Any], tuple[int, int]] | None = None
    grid_places: bool = False


def square_shape(hf_config: Any) -> TowerShape:
    """Numbers of a tower of CLIP's kind as vLLM builds it.

    Raises:
        TypeError: a tower whose layers vLLM runs in another way.
    """
    # Late, here and below: a process that only registers models needs neither torch nor a model.
    from ..adapters.features import feature_choice, shape_from_numbers
    from ..adapters.tower_tokens import patch_grid

    vision = hf_config.vision_config
    choice = feature_choice(hf_config, {})
    if not isinstance(choice.layer, int):
        raise TypeError(
            f"vision_feature_layer={choice.layer} cannot be served: the plugin reads one feature "
            "layer"
        )
    _check_tower(vision.model_type, CLASS_TOKENS)
    special = CLASS_TOKENS[vision.model_type]
    return shape_from_numbers(patch_grid(vision), vision.num_hidden_layers, choice, special)


def tile_shape(hf_config: Any) -> TowerShape:
    """The same of a model that cuts images into tiles.

    Raises:
        TypeError: as `square_shape`.
        ValueError: a tile has no whole grid of patches.
    """
    from ..adapters.features import shape_of_tile

    return shape_of_tile(
        square_shape(hf_config),
        'set vision_feature_select_strategy to "default" for a tower with a class token and to '
        '"full" for one without',
    )


def square_patches(hf_config: Any) -> tuple[int, int]:
    """(rows, columns) of the patches of an image or tile."""
    from ..adapters.tower_tokens import patch_grid

    return patch_grid(hf_config.vision_config)


def record_of(hf_config: Any) -> GenericAdapter:
    """The library's adapter of a model that has a record in it."""
    from ..adapters import ADAPTERS
    from ..adapters.generic import GenericAdapter

    return next(
        one
        for one in ADAPTERS
        if isinstance(one, GenericAdapter) and hf_config.model_type in one.model_types
    )


def unit_shape(hf_config: Any) -> TowerShape:
    """Numbers of a tower of Qwen's kind for a typical image, the library's own."""
    return record_of(hf_config).shape_from_config(hf_config, hf_config.vision_config.depth)


def pooled_shape(tower: str, read: Mapping[str, Any]) -> Callable[[Any], TowerShape]:
    """Numbers of a tower whose last layer hands every patch its group's value.

    Args:
        tower: type of the tower that vLLM builds.
        read: what vLLM reads whatever a config says, by the config's names.
    """

    def shape(hf_config: Any) -> TowerShape:
        vision = hf_config.vision_config
        _check_tower(vision.model_type, (tower,))
        for name, value in read.items():
            found = getattr(hf_config, name, value)
            if found != value:
                raise TypeError(
                    f"{name}={found!r:.100} cannot be served: vLLM reads {value!r} whatever the "
                    "config says"
                )
        return record_of(hf_config).shape_from_config(hf_config, vision.num_hidden_layers)

    return shape


def _check_tower(found: str, known: Iterable[str]) -> None:
    if found not in known:
        raise TypeError(
            f"vision tower {found!r} cannot be served with merged tokens; supported: "
            f"{', '.join(known)}"
        )


SERVED = {
    "llava": Served("PiToMeLlavaForConditionalGeneration", "model", square_shape, square_patches),
    "llava_next": Served(
        "PiToMeLlavaNextForConditionalGeneration", "tiled", tile_shape, square_patches
    ),
    "llava_onevision": Served(
        "PiToMeLlavaOnevisionForConditionalGeneration", "tiled", tile_shape, square_patches
    ),
    **{
        model_type: Served(
            f"PiToMe{name}ForConditionalGeneration", "qwen", unit_shape, grid_places=True
        )
        for model_type, name in {
            "qwen2_vl": "Qwen2VL",
            "qwen2_5_vl": "Qwen2_5_VL",
            "qwen3_vl": "Qwen3VL",
            "qwen3_5": "Qwen3_5",
        }.items()
    },
    "internvl": Served(
        "PiToMeInternVLForConditionalGeneration",
        "internvl",
        pooled_shape(
            "internvl_vision",
            {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"},
        ),
    ),
    "gemma3": Served(
        "PiToMeGemma3ForConditionalGeneration",
        "gemma3",
        pooled_shape("siglip_vision_model", {}),
    ),
}
_BREAKS = (
    "marks end the rows of its images, and in which row a merged token stands is known only after "
    "vLLM has laid out the prompt"
)
# Why not, where there is more to say than that nobody wrote it.
NOT_SERVED = {
    "vipllava": "vLLM has no ViP-LLaVA",
    "mistral3": _BREAKS,
    "lighton_ocr": _BREAKS,
    "pixtral": _BREAKS,
    "aya_vision": "vLLM has dropped it",
    "paligemma": "all of its prompt attends both ways, which vLLM's class does for images only",
}
# The plugin's classes by the model's type.
ARCHITECTURES = {model_type: one.architecture for model_type, one in SERVED.items()}
ARCHITECTURE = ARCHITECTURES["llava"]


def served_as(hf_config: Any) -> Served:
    """How a model is served, by its config.

    Raises:
        TypeError: it is not.
    """
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in SERVED:
        reason = NOT_SERVED.get(str(model_type))
        raise TypeError(
            f"cannot serve a model of type {model_type!r} with merged tokens"
            f"{f' ({reason})' if reason else ''}; supported: {', '.join(SERVED)} (in the format "
            "of transformers)"
        )
    return SERVED[model_type]
