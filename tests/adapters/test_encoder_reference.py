"""A merging ViT against a slow one, written from the paper one token at a time.

Several layers, a class token and proportional attention; independent of the package.
"""

from __future__ import annotations

import math

import torch
from slow_reference import pitome_groups, tome_groups, weighted_mean
from tiny_encoders import PATCHES, TINY

import pitome_vlm


def linear(module, x):
    bias = [0.0] * module.out_features if module.bias is None else module.bias.tolist()
    rows = module.weight.tolist()
    return [sum(map(float.__mul__, row, x)) + b for row, b in zip(rows, bias, strict=True)]


def norm(module, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scaled = [(value - mean) / math.sqrt(variance + module.eps) for value in x]
    pairs = zip(scaled, module.weight.tolist(), module.bias.tolist(), strict=True)
    return [value * weight + bias for value, weight, bias in pairs]


def gelu(x):
    return [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]


def plus(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def parts(layer):
    """Modules of a layer, whose names depend on the release of transformers."""
    own = layer.attention
    if hasattr(own, "q_proj"):
        return own.q_proj, own.k_proj, own.v_proj, own.o_proj, layer.mlp.fc1, layer.mlp.fc2
    inner, mlp = own.attention, (layer.intermediate.dense, layer.output.dense)
    return inner.query, inner.key, inner.value, own.output.dense, *mlp


def attend(queries, keys, values, sizes, width):
    """softmax(q k / sqrt(width) + log m) v for one head."""
    out = []
    for query in queries:
        logits = [
            sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(width) + math.log(size)
            for key, size in zip(keys, sizes, strict=True)
        ]
        top = max(logits)
        weights = [math.exp(one - top) for one in logits]
        total = sum(weights)
        out.append(
            [
                sum(w * value[c] for w, value in zip(weights, values, strict=True)) / total
                for c in range(width)
            ]
        )
    return out


def slow_vit(model, embedded, ratio, algorithm, heads=4):
    """[tokens] of [C] after the last norm, for embedded tokens of one image, class token first."""
    layers = list(model.layers if hasattr(model, "layers") else model.encoder.layer)
    tokens, sizes = embedded, [1.0] * len(embedded)
    members = [[i] for i in range(len(embedded))]
    for number, layer in enumerate(layers):
        query, key, value, output, first, second = parts(layer)
        normed = [norm(layer.layernorm_before, x) for x in tokens]
        q, k, v = ([linear(own, x) for x in normed] for own in (query, key, value))
        width = len(q[0]) // heads
        cut = [slice(h * width, (h + 1) * width) for h in range(heads)]
        found = [
            attend([x[c] for x in q], [x[c] for x in k], [x[c] for x in v], sizes, width)
            for c in cut
        ]
        joined = [[x for own in found for x in own[i]] for i in range(len(tokens))]
        tokens = [plus(x, linear(output, y)) for x, y in zip(tokens, joined, strict=True)]
        metric = [[sum(x[c][d] for c in cut) / heads for d in range(width)] for x in k[1:]]
        n_out = len(metric) - math.floor(len(metric) - len(metric) * ratio)
        if algorithm == "pitome":
            margin = 0.9 - 0.9 * number / len(layers)
            groups, receivers = pitome_groups(metric, n_out, margin, with_receivers=True)
        else:
            groups = tome_groups(metric, n_out, class_token=True)
            # The class token is the first of every second token, which send.
            receivers = set(range(0, len(metric), 2))
        # A group stands where its receiver stood.
        place = {group: min(group & receivers or group) for group in groups}
        ordered = [[0]] + [[1 + i for i in sorted(g)] for g in sorted(groups, key=place.get)]
        members = [[one for i in group for one in members[i]] for group in ordered]
        tokens = [weighted_mean(tokens, sizes, group) for group in ordered]
        sizes = [sum(sizes[i] for i in group) for group in ordered]
        changed = [
            linear(second, gelu(linear(first, norm(layer.layernorm_after, x)))) for x in tokens
        ]
        tokens = [plus(x, y) for x, y in zip(tokens, changed, strict=True)]
    spread = [None] * len(embedded)
    for token, own in zip(tokens, members, strict=True):
        for i in own:
            spread[i] = norm(model.layernorm, token)
    return spread, len(tokens)


@torch.no_grad()
def test_several_layers_equal_the_slow_reference():
    model = TINY["vit"].model().double()
    pixels = TINY["vit"].inputs(1)["pixel_values"].double()
    embedded = model.embeddings(pixels)[0].tolist()
    for algorithm, options in (("pitome", {}), ("tome", {"token_order": "raster"})):
        expected, count = slow_vit(model, embedded, 0.85, algorithm)
        pitome_vlm.wrap(model, ratio=0.85, algorithm=algorithm, **options)
        found = model(pixels).last_hidden_state[0]
        assert count == len(found.unique(dim=0)) < PATCHES * 0.6
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
