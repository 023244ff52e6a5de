"""What vLLM's language model is told about merged tokens, and how it gets there.

Sizes and places leave the encoder as further float32 numbers of every visual token, bit by bit in
channels after its features, so that vLLM's caches and chunks treat them like features. Where a
step's inputs are embedded they are cut off again and written to buffers, which attention and rotary
embedding of every layer read. Buffers stay where they are in memory, because CUDA graphs and
compiled layers remember addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from ..merge.config import Positions
from ..merge.places import group_places
from ..merge.size_channels import key_channels
from ..merge.tokens import VisualTokens
from .attention import SizedAttention, attentions, check
from .language_config import UNCALIBRATED
from .options import PlannedServing
from .rotary import StepTable


def with_numbers(
    visual: VisualTokens, cells: Sequence[Tensor], positions: Positions | None
) -> list[Tensor]:
    """Features with the numbers of their tokens in channels after them.

    Args:
        visual: the tokens.
        cells: of every image [full, D] float32, where its tokens were without merging, counted from
            the image's first place.
        positions: of the config.

    Returns:
        Of every image [n_i, C + channels]: features, D offsets from the first place, log size.
    """
    # Positions that count what is left ask for no places.
    how = positions if positions in ("mean", "median") else "original"
    found = []
    for features, own, source, anchors, sizes in zip(
        visual.features, cells, visual.source_maps, visual.anchors, visual.sizes(), strict=True
    ):
        offsets = group_places(own.to(source.device), source, anchors, how)
        numbers = torch.cat([offsets, sizes.log()[:, None]], -1)
        found.append(torch.cat([features, numbers.contiguous().view(features.dtype)], -1))
    return found


class Calibration(nn.Module):
    """Buffers of one step, and the layers that read them."""

    numbers: Tensor
    rows: Tensor
    channels: Tensor

    def __init__(
        self,
        plan: PlannedServing,
        language_model: nn.Module,
        vllm_config: Any,
        *,
        width: int,
        axes: int,
    ) -> None:
        """Exchange attention and rotary embedding of every layer, as far as the plan asks for it.

        Args:
            plan: what is merged.
            language_model: its layers are changed.
            vllm_config: vLLM's.
            width: channels of a visual token as the encoder makes them.
            axes: numbers that say where a token is.

        Raises:
            ValueError: a layer computes what cannot be calibrated.
        """
        super().__init__()
        self.places, self.width, self.axes = plan.places, width, axes
        room = vllm_config.scheduler_config.max_num_batched_tokens
        numbers = torch.zeros(room, axes + 1, dtype=torch.float32)
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("rows", torch.arange(room), persistent=False)
        layers = attentions(language_model)
        if not layers:
            raise ValueError(
                f"{type(language_model).__name__} has no attention that is known here, so it "
                f"cannot be told about merged tokens; serve it with {UNCALIBRATED}"
            )
        tables = _exchange_rotary(layers, room) if plan.places else []
        self.tables = nn.ModuleList(tables)
        self.scale = 0.0
        if plan.size_bias:
            self._exchange_attention(layers, room, vllm_config)

    def cut(
        self, count: int, embeddings: Sequence[Tensor] | None, is_multimodal: Tensor | None
    ) -> list[Tensor] | None:
        """Take the numbers of a step's tokens; returns the features without them.

        Args:
            count: tokens of the step.
            embeddings: of its visual tokens, [n_i, C + channels] each.
            is_multimodal: [count] bool, which tokens they are.
        """
        own = self.numbers[:count].zero_()
        if embeddings is None or not len(embeddings):
            return None
        numbers = [one[:, self.width :].contiguous().view(torch.float32) for one in embeddings]
        # Embeddings that a client sends in a prompt are words, about which there is nothing to say.
        words = own.new_zeros(1, own.shape[1])
        numbers = [one if one.shape[1] else words.expand(len(one), -1) for one in numbers]
        own[is_multimodal] = torch.cat(numbers)
        return [one[:, : self.width] for one in embeddings]

    def prepare(self, positions: Tensor) -> Tensor:
        """Fill what the layers of a step read; returns the positions to call them with.

        Args:
            positions: [n] or [3, n] int64.
        """
        count = positions.shape[-1]
        offsets, logs = self.numbers[:count, :-1], self.numbers[:count, -1]
        if self.scale:
            # Once a step and not in every layer.
            extra, dtype = self.channels.shape[1], self.channels.dtype
            self.channels[:count] = key_channels(logs, self.scale, extra, dtype)
        if not self.places:
            return positions
        for table in self.tables:
            table(positions[: self.axes] + offsets.T)
        return self.rows[:count]

    def _exchange_attention(
        self, layers: list[tuple[Any, Attention]], room: int, vllm_config: Any
    ) -> None:
        model, first = vllm_config.model_config, layers[0][1]
        for _, own in layers:
            check(own)
        self.scale = first.impl.scale
        shapes = {(own.head_size, own.head_size_v, own.impl.scale) for _, own in layers}
        if len(shapes) > 1 or first.head_size != first.head_size_v:
            raise ValueError(
                "attention layers differ in (channels of keys, of values, scale): "
                f"{sorted(shapes)}, so sizes of merged tokens have no one place in them; serve "
                f"this model with {UNCALIBRATED}"
            )
        # As startup.py chose it, for the layers and for everybody who asks vLLM's config.
        wide = model.get_head_size()
        channels = torch.zeros(room, wide - first.head_size, dtype=model.dtype)
        self.register_buffer("channels", channels, persistent=False)
        for parent, own in layers:
            # Two layers of one name are an error there.
            del vllm_config.compilation_config.static_forward_context[own.layer_name]
            parent.attn = SizedAttention(own, wide, vllm_config.cache_config, channels)


def _exchange_rotary(layers: list[tuple[Any, Attention]], room: int) -> list[StepTable]:
    known: dict[int, tuple[StepTable, Any]] = {}
    for parent, _ in layers:
        rotary = parent.rotary_emb
        if id(rotary) not in known:
            table = StepTable(rotary, room)
            known[id(rotary)] = table, table.embedding(rotary)
        parent.rotary_emb = known[id(rotary)][1]
    return [table for table, _ in known.values()]
