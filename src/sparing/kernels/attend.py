"""Attention of new queries over a ragged store: a kernel for one new token where there is one, else torch.

The kernels are the native one on the CPU, where it was built, and on a GPU with triton one for uneven lanes
(`triton_decode`; SPARING_TRITON=0 switches it off).

In torch it is one call for even lanes, one per lane otherwise. Queries of a KV head's group are packed as rows of one
matrix, so keys are read once per group and never repeated. Nothing is padded and nothing is copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.scorer import Softmax
from sparing.kernels import native
from sparing.kernels.compact import CompactStore, Store
from sparing.kernels.ragged import RaggedStore

# Rows of queries per call: bounds the causal mask to (ROWS, n) however long a later turn is.
ROWS = 256
# Devices of the Triton kernel.
GPUS = ("cuda",)


def attend(query: Tensor, store: Store, softmax: Softmax) -> Tensor:
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


def attend_with_rows(query: Tensor, store: Store, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention output and the probabilities behind it, for methods that follow decoding.

    Returns:
        (B, Hq, q, Dv) and (B, H, G, q, N) in float32, padded with 0 to the longest lane.
    """
    batch, query_heads, count, dim = query.shape
    heads = store.kv_heads
    grouped = query.reshape(batch * heads, -1, dim)
    longest = max(store.lengths.tolist())
    rows = torch.zeros(batch * heads, grouped.shape[1], longest, device=query.device)
    out = query.new_empty(batch * heads, grouped.shape[1], store.dims[1])
    sinks = packed_sinks(softmax, heads, count)
    for lane in range(batch * heads):
        keys, values = store.lane(lane)
        mask = _causal(count, keys.shape[0], grouped.shape[1] // count, query.device)
        weights = probabilities(grouped[lane], keys, softmax, mask, sinks[lane % heads], store.lane_bias(lane))
        rows[lane, :, : keys.shape[0]] = weights
        out[lane] = weights.to(values.dtype) @ values
    shape = (batch, heads, query_heads // heads, count)
    return out.view(batch, query_heads, count, -1), rows.view(*shape, longest)


def _attend_tile(query: Tensor, store: Store, softmax: Softmax, after: int) -> Tensor:
    """As `attend`, for queries that are followed by `after` newer tokens, whose keys they must not see."""
    batch, query_heads, count, dim = query.shape
    heads = store.kv_heads
    grouped = query.reshape(batch, heads, -1, dim)
    groups = grouped.shape[2] // count
    if softmax.softcap is not None or softmax.sinks is not None:
        return _attend_explicit(grouped, store, softmax, count, after).view(batch, query_heads, count, -1)
    if isinstance(store, CompactStore):
        return _attend_compact(grouped, store, softmax, count, after).view(batch, query_heads, count, -1)
    decode = None if count > 1 or query.requires_grad else _decoder(query, store, groups)
    if decode is not None:
        out, _ = decode(
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
        bias = None if store.bias is None else store.bias[start : start + seen]
        mask = _mask(bias, _causal(count, seen, groups, query.device), query.dtype)
        part = (keys.narrow(2, start, seen), values.narrow(2, start, seen))
        lanes.append(F.scaled_dot_product_attention(queries, *part, attn_mask=mask, scale=softmax.scaling))
    return torch.cat(lanes).view(batch, query_heads, count, -1)


def _decoder(query: Tensor, store: RaggedStore, group: int) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel that attends one new token over these tensors, if there is one."""
    if native.can_decode(query, store.keys, store.values, group):
        return native.ragged_decode
    is_even = store.even is not None and store.bias is None  # one call of torch's
    if query.device.type in GPUS and not is_even and _has_triton():
        from sparing.kernels import triton_decode  # needs triton

        if triton_decode.can_decode(query, store.keys, store.values, group):
            return triton_decode.ragged_decode
    return None


@cache
def _has_triton() -> bool:
    return os.environ.get("SPARING_TRITON") != "0" and find_spec("triton") is not None


def _mask(bias: Tensor | None, causal: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Causality and the bias of a lane's tokens, as the fused attention takes them."""
    if bias is None:
        return causal
    bias = bias.to(dtype)
    return bias[None] if causal is None else bias.expand(causal.shape).masked_fill(~causal, -torch.inf)


def _attend_compact(grouped: Tensor, store: CompactStore, softmax: Softmax, count: int, after: int) -> Tensor:
    """Over coded tokens and the window behind them, in one softmax."""
    queries = grouped.flatten(0, 1)
    if count == 1 and not queries.requires_grad and native.can_decode_coded(queries, store):
        return native.coded_decode(queries, store, softmax.scaling)[0]
    lanes = []
    for lane, rows in enumerate(queries):
        if store.coding.bits is None and store.pages is not None:
            lanes.append(_attend_thin(rows, store, lane, softmax, count, after))
            continue
        keys, values = store.lane(lane)
        seen, bias = keys.shape[0] - after, store.lane_bias(lane)
        causal = _causal(count, seen, rows.shape[0] // count, rows.device)
        mask = _mask(None if bias is None else bias[:seen], causal, rows.dtype)
        keys, values = keys[None, :seen], values[None, :seen]
        out = F.scaled_dot_product_attention(rows[None], keys, values, attn_mask=mask, scale=softmax.scaling)
        lanes.append(out[0])
    return torch.stack(lanes)


def _attend_thin(rows: Tensor, store: CompactStore, lane: int, softmax: Softmax, count: int, after: int) -> Tensor:
    """Over a lane's thin keys, which meet the queries' same channels, and the window; without copies of either."""
    pages, (new_keys, new_values) = store.lane_pages(lane), store.window.lane(lane)
    seen = new_keys.shape[0] - after
    thin = rows if store.coding.channels is None else rows[:, store.coding.channels[lane]]
    exact = torch.promote_types(rows.dtype, torch.float32)
    old = (thin @ pages.keys.flatten(0, 1).T).to(exact) * softmax.scaling
    new = (rows @ new_keys[:seen].T).to(exact) * softmax.scaling
    new_bias = store.window.lane_bias(lane)
    if pages.bias is not None and new_bias is not None:
        old, new = old + pages.bias.flatten(), new + new_bias[:seen]
    old = old.masked_fill(~pages.filled.flatten(), -torch.inf)
    causal = _causal(count, seen, rows.shape[0] // count, rows.device)
    new = new if causal is None else new.masked_fill(~causal, -torch.inf)
    weights = torch.cat([old, new], dim=-1).softmax(-1).to(rows.dtype)
    held = old.shape[1]
    return weights[:, :held] @ pages.values.flatten(0, 1) + weights[:, held:] @ new_values[:seen]


def _attend_explicit(grouped: Tensor, store: Store, softmax: Softmax, count: int, after: int) -> Tensor:
    """With a softcap or learned sinks, which the fused attention does not offer."""
    heads = grouped.shape[1]
    sinks = packed_sinks(softmax, heads, count)
    lanes = []
    for lane, queries in enumerate(grouped.flatten(0, 1)):
        keys, values = store.lane(lane)
        keys, values = keys[: keys.shape[0] - after], values[: values.shape[0] - after]
        mask = _causal(count, keys.shape[0], queries.shape[0] // count, queries.device)
        bias = store.lane_bias(lane)
        bias = None if bias is None else bias[: keys.shape[0]]
        weights = probabilities(queries, keys, softmax, mask, sinks[lane % heads], bias)
        lanes.append(weights.to(values.dtype) @ values)
    return torch.stack(lanes)


def probabilities(
    queries: Tensor, keys: Tensor, softmax: Softmax, mask: Tensor | None, sinks: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(rows, n) attention in at least float32; learned sinks take part in the normalisation only."""
    exact = torch.promote_types(queries.dtype, torch.float32)
    logits = softmax.capped((queries @ keys.T).to(exact) * softmax.scaling)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks[:, None].to(exact)], dim=-1).softmax(-1)[:, :-1]


def packed_sinks(softmax: Softmax, heads: int, count: int) -> Sequence[Tensor | None]:
    """[KV head] → (G * q,) learned sink logits, one per packed query row; None where there are none."""
    if softmax.sinks is None:
        return [None] * heads
    return softmax.sinks.float().view(heads, -1).repeat_interleave(count, dim=1).unbind()


def _causal(count: int, length: int, groups: int, device: torch.device) -> Tensor | None:
    """(G * q, n) bool: the newest q of n tokens see each other causally; None for a single query."""
    if count == 1:
        return None
    mask = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
    return mask.repeat(groups, 1)
