"""PiToMe's Algorithm 1 and ToMe's matching as loops over Python floats.

Written from the papers, independently of the package: no torch, no vectorisation, one token at a
time, so that it can be checked against the paper line by line.
"""

from __future__ import annotations

import math


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / norms if norms > 0 else 0.0


def f_m(x, margin, alpha=1.0):
    """Eq. 4."""
    return x if x >= margin else alpha * (math.exp(x - margin) - 1)


def energies(keys, margin, alpha=1.0):
    """E_i = 1/N sum over the neighbours j of i (not i itself)."""
    n = len(keys)
    return [
        sum(f_m(cosine(keys[i], keys[j]), margin, alpha) for j in range(n) if j != i) / n
        for i in range(n)
    ]


def pitome_groups(keys, n_out, margin, alpha=1.0, *, with_receivers=False):
    """Algorithm 1: the set of groups (frozensets of token indices), and who received."""
    n = len(keys)
    k = n - n_out
    energy = energies(keys, margin, alpha)
    order = sorted(range(n), key=lambda i: -energy[i])  # Python's sort is stable
    merge, protect = order[: 2 * k], order[2 * k :]
    side_a, side_b = merge[0::2], merge[1::2]
    groups = {b: [b] for b in side_b}
    for a in side_a:
        best = max(side_b, key=lambda b: cosine(keys[a], keys[b]))
        groups[best].append(a)
    result = {frozenset(g) for g in groups.values()} | {frozenset([p]) for p in protect}
    return (result, set(side_b)) if with_receivers else result


def tome_groups(keys, n_out, class_token, *, with_receivers=False):
    """Bipartite soft matching over a sequence whose first token may be a class token.

    The sequence is split by position; a class token stands at position 0, hence in A, and is
    never merged.
    """
    offset = 1 if class_token else 0
    n = len(keys)
    side_a = [i for i in range(n) if (i + offset) % 2 == 0]
    side_b = [i for i in range(n) if (i + offset) % 2 == 1]
    edges = []
    for a in side_a:
        best = max(side_b, key=lambda b: cosine(keys[a], keys[b]))
        edges.append((cosine(keys[a], keys[best]), a, best))
    edges.sort(key=lambda edge: -edge[0])
    groups = {i: [i] for i in range(n)}
    for _, a, b in edges[: n - n_out]:
        groups[b].append(a)
        del groups[a]
    result = {frozenset(g) for g in groups.values()}
    return (result, set(side_b)) if with_receivers else result


def weighted_mean(values, sizes, group):
    """Algorithm 1, lines 11-13, for one group."""
    total = sum(sizes[i] for i in group)
    width = len(values[0])
    return [sum(sizes[i] * values[i][c] for i in group) / total for c in range(width)]
