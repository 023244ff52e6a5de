"""The towers of Qwen's kind with merged units, slowly: dense attention, one group at a time.

Knows the weights and which units were merged; shares no code with the package. `watched` reads what
an unmerged run passes to every block, among it which patches attend to each other.
"""

from __future__ import annotations

import contextlib
import itertools

import torch


@contextlib.contextmanager
def watched(visual):
    """What blocks get and what the tower returns: `seen["hidden"]`, `["ends"]`, `["features"]`."""
    seen = {"hidden": None, "ends": [], "rows": [], "inputs": []}

    def before(block, args, kwargs):
        if seen["hidden"] is None:
            seen["hidden"], seen["angles"] = args[0], kwargs["position_embeddings"]
        seen["ends"].append(kwargs["cu_seqlens"].tolist())
        seen["rows"].append(len(args[0]))
        seen["inputs"].append(args[0])

    def after(visual, args, output):
        # Callers change the output.
        seen["features"] = getattr(output, "pooler_output", output)
        seen["levels"] = list(getattr(output, "deepstack_features", []))

    hooks = [one.register_forward_pre_hook(before, with_kwargs=True) for one in visual.blocks]
    hooks.append(visual.register_forward_hook(after))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def labels_of(ends):
    """The segment of every patch."""
    pairs = enumerate(itertools.pairwise(ends))
    return torch.cat([torch.full((b - a,), n) for n, (a, b) in pairs])


def places_of(grids, order=None):
    """Row and column of every patch, for grids (frames, rows, columns) in the order of units."""
    found = []
    for frames, rows, columns in grids:
        for _ in range(frames):
            for y in range(0, rows, 2):
                for x in range(0, columns, 2):
                    found += [(y + dy, x + dx) for dy in (0, 1) for dx in (0, 1)]
    places = torch.tensor(found, dtype=torch.float32)
    return places if order is None else places.view(-1, 4, 2)[order].flatten(0, 1)


def angles_of(places, width, theta=1e4):
    """Cosines and sines of two axes, half of the head each, repeated."""
    rate = theta ** -(torch.arange(0, width // 2, 2, dtype=torch.float32) / (width // 2))
    turned = torch.cat([places[:, :1] * rate, places[:, 1:] * rate], -1).repeat(1, 2)
    return turned.cos(), turned.sin()


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def averaged(x, assign, sizes, count):
    """Size-weighted means of units [U, ...]."""
    rows = []
    for group in range(count):
        own = (assign == group).nonzero()[:, 0]
        weights = sizes[own].view(-1, *[1] * (x.dim() - 1))
        rows.append((x[own] * weights).sum(0) / weights.sum())
    return torch.stack(rows)


def weights_and_values(block, hidden, places, labels, members, sizes):
    """Attention [H, S, S] of a block, within segments and by size, and values [S, H, D]."""
    attention = block.attn
    heads = attention.qkv(block.norm1(hidden)).view(len(hidden), 3, attention.num_heads, -1)
    q, k, v = heads.unbind(1)
    angles = angles_of(places, q.shape[-1])
    q, k = rotated(q, *angles), rotated(k, *angles)
    segment = labels.view(-1, 4)[members].flatten()
    logits = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    logits = logits + sizes.log().repeat_interleave(4)
    logits = logits.masked_fill(segment[:, None] != segment[None], -torch.inf)
    return logits.softmax(-1), v


def slow_tower(visual, seen, places, plans):
    """Features [U, C] of all units in the order of the tower, and those of its deeper levels."""
    hidden, sizes = seen["hidden"], torch.ones(len(places) // 4)
    kinds = [labels_of(ends) for ends in seen["ends"]]
    members, source, levels = torch.arange(len(sizes)), torch.arange(len(sizes)), []
    for index, block in enumerate(visual.blocks):
        weights, v = weights_and_values(block, hidden, places, kinds[index], members, sizes)
        out = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        hidden = hidden + block.attn.proj(out)
        if index in plans:
            assign, kept = (one[0] for one in plans[index])
            hidden, places = (
                averaged(x.view(len(assign), 4, -1), assign, sizes, len(kept)).flatten(0, 1)
                for x in (hidden, places)
            )
            sizes = torch.stack([sizes[assign == one].sum() for one in range(len(kept))])
            members, source = members[kept], assign[source]
        hidden = hidden + block.mlp(block.norm2(hidden))
        if index in getattr(visual, "deepstack_visual_indexes", ()):
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
            levels.append(merger.forward(hidden)[source])
    if hasattr(visual, "downsample"):
        hidden = visual.post_layernorm(hidden).view(-1, 2, 2, hidden.shape[-1]).permute(0, 3, 1, 2)
        hidden = visual.downsample(hidden).flatten(1)
    return visual.merger.forward(hidden)[source], levels
