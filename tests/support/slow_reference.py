"""PiToMe's Algorithm 1, ToMe's matching and the baselines as loops over Python floats.

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


def tome_groups(keys, n_out, class_token):
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
    return {frozenset(g) for g in groups.values()}


def matching_step(values, n_gone):
    """One layer of ToMe's published code on the whole sequence, class token first.

    What comes out is every source that stays, then every destination: lists of positions in the
    old sequence, the token that receives first.
    """
    n = len(values)
    sources, destinations = list(range(0, n, 2)), list(range(1, n, 2))
    edges = []
    for a in sources[1:]:  # the class token is the first source, and stays
        best = max(destinations, key=lambda b: cosine(values[a], values[b]))
        edges.append((cosine(values[a], values[best]), a, best))
    edges.sort(key=lambda edge: -edge[0])
    joined = {b: [b] for b in destinations}
    for _, a, b in edges[:n_gone]:
        joined[b].append(a)
    gone = {a for _, a, _ in edges[:n_gone]}
    return [[a] for a in sources if a not in gone] + [joined[b] for b in destinations]


def energy_step(values, n_gone, margin):
    """One layer of PiToMe's published code, class token first: ELU energies, Algorithm 1.

    What comes out is the class token, the protected tokens and the receivers, by energy: lists as
    in `matching_step`.
    """
    body, k = range(1, len(values)), n_gone

    def elu(x):
        return x if x >= 0 else math.exp(x) - 1

    def energy(i):
        return sum(elu(cosine(values[i], values[j]) - margin) for j in body if j != i)

    order = sorted(body, key=lambda i: -energy(i))
    receivers = order[1 : 2 * k : 2]
    joined = {b: [b] for b in receivers}
    for a in order[0 : 2 * k : 2]:
        joined[max(receivers, key=lambda b: cosine(values[a], values[b]))].append(a)
    return [[0], *([i] for i in order[2 * k :]), *(joined[b] for b in receivers)]


def through_layers(values, steps, how):
    """Groups of first tokens after every step, in order; a step maps values to lists of positions.

    What the next step compares are means of the members, weighted by how many first tokens each
    stands for ("weighted") or not ("plain"), or the first member alone ("prune").
    """
    members, found = [[i] for i in range(len(values))], []
    for step in steps:
        parts = step(values)
        sizes = [len(group) if how == "weighted" else 1 for group in members]
        values = [
            values[part[0]]
            if len(part) == 1 or how == "prune"
            else weighted_mean(values, sizes, part)
            for part in parts
        ]
        members = [[i for place in part for i in members[place]] for part in parts]
        found.append([sorted(group) for group in members])
    return found


def weighted_mean(values, sizes, group):
    """Algorithm 1, lines 11-13, for one group."""
    total = sum(sizes[i] for i in group)
    width = len(values[0])
    return [sum(sizes[i] * values[i][c] for i in group) / total for c in range(width)]


def with_nearest(keys, survivors, others):
    """Groups {survivor: members} where every other token joins its most similar survivor."""
    groups = {i: [i] for i in survivors}
    for i in others:
        groups[max(survivors, key=lambda j: cosine(keys[i], keys[j]))].append(i)
    return groups


def mlerp(values, group):
    """ToFu's merge: the direction of the mean, as long as the longest member."""
    mean = weighted_mean(values, [1.0] * len(values), group)
    longest = max(math.sqrt(sum(v * v for v in values[i])) for i in group)
    length = math.sqrt(sum(v * v for v in mean))
    return [v / length * longest for v in mean]


def diffrate_groups(keys, attention, n_out):
    """Groups by kept token, and the members that are pruned instead of merged."""
    ranked = sorted(range(len(keys)), key=lambda i: -attention[i])
    kept, removed = ranked[:n_out], ranked[n_out:]
    n_merged = len(removed) - len(removed) // 2
    return with_nearest(keys, kept, removed), set(removed[n_merged:])


def visionzip_groups(keys, attention, n_out):
    """Groups by dominant token (alone) and by contextual target."""
    n_context = max(1, int(n_out * 10 / 64 + 0.5))
    ranked = sorted(range(len(keys)), key=lambda i: -attention[i])
    dominant = ranked[: n_out - n_context]
    rest = [i for i in range(len(keys)) if i not in dominant]
    targets = [rest[place * len(rest) // n_context] for place in range(n_context)]
    groups = with_nearest(keys, targets, [i for i in rest if i not in targets])
    return {**{i: [i] for i in dominant}, **groups}


def divprune_choice(keys, n_out):
    """Max-min diversity, greedily: the tokens in the order of choice."""
    n = len(keys)
    distance = [[1 - cosine(keys[i], keys[j]) for j in range(n)] for i in range(n)]

    def isolation(i):
        return min((distance[i][j] for j in range(n) if j != i), default=math.inf)

    chosen = [max(range(n), key=isolation)]
    while len(chosen) < n_out:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i][j] for j in chosen)))
    return chosen


def scope_choice(keys, attention, n_out, power):
    """Greedy choice by coverage gain times attention: the tokens in the order of choice."""
    n = len(keys)
    near = [[cosine(keys[i], keys[j]) for j in range(n)] for i in range(n)]
    chosen = []

    def coverage(tokens):
        return sum(max([0.0] + [near[i][j] for i in tokens]) for j in range(n))

    while len(chosen) < n_out:
        left = [i for i in range(n) if i not in chosen]
        now = coverage(chosen)
        score = {i: (coverage([*chosen, i]) - now) * attention[i] ** power for i in left}
        # Two tokens that cover only each other gain the same but for rounding.
        chosen.append(next(i for i in left if score[i] >= max(score.values()) - 1e-12))
    return chosen


def vispruner_choice(keys, attention, n_out, important):
    """The most attended tokens, and what is left of the others without duplicates."""
    ranked = sorted(range(len(keys)), key=lambda i: -attention[i])
    n_important = int(n_out * important)
    chosen, rest = ranked[:n_important], ranked[n_important:]
    while len(rest) > n_out - n_important:
        ours, others = rest[::2], rest[1::2]
        alike = {i: max((cosine(keys[i], keys[j]) for j in others), default=-2) for i in ours}
        gone = min(8, len(rest) - (n_out - n_important), len(ours))
        rest = sorted(ours, key=lambda i: -alike[i])[gone:] + others
    return chosen + rest


def holov_choice(keys, attention, n_out, n_crops, alpha=0.09):
    """What every crop keeps by its quota, step by step as released, and what is left to give.

    The score of a crop holds the variance of its cosines in full, which the package leaves out.
    """
    n = len(keys)
    n_crops = min(n_crops, n)
    crops, start = [], 0
    for place in range(n_crops):
        size = n // n_crops + (place < n % n_crops)
        crops.append(list(range(start, start + size)))
        start += size
    scores = []
    for crop in crops:
        variances = []
        for i in crop:
            near = [cosine(keys[i], keys[j]) if j != i else 0.0 for j in crop]
            mean = sum(near) / max(1, len(crop) - 1)
            variances.append(sum((x - mean) ** 2 for x in near) / max(1, len(crop) - 1))
        paid = [attention[i] for i in crop]
        scale = sum(paid) / sum(variances) if sum(variances) > 0 else 0.0
        together = [a + alpha * scale * v for a, v in zip(paid, variances, strict=True)]
        scores.append(sum(together) / len(crop))
    shares = [score / sum(scores) for score in scores]
    quota = [int(share * n_out) for share in shares]
    for place in sorted(range(n_crops), key=lambda p: -shares[p])[: n_out - sum(quota)]:
        quota[place] += 1
    chosen = []
    for crop, count in zip(crops, quota, strict=True):
        chosen += sorted(crop, key=lambda i: -attention[i])[:count]
    left = sorted(set(range(n)) - set(chosen), key=lambda i: -attention[i])
    return chosen + left[: n_out - len(chosen)]
