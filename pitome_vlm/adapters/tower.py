"""Merging inside the vision towers of transformers whose layers `layer_parts.py` knows.

Finds the layers, swaps their classes and runs their attention. What a layer does between its parts
when it merges is in `merged_layer.py`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..merge.merge_pass import MergePass
from ..releases import layers_return_tuples
from .layer_parts import CLIP_LIKE, LAYERS, LayerParts, parts_of, reach
from .merged_layer import Heads, LayerKernels, merged_layer
from .own_attention import own_attention
from .swap import base_class, own_forward, swap_in, swap_out


class TowerSlot:
    """The encoding to which the layers of one tower belong right now, in this thread.

    A layer cannot be handed an argument through the towers of transformers 4.57, so it looks
    here when it is *called* and passes what it finds to its own forward as an argument: a
    checkpointed re-run gets that same argument, however much later it happens. Threads that
    share a model do not see each other's encodings.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def active(self) -> MergePass | None:
        """The encoding in progress, None where there is none."""
        return getattr(self._local, "active", None)

    @contextlib.contextmanager
    def encode(self, merge_pass: MergePass) -> Iterator[None]:
        """Let layers that are called in this block belong to `merge_pass`."""
        previous, self._local.active = self.active, merge_pass
        try:
            yield
        finally:
            self._local.active = previous

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerSlot:
        # One object per tower: layers copied together must share the copy.
        copied: TowerSlot = memo.setdefault(id(self), TowerSlot())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TowerSlot.__init__(self)


def find_encoder_layers(
    tower: nn.Module, *, rotary: bool = False, known: tuple[LayerParts, ...] = LAYERS
) -> list[nn.ModuleList]:
    """The tower's lists of transformer layers, by structure because paths differ by release.

    There is one, or several where peft trains a copy (`modules_to_save`).

    Args:
        tower: the vision tower.
        rotary: layers that rotate by place count, too; whoever encodes has to know the places.
        known: kinds of layers that count.

    Raises:
        TypeError: no list of layers with the parts a merge needs.
        RuntimeError: the layers sit inside PyTorch's checkpoint wrapper.
    """
    found = [
        module
        for module in tower.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and _is_mergeable(module[0], rotary, known)
    ]
    if not found:
        raise TypeError(
            f"vision tower {type(tower).__name__} is not supported inside the tower: looked for "
            "a ModuleList of pre-norm layers built like those of CLIP and SigLIP (layer_norm1, "
            "self_attn with q_proj, k_proj, v_proj, out_proj, layer_norm2, mlp), InternVL, AIMv2 "
            'or DINOv2; merge after it with stage="projector" instead'
        )
    refuse_checkpoint_wrapper(found)
    return found


def refuse_checkpoint_wrapper(lists: list[nn.ModuleList]) -> None:
    """See that the layers of a tower are run with the arguments that a merge gives them.

    Raises:
        RuntimeError: they sit inside PyTorch's checkpoint wrapper.
    """
    if any(hasattr(layer, "_checkpoint_wrapped_module") for layers in lists for layer in layers):
        raise RuntimeError(
            "the vision layers are inside PyTorch's CheckpointWrapper, which re-runs them without "
            "their arguments; use model.gradient_checkpointing_enable() instead"
        )


def _is_mergeable(layer: nn.Module, rotary: bool, known: tuple[LayerParts, ...]) -> bool:
    parts = parts_of(layer, known)
    return parts is not None and (rotary or not parts.rotary)


class InTower:
    """Mixin before the class of a part of a tower, which is told the encoding in progress."""

    _pitome_layer: int
    _pitome_slot: tuple[TowerSlot]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the active encoding to `forward` as an argument."""
        active = self._pitome_slot[0].active
        if active is not None:
            kwargs["pitome_pass"] = active
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def extra_repr(self) -> str:
        """Say in `print(model)` that merging is installed here."""
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(part for part in (own, f"pitome layer {self._pitome_layer}") if part)


class MergingLayer(InTower):
    """Mixin before an encoder layer's class; its own forward runs unless a pass is active."""

    _pitome_returns_tuple: bool
    _pitome_parts: LayerParts

    def forward(
        self, hidden_states: Tensor, *args: Any, pitome_pass: MergePass | None = None, **kwargs: Any
    ) -> Any:
        """The layer, with a merge between attention and MLP (paper eq. 1-2) where scheduled.

        Args:
            hidden_states: [B, N, C].
            *args: what the tower passes to its layers.
            pitome_pass: the encoding this call belongs to.
            **kwargs: what the tower passes to its layers.
        """
        own = own_forward(self, MergingLayer)
        if pitome_pass is None:
            return own(hidden_states, *args, **kwargs)
        layer = self._pitome_layer
        if layer >= pitome_pass.schedule.used_layers:
            # Nobody reads the layers after the feature layer, so they are not computed.
            return _as_returned(self, hidden_states)
        if not pitome_pass.touches(layer):
            return own(hidden_states, *args, **kwargs)
        angles = kwargs.get("position_embeddings")
        return _as_returned(self, self._pitome_merged(hidden_states, pitome_pass, angles))

    def _pitome_merged(self, hidden: Tensor, merge_pass: MergePass, angles: Any) -> Tensor:
        del angles
        layer, names = self._pitome_layer, self._pitome_parts
        return merged_layer(self, layer, hidden, merge_pass, kernels_of(names), names)


def project(names: LayerParts, attention: Any, normed: Tensor) -> Heads:
    """Queries, keys and values of [B, N, C], each [B, heads, N, head_dim].

    From the live projections, so that LoRA and quantised layers are seen as they are, and once,
    so that what tokens are compared by is what attention uses.
    """
    flat = [reach(attention, name)(normed) for name in names.projections]
    if len(flat) == 1:
        flat = list(flat[0].chunk(3, -1))
    for index, name in enumerate(names.normed):
        flat[index] = reach(attention, name)(flat[index])
    shape = (*normed.shape[:-1], -1, reach(attention, names.head_dim))
    heads = [part.view(shape) for part in flat]
    for index, name in enumerate(names.heads_normed):
        heads[index] = reach(attention, name)(heads[index])
    query, key, value = (part.transpose(1, 2) for part in heads)
    return query, key, value


def _attend(names: LayerParts, attention: Any, parts: Heads, bias: Tensor | None) -> Tensor:
    """The layer's own attention, [B, N, C], with an additive bias [B, 1, 1, N] or None."""
    scale, dropout = names.scale_of(attention), names.dropout_of(attention)
    own = reach(attention, names.kernel)
    return project_out(names, attention, own_attention(own, parts, bias, scale, dropout))


def project_out(names: LayerParts, attention: Any, heads: Tensor) -> Tensor:
    """What attention returns, from its heads: [B, N, heads, D] to [B, N, C]."""
    output = heads.flatten(2).contiguous()
    for part in names.output:
        output = reach(attention, part)(output)
    return output


def kernels_of(names: LayerParts) -> LayerKernels:
    """How attention of layers with these parts is run."""
    return LayerKernels(functools.partial(project, names), functools.partial(_attend, names))


KERNELS = kernels_of(CLIP_LIKE)


def _as_returned(layer: Any, hidden: Tensor) -> Any:
    """`hidden` in the form that the layer's own class returns."""
    return (hidden,) if layer._pitome_returns_tuple else hidden


def install_tower(
    tower: nn.Module,
    mixin: type[MergingLayer] = MergingLayer,
    *,
    rotary: bool = False,
    known: tuple[LayerParts, ...] = LAYERS,
) -> None:
    """Put a mixin before every layer's class; all or nothing."""
    lists, slot = find_encoder_layers(tower, rotary=rotary, known=known), TowerSlot()
    returns_tuple = layers_return_tuples(base_class(lists[0][0]))
    try:
        for layers in lists:
            for index, layer in enumerate(layers):
                parts = parts_of(layer, known)
                swap_in(layer, mixin)
                layer._pitome_parts = parts  # type: ignore[assignment]
                layer._pitome_layer = index  # type: ignore[assignment]
                layer._pitome_returns_tuple = returns_tuple  # type: ignore[assignment]
                # In a tuple, so that torch neither registers nor moves it.
                layer._pitome_slot = (slot,)  # type: ignore[assignment]
    except BaseException:
        uninstall_tower(tower)
        raise


def uninstall_tower(tower: nn.Module) -> None:
    """Give every layer its own class back; a no-op on an untouched tower."""
    for module in tower.modules():
        if isinstance(module, InTower):
            swap_out(module)
            for name in [name for name in module.__dict__ if name.startswith("_pitome_")]:
                del module.__dict__[name]


def _slots(tower: nn.Module) -> set[TowerSlot]:
    """Those of a tower's layers; a copy that peft trains next to the original has one of its own.

    Every call asks, so what is inside of layers is not looked through.
    """
    found, rest = set(), [tower]
    while rest:
        module = rest.pop()
        if isinstance(module, InTower):
            found.add(module._pitome_slot[0])
        else:
            rest += module.children()
    return found


def is_encoding(tower: nn.Module) -> bool:
    """Whether the layers of a tower belong to an encoding right now, in this thread."""
    return any(slot.active is not None for slot in _slots(tower))


@contextlib.contextmanager
def encoding(tower: nn.Module, merge_pass: MergePass) -> Iterator[None]:
    """Let the tower's layers merge as `merge_pass` says, for the length of a block.

    Raises:
        RuntimeError: the tower has to merge but is not the one that was wrapped.
    """
    slots = _slots(tower)
    if merge_pass.schedule.tower and not slots:
        raise RuntimeError(
            "the vision tower was replaced after wrap(); call pitome_vlm.wrap(model, ...) again"
        )
    with contextlib.ExitStack() as stack:
        for slot in slots:
            stack.enter_context(slot.encode(merge_pass))
        yield
