"""What encoder layers call their parts: one record for every kind of layer that merging knows.

All of them are pre-norm ViT layers that differ in names and in what stands before a residual, so a
further kind is a record here. Layers are recognised by structure, because class names and paths
differ by release.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .swap import base_class

# All that a merging layer passes to attention. A layer that takes more would silently get less.
_INPUTS = {
    *("self", "hidden_states", "attention_mask", "causal_attention_mask"),
    *("output_attentions", "head_mask", "kwargs"),
}
_ROTARY_INPUT = "position_embeddings"
# Places of patches, and where images end in a sequence of several.
_PLACE_INPUTS = {_ROTARY_INPUT, "position_ids", "cu_seqlens", "max_seqlen"}
_NOTHING = object()


@dataclass(frozen=True)
class LayerParts:
    """The names of the parts of a layer and of its attention; `a.b` is part b of part a.

    Attributes:
        norms: of attention and of the MLP.
        attention: the module.
        mlp: the modules, one after the other.
        scaled: what the output of attention, and that of the MLP, goes through before it is added
            to the residual: modules, or parameters it is multiplied by.
        projections: of the attention: queries, keys, values; one for all three of them.
        normed: of the attention: what queries and keys go through before they are cut into heads.
        heads_normed: of the attention: what heads of queries, keys and values go through.
        output: of the attention: what all heads together go through.
        scale: of the attention: factor of the logits.
        dropout: of the attention: probability, or a module that knows it.
        head_dim: of the attention: channels of a head.
        kernel: of the attention: the module that the kernel is called with; empty for itself.
        rotary: queries and keys are turned by the place of their patch: 1 where all channels are
            turned together, 2 where half of them is for each of the two axes; 0 for not at all.
    """

    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    attention: str = "self_attn"
    mlp: tuple[str, ...] = ("mlp",)
    scaled: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    normed: tuple[str, ...] = ()
    heads_normed: tuple[str, ...] = ()
    output: tuple[str, ...] = ("out_proj",)
    scale: str = "scale"
    dropout: str = "dropout"
    head_dim: str = "head_dim"
    kernel: str = ""
    rotary: int = 0

    def fit(self, layer: nn.Module) -> bool:
        """Whether a layer is built of these parts and no others."""
        paths = (*self.norms, self.attention, *self.mlp, *self.scaled[0], *self.scaled[1])
        children = {name for name, _ in layer.named_children()}
        # Parameters that a configuration leaves out are None.
        weights = set(layer._parameters)
        own = {path.partition(".")[0] for path in paths}
        if not own.issuperset(children | weights) or not all(_has(layer, path) for path in paths):
            return False
        attention: Any = reach(layer, self.attention)
        names = (*self.projections, *self.normed, *self.heads_normed, *self.output)
        inputs = set(inspect.signature(base_class(attention).forward).parameters)
        numbers = (self.scale, self.dropout, self.head_dim)
        return (
            all(_has(attention, name) for name in (*names, *numbers, *self.kernel.split()))
            and inputs <= _INPUTS | (_PLACE_INPUTS if self.rotary else set())
            and (_ROTARY_INPUT in inputs) == bool(self.rotary)
        )

    def scale_of(self, attention: Any) -> float:
        """Factor of the logits of an attention."""
        return float(reach(attention, self.scale))

    def dropout_of(self, attention: Any) -> float:
        """How many of the weights of an attention are left out in training."""
        found = reach(attention, self.dropout)
        return float(found.p if isinstance(found, nn.Dropout) else found)

    def through_mlp(self, layer: Any, normed: Tensor) -> Tensor:
        """[..., C] through the MLP of a layer, before what stands before the residual."""
        for name in self.mlp:
            normed = reach(layer, name)(normed)
        return normed

    def add(self, layer: Any, half: int, hidden: Tensor, change: Tensor) -> Tensor:
        """The residual of a layer.

        Args:
            layer: built of these parts.
            half: 0 for attention, 1 for the MLP.
            hidden: [..., C].
            change: [..., C], the output of that half.
        """
        for name in self.scaled[half]:
            part = reach(layer, name)
            if part is not None:
                change = part(change) if isinstance(part, nn.Module) else part * change
        return hidden + change


# CLIP, SigLIP and its descendants in Idefics3 and SmolVLM, SigLIP2.
CLIP_LIKE = LayerParts()
INTERNVL = LayerParts(
    norms=("layernorm_before", "layernorm_after"),
    attention="attention",
    scaled=(("lambda_1",), ("dropout", "lambda_2")),
    normed=("q_norm", "k_norm"),
    output=("projection_layer", "projection_dropout"),
    dropout="attention_dropout",
)
# Ovis 2 has the layers of AIMv2.
AIMV2 = LayerParts(norms=("rms_norm1", "rms_norm2"), attention="attention", mlp=("ffn",))
PIXTRAL = LayerParts(
    norms=("attention_norm", "ffn_norm"),
    attention="attention",
    mlp=("feed_forward",),
    output=("o_proj",),
    scale="scaling",
    rotary=1,
)
GEMMA4 = LayerParts(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    scaled=(("post_attention_layernorm",), ("post_feedforward_layernorm",)),
    heads_normed=("q_norm", "k_norm", "v_norm"),
    output=("o_proj",),
    scale="scaling",
    dropout="attention_dropout",
    rotary=2,
)
# SigLIP's layers with places of their own, on images in one sequence.
PADDLE_OCR = LayerParts(scale="scaling", dropout="attention_dropout", rotary=1)
# Before release 5 of transformers, attention and MLP of ViT, DeiT, ViTMAE and DINOv2 were modules
# of several parts.
VIT = LayerParts(
    norms=("layernorm_before", "layernorm_after"),
    attention="attention",
    scaled=(("dropout",), ("dropout",)),
    output=("o_proj",),
    scale="scaling",
    dropout="attention_dropout",
)
DINO = dataclasses.replace(
    VIT,
    norms=("norm1", "norm2"),
    scaled=(("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
)
DINOV3 = dataclasses.replace(DINO, dropout="dropout", rotary=1)
_OLD_ATTENTION: dict[str, Any] = {
    "projections": ("attention.query", "attention.key", "attention.value"),
    "output": ("output.dense", "output.dropout"),
    "scale": "attention.scaling",
    "dropout": "attention.dropout_prob",
    "head_dim": "attention.attention_head_size",
    "kernel": "attention",
}
OLD_VIT = dataclasses.replace(
    VIT,
    scaled=((), ()),
    mlp=("intermediate", "output.dense", "output.dropout"),
    **_OLD_ATTENTION,
)
OLD_DINO = dataclasses.replace(DINO, **_OLD_ATTENTION)
LAYERS = (CLIP_LIKE, INTERNVL, AIMV2, DINO, OLD_DINO, PIXTRAL, GEMMA4, PADDLE_OCR)

# What plain encoders add to these.
BLIP = LayerParts(projections=("qkv",), output=("projection",))
BLIP2 = dataclasses.replace(BLIP, dropout="attention_dropout")
ENCODER_LAYERS = (*LAYERS, VIT, DINOV3, OLD_VIT, BLIP2, BLIP)


def reach(module: Any, path: str) -> Any:
    """A part of a module by its path, `a.b` for part b of part a; itself for an empty one.

    Raises:
        AttributeError: there is none.
    """
    # Asked for a dozen times in every layer, mostly for a path of one name.
    if "." not in path:
        return getattr(module, path) if path else module
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, _NOTHING)
    return module is not _NOTHING


def parts_of(layer: nn.Module, known: tuple[LayerParts, ...] = LAYERS) -> LayerParts | None:
    """The record of a layer, None where none of the known ones fits."""
    own: Any = getattr(layer, "_checkpoint_wrapped_module", layer)
    return next((parts for parts in known if parts.fit(own)), None)


def attention_of(layer: Any) -> Any:
    """The attention of a layer that merging knows."""
    return reach(layer, _known(layer).attention)


def mlp_of(layer: Any) -> list[nn.Module]:
    """The modules of the MLP of a layer that merging knows."""
    return [reach(layer, name) for name in _known(layer).mlp]


def head_dim_of(layer: Any) -> int:
    """Channels of a head of the attention of a layer that merging knows."""
    return int(reach(attention_of(layer), _known(layer).head_dim))


def _known(layer: Any) -> LayerParts:
    parts = parts_of(layer, ENCODER_LAYERS)
    assert parts is not None
    return parts
