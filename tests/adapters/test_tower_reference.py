"""The merging tower against a slow one: one image, one layer, one head, one token at a time.

The reference knows the weights and the paper; it shares no code with the package. It covers what
plans alone do not show: which keys are compared, that means stay size-weighted across layers, that
log(size) enters the attention, the margin of every layer, and where the merge sits.
"""

from __future__ import annotations

import math

import pytest
import torch
from slow_reference import matching_step, pitome_groups
from tiny import tiny_batch, tiny_model
from torch.nn.functional import layer_norm, linear

import pitome_vlm
from pitome_vlm.adapters.tower import find_encoder_layers
from pitome_vlm.wrapping.wrap import schedule_of


def slow_attention(attention, x, sizes):
    """Softmax attention over one image [N, C] with log sizes, and the keys averaged over heads."""
    heads, width = attention.num_heads, x.shape[1] // attention.num_heads
    q, k, v = (
        linear(x, p.weight, p.bias) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = torch.empty_like(x)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = q[:, part] @ k[:, part].T / math.sqrt(width) + sizes.log()
        out[:, part] = torch.softmax(logits, -1) @ v[:, part]
    keys = torch.stack([k[:, h * width : (h + 1) * width] for h in range(heads)]).mean(0)
    return linear(out, attention.out_proj.weight, attention.out_proj.bias), keys


def slow_merge(x, sizes, groups):
    """Size-weighted means of the groups."""
    merged = [sum(sizes[i] * x[i] for i in g) / sum(sizes[i] for i in g) for g in groups]
    return torch.stack(merged), torch.stack([sum(sizes[i] for i in g) for g in groups])


def ordered_groups(groups, receivers):
    """Groups as lists whose first member is the token that received the others."""
    return [sorted(group, key=lambda i: (i not in receivers, i)) for group in groups]


def slow_tower(model, pixels, algorithm, metric, placement, proportional):
    """Features [M, C] of one image, CLS dropped, and the sizes.

    Tokens go through the layers in the order of the published code; what comes out is ordered by
    the patches that received the others.
    """
    tower = model.model.vision_tower
    layers, schedule = find_encoder_layers(tower)[0], schedule_of(model)
    x = tower(pixels, output_hidden_states=True).hidden_states[0][0]
    sizes, names = torch.ones(len(x), dtype=x.dtype), list(range(len(x)))
    counts = dict(schedule.tower)
    for index in range(schedule.used_layers):
        layer = layers[index]
        norm = layer.layer_norm1
        weights = sizes if proportional else torch.ones_like(sizes)
        attended, keys = slow_attention(
            layer.self_attn, layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps), weights
        )
        x = x + attended
        for place in ("after_attention", "after_layer"):
            if place == placement:
                compared = (keys if metric == "keys" else x).tolist()
                groups = groups_of(compared, counts[index], algorithm, index, schedule)
                x, sizes = slow_merge(x, sizes, groups)
                names = [names[group[0]] for group in groups]
            if place == "after_attention":
                norm = layer.layer_norm2
                x = x + layer.mlp(layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps))
    order = sorted(range(1, len(x)), key=lambda i: names[i])
    return x[order], sizes[order]


def groups_of(compared, n_out, algorithm, index, schedule):
    """Lists of tokens, class token first, the one that receives the others at their head."""
    if algorithm == "tome":
        return matching_step(compared, len(compared) - 1 - n_out)
    margin = 0.9 - 0.9 * index / schedule.n_layers
    groups, receivers = pitome_groups(compared[1:], n_out, margin, with_receivers=True)
    shifted = ordered_groups([{i + 1 for i in g} for g in groups], {i + 1 for i in receivers})
    return [[0], *shifted]


@pytest.mark.parametrize("algorithm", ["pitome", "tome"])
@pytest.mark.parametrize("metric", ["keys", "hidden"])
@pytest.mark.parametrize("placement", ["after_attention", "after_layer"])
@pytest.mark.parametrize("proportional", [True, False])
def test_tower_equals_the_slow_tower(algorithm, metric, placement, proportional):
    model = tiny_model(layers=4).double()
    pixels = tiny_batch(images=(1,), texts=(2,))["pixel_values"].double()
    options = {
        "algorithm": algorithm,
        "metric": metric,
        "placement": placement,
        "proportional_attention": proportional,
    }
    pitome_vlm.wrap(model, tokens=30, **options)
    ours = pitome_vlm.encode_images(model, pixels)
    with torch.no_grad():
        features, sizes = slow_tower(model, pixels, algorithm, metric, placement, proportional)
        expected = model.model.multi_modal_projector(features)
    assert sizes.max() >= 4  # merged more than once, and unequally
    assert ours.sizes()[0].tolist() == sizes.tolist()
    torch.testing.assert_close(ours.features[0], expected, atol=1e-8, rtol=1e-8)


def test_shallower_features_go_through_the_later_merges():
    model = tiny_model("clip_list").double()  # features of depth 5 and 3
    pixels = tiny_batch(images=(1,), texts=(2,))["pixel_values"].double()
    full = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    pitome_vlm.wrap(model, tokens=20, layers=(3, 4))
    ours = pitome_vlm.encode_images(model, pixels)
    source, sizes = ours.source_maps[0], ours.sizes()[0].double()
    assert sizes.max() >= 3
    means = torch.zeros(20, 32, dtype=torch.float64)
    means.index_add_(0, source, full[3][0, 1:].detach())
    means /= sizes[:, None]
    weight = model.model.multi_modal_projector.linear_1
    # Depth 3 has seen no merge yet: what reaches the projector of it is the plain group mean.
    caught = []
    weight.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    pitome_vlm.encode_images(model, pixels)
    torch.testing.assert_close(caught[0][0, :, 32:], means, atol=1e-9, rtol=1e-9)


def test_projector_merging_after_the_tower_stays_size_weighted():
    model = tiny_model().double()
    pixels = tiny_batch(images=(1,), texts=(2,))["pixel_values"].double()
    caught = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0])
    )
    share = {"stage": "both", "tower_share": 0.5}
    pitome_vlm.wrap(model, tokens=20, algorithm="pitome", **share)
    middle = schedule_of(model).tower[-1][1]
    assert middle == round(math.sqrt(144 * 20))
    both = pitome_vlm.encode_images(model, pixels)
    merged = caught.pop()[0]
    pitome_vlm.wrap(model, tokens=middle, algorithm="pitome")
    tower = pitome_vlm.encode_images(model, pixels)
    before, weights = caught.pop()[0], tower.sizes()[0].double()
    # Which final token every token of the tower went into follows from the two source maps.
    into = torch.empty(middle, dtype=torch.long)
    into[tower.source_maps[0]] = both.source_maps[0]
    expected = torch.zeros(20, 32, dtype=torch.float64)
    expected.index_add_(0, into, before.detach() * weights[:, None])
    expected /= both.sizes()[0].double()[:, None]
    torch.testing.assert_close(merged, expected, atol=1e-9, rtol=1e-9)
