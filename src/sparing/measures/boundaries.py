"""Where a text falls into parts, by its keys: what DHSA cuts at (arXiv:2510.24606).

A boundary is the first token of a part. Whether position p is one is told by the 2w keys around it, p - w to p + w - 1.
Rotated keys change with where they stand, but cosines between them, and norms, depend on distances alone: these are the
features, of every KV head of a layer.

Shape legend: H KV heads, N keys, D head size, w window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.lens import AttentionCall
from sparing.measures.attention import ROWS_PER_TILE, attention_rows


def key_features(keys: Tensor, window: int) -> Tensor:
    """(H, 2w, N) float32 of (H, N, D) keys: every key's norm, and its cosines with the next 2w - 1 keys.

    Entry [h, o, j] is cos(k_j, k_{j+o}), 0 beyond the last key; for o = 0 it is the log of the norm, less its mean.
    """
    exact = keys.float()
    norms = exact.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    units, tokens = exact / norms, keys.shape[1]
    maps = exact.new_zeros(keys.shape[0], 2 * window, tokens)
    maps[:, 0] = norms[..., 0].log()
    maps[:, 0] -= maps[:, 0].mean(-1, keepdim=True)
    for offset in range(1, min(2 * window, tokens)):
        maps[:, offset, : tokens - offset] = torch.linalg.vecdot(units[:, offset:], units[:, :-offset])
    return maps


def pairs_within(window: int) -> Tensor:
    """(2w, 2w) bool: [o, a], pairs of keys a and a + o of a window of 2w."""
    number = torch.arange(2 * window)
    return number + number[:, None] < 2 * window


def cosine_drops(features: Tensor, window: int) -> Tensor:
    """(N,): how much less keys resemble each other across a position than on its two sides, mean over heads.

    For every position the mean cosine of the pairs on one side less that of the pairs across it.
    """
    first, offset = torch.arange(2 * window), torch.arange(2 * window)[:, None]
    pairs = pairs_within(window) & (offset > 0)
    across = pairs & (first < window) & (first + offset >= window)
    beside = pairs & ~across
    weights = beside / beside.sum().clamp_min(1) - across / across.sum()
    return scored(features, weights.to(features).expand(features.shape[0], -1, -1) / features.shape[0])


def scored(features: Tensor, weights: Tensor) -> Tensor:
    """(N,): the sum of weights [h, o, a] times features [h, o, p - w + a]; -inf where there are not w keys on a side.

    Pairs that reach beyond the window do not count (`pairs_within`).
    """
    width = weights.shape[-1]
    if features.shape[-1] < width:
        return features.new_full((features.shape[-1],), -torch.inf)
    weights = weights.masked_fill(~pairs_within(width // 2).to(weights.device), 0.0)
    found = F.conv1d(features.flatten(0, 1)[None], weights.flatten(0, 1)[None])[0, 0]
    return F.pad(found, (width // 2, width // 2 - 1), value=-torch.inf)


def attention_jumps(call: AttentionCall, window: int) -> Tensor:
    """(N,) of a call of one whole text: how unequally later rows attend to the two sides of each position.

    With S(p) the mean over heads of the attention that the rows from p + w on pay to a key, summed over these rows: the
    larger of the sums of S(p) over the w keys before p and over the w keys from p on, over the smaller; 0 where there
    are fewer keys, or no such rows. It takes the whole map, a tile at a time, the last rows first.
    """
    tokens = call.keys.shape[2]
    band = torch.zeros(tokens, 2 * window, device=call.keys.device)
    below = torch.zeros(tokens, device=call.keys.device)
    around = torch.arange(-2 * window, 0, device=call.keys.device)
    for stop in range(tokens, 0, -ROWS_PER_TILE):
        rows = torch.arange(max(stop - ROWS_PER_TILE, 0), stop, device=call.keys.device)
        attention = attention_rows(call, slice(int(rows[0]), stop))[0].float().mean(0)
        sums = attention.flip(0).cumsum(0).flip(0) + below
        band[rows] = sums.gather(1, (rows[:, None] + around).clamp_min(0))
        below = sums[0]
    past, coming = band[2 * window :, :window].sum(-1), band[2 * window :, window:].sum(-1)
    least = torch.minimum(past, coming).clamp_min(torch.finfo(torch.float32).tiny)
    ratios = torch.maximum(past, coming) / least
    return F.pad(ratios, (window, tokens - window - len(ratios))) if len(ratios) else torch.zeros_like(below)


def peaks(values: Tensor, distance: int) -> Tensor:
    """(N,) bool: best first, every position of finite value that is less than `distance` from none better.

    Ties go to the earlier one. (Greedy, all at once: what is best within its distance stays, its neighbours go.)
    """
    order = values.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), 0, -1, device=values.device)).float()
    rank = rank.masked_fill(values == -torch.inf, 0.0)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    while bool((rank > 0).any()):
        around = F.max_pool1d(rank[None], 2 * distance - 1, 1, distance - 1)[0]
        best = (rank == around) & (rank > 0)
        chosen |= best
        near = F.max_pool1d(best.float()[None], 2 * distance - 1, 1, distance - 1)[0] > 0
        rank = rank.masked_fill(near, 0.0)
    return chosen


def best_peaks(values: Tensor, distance: int, count: int) -> Tensor:
    """(at most count,) int64 ascending: the best of the `peaks`."""
    found = values.masked_fill(~peaks(values, distance), -torch.inf)
    order = found.argsort(descending=True, stable=True)[: min(count, int((found > -torch.inf).sum()))]
    return order.sort().values
