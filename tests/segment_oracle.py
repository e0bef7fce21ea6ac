"""PINE's attention by its definition: one head, token by token, key by key, in float64. Imports nothing of sparing."""

from __future__ import annotations

import itertools
import math

import torch

BASE = 100.0


def angles(positions, dim):
    frequencies = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return positions.double()[..., None] * frequencies


def turn(x, positions):
    """Rotary positions, first half of the coordinates against the second."""
    cos, sin = angles(positions, x.shape[-1]).cos(), angles(positions, x.shape[-1]).sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax(logits):
    top = max(logits)
    shares = [math.exp(x - top) for x in logits]
    return [share / sum(shares) for share in shares]


def dot(q, k, scaling):
    return scaling * sum(float(a) * float(b) for a, b in zip(q, k, strict=True))


def token_importance(q, keys, spans, scaling, without=None):
    """For one query: what a token of each segment gets of its attention, without positions; 0 for what is left out."""
    tokens = [s for j, span in enumerate(spans) if j != without for s in range(*span)]
    share = dict(zip(tokens, softmax([dot(q, keys[s], scaling) for s in tokens]), strict=True)) if tokens else {}
    return [sum(share.get(s, 0.0) for s in range(*span)) / (span[1] - span[0]) for span in spans]


def key_positions(importance, own, prefix, spans):
    """Where a query sees the tokens of all segments: own first, then by importance, the first ones nearest."""
    end = spans[-1][1]
    order = sorted(range(len(spans)), key=lambda j: (j != own, -importance[j]))
    found, nearer = {s: s for s in range(prefix)}, 0
    for j in order:
        start, stop = spans[j]
        for s in range(start, stop):
            found[s] = end - (stop - s) - nearer
        nearer += stop - start
    return found


def attention_of_a_head(queries, keys, values, prefix, lengths, scaling):
    """(N, Dv) for (N, D) queries: every token by itself."""
    ends = list(itertools.accumulate(lengths, initial=prefix))
    spans, tokens = list(itertools.pairwise(ends)), len(keys)
    out = []
    for t in range(tokens):
        own = next((i for i, (start, stop) in enumerate(spans) if start <= t < stop), None)
        if t < prefix:
            where = {s: s for s in range(t + 1)}
        elif own is not None:
            rows = range(*spans[own])
            each = [token_importance(queries[row], keys, spans, scaling, own) for row in rows]
            where = key_positions([sum(column) for column in zip(*each, strict=True)], own, prefix, spans)
            where = {s: p for s, p in where.items() if not t < s < spans[own][1]}
        else:
            where = key_positions(token_importance(queries[t], keys, spans, scaling), None, prefix, spans)
            where |= {s: s for s in range(ends[-1], t + 1)}
        mine = ends[-1] - (spans[own][1] - t) if own is not None else t
        query = turn(queries[t], torch.tensor(mine))
        shares = softmax([dot(query, turn(keys[s], torch.tensor(p)), scaling) for s, p in where.items()])
        out.append(sum(share * values[s] for share, s in zip(shares, where, strict=True)))
    return torch.stack(out)
