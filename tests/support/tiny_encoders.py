"""Tiny encoders with random weights, by name, and what reads their patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

SIDE, PATCH = 48, 8
GRID = SIDE // PATCH
PATCHES = GRID**2
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny model.

    Attributes:
        build: makes it.
        leading: tokens of its encoder before the patches.
        result: what a caller reads of `model(**inputs)`, a tensor that depends on the image.
        text: its inputs have words, too.
        pairs: the result is about pairs of an image and the text of the same row.
    """

    build: Callable[[], Any]
    leading: int
    result: Callable[[Any], torch.Tensor]
    text: bool = False
    pairs: bool = False

    def model(self, *, seed: int = 0, attention: str = "sdpa") -> Any:
        """Weights are large enough for outputs to differ by pixels."""
        torch.manual_seed(seed)
        model = self.build()
        if model.config._attn_implementation != attention and self.takes(attention):
            model.set_attn_implementation(attention)
        return self.drawn(model)

    def drawn(self, model: Any) -> Any:
        """The model with weights that make outputs differ."""
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.2)
                elif "lambda" in name:
                    weight.fill_(0.7)
        return model.eval()

    def takes(self, attention: str) -> bool:
        return attention == "eager" or not self.build().__class__.__name__.startswith("Blip")

    def row(self, inputs: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        """The inputs of one image."""
        one = slice(index, index + 1)
        return {
            name: value[one] if self.pairs or name == "pixel_values" else value
            for name, value in inputs.items()
        }

    def inputs(self, rows: int = 3, *, seed: int = 1) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = {"pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=generator)}
        if self.text:
            found["input_ids"] = torch.randint(3, 60, (rows, 7), generator=generator)
        return found


def _vision(config: Any, **more: Any) -> Any:
    return config(**_VISION, **more)


def _two(config: Any, vision: Any, text: Any, **more: Any) -> Any:
    return config(vision_config=vision.to_dict(), text_config=text.to_dict(), **more)


def _clip_config(**more: Any) -> Any:
    vision, text = _vision(hf.CLIPVisionConfig), hf.CLIPTextConfig(**_TEXT)
    return _two(hf.CLIPConfig, vision, text, projection_dim=16, **more)


def _clip() -> Any:
    return hf.CLIPModel(_clip_config())


def _siglip(model: Any = hf.SiglipModel, **more: Any) -> Any:
    text = hf.SiglipTextConfig(**_TEXT | {"projection_size": 32})
    return model(_two(hf.SiglipConfig, _vision(hf.SiglipVisionConfig), text, **more))


def _blip(model: Any = hf.BlipForImageTextRetrieval) -> Any:
    text = hf.BlipTextConfig(**_TEXT, encoder_hidden_size=32, is_decoder=True)
    vision = _vision(hf.BlipVisionConfig)
    return model(_two(hf.BlipConfig, vision, text, image_text_hidden_size=16))


def _blip2() -> Any:
    vision = _vision(hf.Blip2VisionConfig)
    qformer = hf.Blip2QFormerConfig(
        **{name: _TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        encoder_hidden_size=32,
        cross_attention_frequency=1,
        use_qformer_text_input=True,
    )
    config = hf.Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    return hf.Blip2ForImageTextRetrieval(config)


_LABELS = {"num_labels": 5}


def _dino(config: Any, model: Any, **more: Any) -> Any:
    size = {name: value for name, value in _VISION.items() if name != "intermediate_size"}
    return model(config(**size, mlp_ratio=2, layerscale_value=0.5, **more))


def _mae_decoded() -> Any:
    decoder = {"decoder_hidden_size": 32, "decoder_intermediate_size": 64}
    decoder |= {"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    return hf.ViTMAEForPreTraining(_vision(hf.ViTMAEConfig, mask_ratio=0.0, **decoder))


def _pooled(output: Any) -> torch.Tensor:
    return output.pooler_output


def _states(output: Any) -> torch.Tensor:
    return output.last_hidden_state


def _logits(output: Any) -> torch.Tensor:
    return output.logits


def _per_image(output: Any) -> torch.Tensor:
    return output.logits_per_image


def _matches(output: Any) -> torch.Tensor:
    return output.itm_score if "itm_score" in output else output.logits_per_image


TINY = {
    "clip": Tiny(_clip, 1, _per_image, text=True),
    "clip vision": Tiny(lambda: hf.CLIPVisionModel(_vision(hf.CLIPVisionConfig)), 1, _pooled),
    "clip states": Tiny(lambda: hf.CLIPVisionModel(_vision(hf.CLIPVisionConfig)), 1, _states),
    "clip projected": Tiny(
        lambda: hf.CLIPVisionModelWithProjection(_vision(hf.CLIPVisionConfig, projection_dim=16)),
        1,
        lambda output: output.image_embeds,
    ),
    "clip classes": Tiny(
        lambda: hf.CLIPForImageClassification(_clip_config(**_LABELS)), 1, _logits
    ),
    "siglip": Tiny(_siglip, 0, _per_image, text=True),
    "siglip vision": Tiny(lambda: hf.SiglipVisionModel(_vision(hf.SiglipVisionConfig)), 0, _pooled),
    "siglip classes": Tiny(lambda: _siglip(hf.SiglipForImageClassification, **_LABELS), 0, _logits),
    "vit": Tiny(lambda: hf.ViTModel(_vision(hf.ViTConfig)), 1, _states),
    "vit classes": Tiny(
        lambda: hf.ViTForImageClassification(_vision(hf.ViTConfig, **_LABELS)), 1, _logits
    ),
    "deit": Tiny(
        lambda: hf.DeiTForImageClassification(_vision(hf.DeiTConfig, **_LABELS)), 2, _logits
    ),
    "deit teacher": Tiny(
        lambda: hf.DeiTForImageClassificationWithTeacher(_vision(hf.DeiTConfig, **_LABELS)),
        2,
        lambda output: output.distillation_logits,
    ),
    "mae": Tiny(lambda: hf.ViTMAEModel(_vision(hf.ViTMAEConfig, mask_ratio=0.0)), 1, _states),
    "mae decoded": Tiny(_mae_decoded, 1, _logits),
    "dinov2": Tiny(lambda: _dino(hf.Dinov2Config, hf.Dinov2Model), 1, _states),
    "dinov2 classes": Tiny(
        lambda: _dino(hf.Dinov2Config, hf.Dinov2ForImageClassification, **_LABELS),
        1,
        _logits,
    ),
    "dinov2 registers": Tiny(
        lambda: _dino(
            hf.Dinov2WithRegistersConfig,
            hf.Dinov2WithRegistersForImageClassification,
            num_register_tokens=4,
            **_LABELS,
        ),
        5,
        _logits,
    ),
    "dinov3": Tiny(
        lambda: hf.DINOv3ViTModel(
            _vision(hf.DINOv3ViTConfig, num_register_tokens=3, layerscale_value=0.5)
        ),
        4,
        _states,
    ),
    "blip": Tiny(_blip, 1, _matches, text=True, pairs=True),
    "blip answers": Tiny(
        lambda: _blip(hf.BlipForConditionalGeneration), 1, _logits, text=True, pairs=True
    ),
    "blip2": Tiny(_blip2, 1, _matches, text=True),
}
