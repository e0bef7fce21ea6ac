"""Attention rows and column sums, recomputed from queries and keys in float32 (primitives P1 and P2).

A[h, i, j] is the causal softmax of q_i · k_j over the keys j that row i may see: valid, and not after it.
Memory is bounded by one tile of rows: (B, H, G * tile, N) float32; the full map is never held.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from sparing.core.lens import AttentionCall
from sparing.core.scorer import KeyValues, Queries, Softmax

ROWS_PER_TILE = 128
# A tile's logits stay under this many elements, so long contexts take narrower tiles (64 MiB of float32).
ELEMENTS_PER_TILE = 16 * 2**20
# What float32 may take from an even share: logits that are equal in exact arithmetic differ by some ulps.
EVEN = 1e-5


def window_rows(state: Queries | None, new: Queries, window: int) -> Queries:
    """The last `window` query rows seen so far: append a chunk's rows and forget the oldest."""
    if state is not None and new.states.shape[2] < window:
        new = joined(state, new)
    return rows_from(new, max(new.positions.shape[0] - window, 0))


def joined(old: Queries, new: Queries) -> Queries:
    """The rows of both, in order."""
    return Queries(
        torch.cat([old.states, new.states], dim=2),
        torch.cat([old.positions, new.positions]),
        torch.cat([old.valid, new.valid], dim=1),
        new.softmax,
    )


def rows_from(queries: Queries, first: int) -> Queries:
    """The rows from number `first` on, copied: a slice would keep the whole prompt's queries alive."""
    rest = slice(first, None)
    states, positions, valid = queries.states[:, :, rest], queries.positions[rest], queries.valid[:, rest]
    return Queries(states.clone(), positions.clone(), valid.clone(), queries.softmax)


def attention_mass(queries: Queries, stored: KeyValues) -> Tensor:
    """Mean attention per key over the given rows: the mean over valid rows i of A[h, i, j] (P1).

    Returns:
        (B, Hq, N) float32; 0 where not valid. Rows that are pads do not count.
    """
    total = column_mass(queries, stored)
    rows = queries.valid.sum(-1).clamp_min(1)
    return total / rows[:, None, None]


def column_mass(queries: Queries, stored: KeyValues) -> Tensor:
    """Attention per key summed over the given rows: the sum over valid rows i of A[h, i, j] (P2).

    Returns:
        (B, Hq, N) float32; 0 where not valid.
    """
    batch, query_heads = queries.states.shape[:2]
    tokens = stored.keys.shape[2]
    total = torch.zeros(batch, query_heads, tokens, device=queries.states.device)
    for rows, visible, probabilities in attention_tiles(queries, stored):
        is_pad = ~queries.valid[:, None, rows, None]
        total[..., :visible] += probabilities.masked_fill(is_pad, 0.0).sum(2)
    return total


def below_average(queries: Queries, stored: KeyValues) -> Tensor:
    """For every key the number of valid rows that see it and pay it less than an even share, 1 / keys that they see.

    Returns:
        (B, Hq, N) float32 whole numbers. What equals the even share up to rounding is not below it.
    """
    batch, query_heads = queries.states.shape[:2]
    kv_heads, tokens = stored.keys.shape[1:3]
    counts = torch.zeros(batch, query_heads, tokens, device=queries.states.device)
    for rows, visible, probabilities in attention_tiles(queries, stored):
        where = stored.positions[:, :, None, :visible]
        sees = stored.valid[:, :, None, :visible] & (where <= queries.positions[rows, None])
        sees = (sees & queries.valid[:, None, rows, None]).repeat_interleave(query_heads // kv_heads, dim=1)
        share = 1 / sees.sum(-1, keepdim=True).clamp_min(1)
        counts[..., :visible] += (sees & (probabilities < share * (1 - EVEN))).sum(2)
    return counts


def attention_tiles(queries: Queries, stored: KeyValues) -> Iterator[tuple[slice, int, Tensor]]:
    """The attention of the given rows, a tile of rows at a time.

    Yields:
        (rows, visible, A): the slice of query rows, the number of leading stored slots that any of them may
        see, and their attention (B, Hq, rows, visible) in float32. Rows that see nothing are 0.
    """
    batch, query_heads, count, dim = queries.states.shape
    kv_heads, tokens = stored.keys.shape[1:3]
    groups = query_heads // kv_heads
    height = max(1, min(ROWS_PER_TILE, ELEMENTS_PER_TILE // max(batch * query_heads * tokens, 1)))
    far = torch.iinfo(torch.int64).max
    earliest = stored.positions.masked_fill(~stored.valid, far).amin((0, 1))
    from_here = earliest.flip(0).cummin(0).values.flip(0).tolist()  # the earliest position in this slot or after it
    latest = stored.positions.masked_fill(~stored.valid, -1).amax((0, 1)).cummax(0).values.tolist()
    for start in range(0, count, height):
        rows = slice(start, min(start + height, count))
        positions = queries.positions[rows]
        first, last = int(positions[0]), int(positions[-1])
        # Slots that no row of the tile may see, at the end, are not touched at all.
        visible = bisect_right(from_here, last)
        states = queries.states[:, :, rows].float().reshape(batch, kv_heads, -1, dim)
        logits = states @ stored.keys[:, :, :visible].float().transpose(-1, -2)
        may_see = stored.valid[:, :, None, :visible]
        if visible and latest[visible - 1] > first:  # some rows of the tile have keys in their future
            may_see = may_see & (stored.positions[:, :, None, :visible] <= positions[:, None])
        logits = logits.view(batch, query_heads, len(positions), visible)
        bias = None if stored.bias is None else stored.bias[:, :, None, :visible].repeat_interleave(groups, dim=1)
        yield rows, visible, _softmax(logits, may_see.repeat_interleave(groups, dim=1), queries.softmax, bias)


def bidirectional_mass(states: Tensor, keys: Tensor, valid: Tensor, softmax: Softmax) -> Tensor:
    """Attention per key summed over the rows of one stretch of text in which every row sees every key.

    Args:
        states: (B, Hq, C, D). keys: (B, H, C, D). valid: (B, C) bool, tokens that are there.

    Returns:
        (B, Hq, C) float32; 0 where not valid.
    """
    batch, query_heads, count, dim = states.shape
    real = valid[:, None, :, None]
    grouped = states.float().masked_fill(~real, 0.0).reshape(batch, keys.shape[1], -1, dim)
    logits = (grouped @ keys.float().masked_fill(~real, 0.0).transpose(-1, -2)).view(batch, query_heads, count, count)
    rows = _softmax(logits, valid[:, None, None, :].expand_as(logits), softmax)
    return rows.masked_fill(~real, 0.0).sum(2)


def attention_rows(call: AttentionCall, rows: slice = slice(None)) -> Tensor:
    """The attention of some query rows of a call, as the model's own eager attention would have made it.

    Differentiable. Float64 calls are computed in float64, all others in float32.

    Returns:
        (B, Hq, rows, S) probabilities; rows that see nothing are 0. Memory is that of the rows asked for.
    """
    exact = call.queries.dtype if call.queries.dtype == torch.float64 else torch.float32
    batch, query_heads, _, dim = call.queries.shape
    kv_heads, stored = call.keys.shape[1:3]
    states = call.queries[:, :, rows].to(exact)
    grouped = states.reshape(batch, kv_heads, -1, dim)  # a key is never copied to its group's heads
    logits = (grouped @ call.keys.to(exact).transpose(-1, -2)).view(batch, query_heads, states.shape[2], stored)
    return _softmax(logits, call.may_see(rows), call.softmax)


def row_tiles(call: AttentionCall, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The attention of all query rows from `start` on, a tile at a time.

    Yields:
        (rows, A): the slice of query rows, and their attention (B, Hq, rows, S).
    """
    batch, query_heads, count, _ = call.queries.shape
    height = max(1, min(ROWS_PER_TILE, ELEMENTS_PER_TILE // max(batch * query_heads * call.keys.shape[2], 1)))
    for first in range(start, count, height):
        rows = slice(first, min(first + height, count))
        yield rows, attention_rows(call, rows)


def _softmax(logits: Tensor, may_see: Tensor, softmax: Softmax, bias: Tensor | None = None) -> Tensor:
    """Softmax over the visible keys, in place of the logits as far as gradients allow; rows that see nothing are 0."""
    logits = softmax.capped(logits.mul_(softmax.scaling))
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill_(~may_see, -torch.inf)
    if softmax.sinks is not None:
        sinks = softmax.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    probabilities = logits.softmax(-1)
    return (probabilities.masked_fill if probabilities.requires_grad else probabilities.masked_fill_)(~may_see, 0.0)
