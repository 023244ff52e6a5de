"""What vLLM's language model is told about merged tokens, and how it gets there.

Sizes and places leave the encoder as two further float32 numbers of every visual token, bit by bit
in channels after its features, so that vLLM's caches and chunks treat them like features. Where a
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
from ..merge.size_channels import key_channels
from ..merge.tokens import VisualTokens
from .attention import SizedAttention, attentions, check
from .language_config import UNCALIBRATED
from .options import PlannedServing
from .rotary import StepTable

# Numbers that travel with a visual token: its offset from its image's first place, its log size.
NUMBERS = 2


def with_numbers(visual: VisualTokens, positions: Positions | None) -> list[Tensor]:
    """[n_i, C] features of every image with the numbers of its tokens in channels after them."""
    # Positions that count what is left ask for no places.
    offsets = visual.positions(positions if positions in ("mean", "median") else "original")
    found = []
    for features, places, sizes in zip(visual.features, offsets, visual.sizes(), strict=True):
        numbers = torch.stack([places, sizes.log()], -1)
        found.append(torch.cat([features, numbers.contiguous().view(features.dtype)], -1))
    return found


class Calibration(nn.Module):
    """Buffers of one step, and the layers that read them."""

    numbers: Tensor
    rows: Tensor
    channels: Tensor

    def __init__(self, plan: PlannedServing, language_model: nn.Module, vllm_config: Any) -> None:
        """Exchange attention and rotary embedding of every layer, as far as the plan asks for it.

        Raises:
            ValueError: a layer computes what cannot be calibrated.
        """
        super().__init__()
        self.places = plan.places
        self.width: int = vllm_config.model_config.get_inputs_embeds_size()
        room = vllm_config.scheduler_config.max_num_batched_tokens
        numbers = torch.zeros(room, NUMBERS, dtype=torch.float32)
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
        channels = torch.cat([one[:, self.width :] for one in embeddings])
        own[is_multimodal] = channels.contiguous().view(torch.float32)
        return [one[:, : self.width] for one in embeddings]

    def prepare(self, positions: Tensor) -> Tensor:
        """Fill what the layers of a step read; returns the positions to call them with.

        Args:
            positions: [n] or [3, n] int64.
        """
        count = positions.shape[-1]
        offsets, logs = self.numbers[:count].unbind(-1)
        if self.scale:
            # Once a step and not in every layer.
            extra, dtype = self.channels.shape[1], self.channels.dtype
            self.channels[:count] = key_channels(logs, self.scale, extra, dtype)
        if not self.places:
            return positions
        for table in self.tables:
            table(positions[0] + offsets)
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
