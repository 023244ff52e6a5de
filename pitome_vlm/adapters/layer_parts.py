"""What encoder layers call their parts: one record for every kind of layer that merging knows.

All of them are pre-norm ViT layers that differ in names and in what stands before a residual, so a
further kind is a record here. Layers are recognised by structure, because class names and paths
differ by release.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .swap import base_class

# All that a merging layer passes to attention. A layer that takes more would silently get less.
_INPUTS = {
    *("self", "hidden_states", "attention_mask", "causal_attention_mask"),
    *("output_attentions", "kwargs"),
}
_ROTARY_INPUT = "position_embeddings"
_PLACE_INPUTS = {_ROTARY_INPUT, "position_ids"}


@dataclass(frozen=True)
class LayerParts:
    """The names of the parts of a layer and of its attention.

    Attributes:
        norms: of attention and of the MLP.
        attention: the module.
        mlp: the module.
        scaled: what the output of attention, and that of the MLP, goes through before it is added
            to the residual: modules, or parameters it is multiplied by.
        projections: of the attention: queries, keys, values.
        normed: of the attention: what queries and keys go through before they are cut into heads.
        heads_normed: of the attention: what heads of queries, keys and values go through.
        output: of the attention: what all heads together go through.
        scale: of the attention: factor of the logits.
        dropout: of the attention: probability.
        rotary: queries and keys are turned by the place of their patch: 1 where all channels are
            turned together, 2 where half of them is for each of the two axes; 0 for not at all.
    """

    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    attention: str = "self_attn"
    mlp: str = "mlp"
    scaled: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    normed: tuple[str, ...] = ()
    heads_normed: tuple[str, ...] = ()
    output: tuple[str, ...] = ("out_proj",)
    scale: str = "scale"
    dropout: str = "dropout"
    rotary: int = 0

    def fit(self, layer: nn.Module) -> bool:
        """Whether a layer is built of these parts and no others."""
        own = {*self.norms, self.attention, self.mlp, *self.scaled[0], *self.scaled[1]}
        children = {name for name, _ in layer.named_children()}
        # Parameters that a configuration leaves out are None.
        weights = set(layer._parameters)
        if not own.issuperset(children | weights) or not all(hasattr(layer, name) for name in own):
            return False
        attention: Any = getattr(layer, self.attention)
        names = (*self.projections, *self.normed, *self.heads_normed, *self.output)
        inputs = set(inspect.signature(base_class(attention).forward).parameters)
        return (
            all(hasattr(attention, name) for name in (*names, self.scale, self.dropout, "head_dim"))
            and inputs <= _INPUTS | (_PLACE_INPUTS if self.rotary else set())
            and (_ROTARY_INPUT in inputs) == bool(self.rotary)
        )

    def add(self, layer: Any, half: int, hidden: Tensor, change: Tensor) -> Tensor:
        """The residual of a layer.

        Args:
            layer: built of these parts.
            half: 0 for attention, 1 for the MLP.
            hidden: [..., C].
            change: [..., C], the output of that half.
        """
        for name in self.scaled[half]:
            part = getattr(layer, name)
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
AIMV2 = LayerParts(norms=("rms_norm1", "rms_norm2"), attention="attention", mlp="ffn")
PIXTRAL = LayerParts(
    norms=("attention_norm", "ffn_norm"),
    attention="attention",
    mlp="feed_forward",
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
LAYERS = (CLIP_LIKE, INTERNVL, AIMV2, PIXTRAL, GEMMA4)


def parts_of(layer: nn.Module) -> LayerParts | None:
    """The record of a layer, None where merging knows none."""
    own: Any = getattr(layer, "_checkpoint_wrapped_module", layer)
    return next((parts for parts in LAYERS if parts.fit(own)), None)


def attention_of(layer: Any) -> Any:
    """The attention of a layer that merging knows."""
    parts = parts_of(layer)
    assert parts is not None
    return getattr(layer, parts.attention)


def mlp_of(layer: Any) -> Any:
    """The MLP of a layer that merging knows."""
    parts = parts_of(layer)
    assert parts is not None
    return getattr(layer, parts.mlp)
