"""Attention of new queries over a ragged store: the native kernel for one new token where it was built, else torch.

In torch it is one call for even lanes, one per lane otherwise. Queries of a KV head's group are packed as rows of one
matrix, so keys are read once per group and never repeated. Nothing is padded and nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.scorer import Softmax
from sparing.kernels import native
from sparing.kernels.ragged import RaggedStore

# Rows of queries per call: bounds the causal mask to (ROWS, n) however long a later turn is.
ROWS = 256


def attend(query: Tensor, store: RaggedStore, softmax: Softmax) -> Tensor:
    """Attention output of the newest tokens; the store already holds their keys, which they see causally.

    Args:
        query: (B, Hq, q, D).

    Returns:
        (B, Hq, q, Dv).
    """
    if query.shape[2] > ROWS:
        tiles = []
        for start in range(0, query.shape[2], ROWS):
            stop = min(start + ROWS, query.shape[2])
            tiles.append(_attend_tile(query[:, :, start:stop], store, softmax, query.shape[2] - stop))
        return torch.cat(tiles, dim=2)
    return _attend_tile(query, store, softmax, 0)


def attend_with_rows(query: Tensor, store: RaggedStore, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention output and the probabilities behind it, for methods that follow decoding.

    Returns:
        (B, Hq, q, Dv) and (B, H, G, q, N) in float32, padded with 0 to the longest lane.
    """
    batch, query_heads, count, dim = query.shape
    heads = store.kv_heads
    grouped = query.reshape(batch * heads, -1, dim)
    longest = max(store.lengths.tolist())
    rows = torch.zeros(batch * heads, grouped.shape[1], longest, device=query.device)
    out = query.new_empty(batch * heads, grouped.shape[1], store.values.shape[-1])
    sinks = _sinks(softmax, heads, batch, count)
    for lane in range(batch * heads):
        keys, values = store.lane(lane)
        mask = _causal(count, keys.shape[0], grouped.shape[1] // count, query.device)
        bias = None if store.bias is None else store.bias[store.spans[lane][0] :][: keys.shape[0]]
        weights = probabilities(grouped[lane], keys, softmax, mask, None if sinks is None else sinks[lane], bias)
        rows[lane, :, : keys.shape[0]] = weights
        out[lane] = weights.to(values.dtype) @ values
    shape = (batch, heads, query_heads // heads, count)
    return out.view(batch, query_heads, count, -1), rows.view(*shape, longest)


def _attend_tile(query: Tensor, store: RaggedStore, softmax: Softmax, after: int) -> Tensor:
    """As `attend`, for queries that are followed by `after` newer tokens, whose keys they must not see."""
    batch, query_heads, count, dim = query.shape
    heads = store.kv_heads
    grouped = query.reshape(batch, heads, -1, dim)
    groups = grouped.shape[2] // count
    if softmax.softcap is not None or softmax.sinks is not None:
        return _attend_explicit(grouped, store, softmax, count, after).view(batch, query_heads, count, -1)
    if count == 1 and not query.requires_grad and native.can_decode(query, store.keys, store.values, groups):
        out, _ = native.ragged_decode(
            grouped.flatten(0, 1), store.keys, store.values, store.starts, store.lengths, softmax.scaling, store.bias
        )
        return out.view(batch, query_heads, 1, -1)
    even = store.even
    if even is not None and store.bias is None:
        keys, values = store.stacked()
        keys, values = keys[:, :, : even - after], values[:, :, : even - after]
        mask = _causal(count, even - after, groups, query.device)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=softmax.scaling)
        return out.reshape(batch, query_heads, count, -1)
    # Views are cut from (1, 1, capacity, D): per lane, indexing would cost as much as a short lane's attention.
    keys, values = store.keys[None, None], store.values[None, None]
    lanes = []
    for queries, (start, length) in zip(
        grouped.reshape(-1, 1, 1, *grouped.shape[2:]).unbind(), store.spans, strict=True
    ):
        seen = length - after
        mask = _mask(store, start, seen, _causal(count, seen, groups, query.device), query.dtype)
        part = (keys.narrow(2, start, seen), values.narrow(2, start, seen))
        lanes.append(F.scaled_dot_product_attention(queries, *part, attn_mask=mask, scale=softmax.scaling))
    return torch.cat(lanes).view(batch, query_heads, count, -1)


def _mask(store: RaggedStore, start: int, length: int, causal: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Causality and the bias of a lane's tokens, as the fused attention takes them."""
    if store.bias is None:
        return causal
    bias = store.bias[start : start + length].to(dtype)
    return bias[None] if causal is None else bias.expand(causal.shape).masked_fill(~causal, -torch.inf)


def _attend_explicit(grouped: Tensor, store: RaggedStore, softmax: Softmax, count: int, after: int) -> Tensor:
    """With a softcap or learned sinks, which the fused attention does not offer."""
    batch, heads = grouped.shape[:2]
    sinks = _sinks(softmax, heads, batch, count)
    lanes = []
    for lane, queries in enumerate(grouped.flatten(0, 1)):
        keys, values = store.lane(lane)
        keys, values = keys[: keys.shape[0] - after], values[: values.shape[0] - after]
        mask = _causal(count, keys.shape[0], queries.shape[0] // count, queries.device)
        bias = None if store.bias is None else store.bias[store.spans[lane][0] :][: keys.shape[0]]
        weights = probabilities(queries, keys, softmax, mask, None if sinks is None else sinks[lane], bias)
        lanes.append(weights.to(values.dtype) @ values)
    return torch.stack(lanes)


def probabilities(
    queries: Tensor, keys: Tensor, softmax: Softmax, mask: Tensor | None, sinks: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(rows, n) attention in at least float32; learned sinks take part in the normalisation only."""
    exact = torch.promote_types(queries.dtype, torch.float32)
    logits = (queries @ keys.T).to(exact) * softmax.scaling
    if softmax.softcap is not None:
        logits = torch.tanh(logits / softmax.softcap) * softmax.softcap
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks[:, None].to(exact)], dim=-1).softmax(-1)[:, :-1]


def _sinks(softmax: Softmax, heads: int, batch: int, count: int) -> Tensor | None:
    """(lanes, G * q) learned sink logits per packed query row."""
    if softmax.sinks is None:
        return None
    per_row = softmax.sinks.float().view(heads, -1).repeat_interleave(count, dim=1)
    return per_row.repeat(batch, 1)


def _causal(count: int, length: int, groups: int, device: torch.device) -> Tensor | None:
    """(G * q, n) bool: the newest q of n tokens see each other causally; None for a single query."""
    if count == 1:
        return None
    mask = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
    return mask.repeat(groups, 1)
