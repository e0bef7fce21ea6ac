"""PINE: attention that treats a prompt's segments alike, whatever their order (Wang et al. 2024, arXiv:2407.01100).

Ranked are the segments (documents, options), for each query and head. With q and k *not* rotated:

    a[h, t, s] = softmax over the tokens s of segments of q_t · k_s * scaling
    I[h, t, j] = 1/|D_j| * sum over s in D_j of a[h, t, s]                     t of the suffix or generated
    I[h, i, j] = sum over t in D_i of I[h, t, j], D_i left out of a's softmax  one order for all tokens of segment i

    shift[j]   = tokens of the segments before j in the order of falling I; a token's own segment comes first
    position   = end - |D_j| + (place in D_j) - shift[j]                       of a key in segment j

so the most important segment is the nearest. Attention is causal inside a segment and full to all others; the prefix
sees itself only. `Layout.positions` is `position` without the shift, `end` is `Layout.end`.

**Cost.** Per head and query, over N tokens and k segments: a second dot product with every key of a segment, and k
rotations of the query; memory is one tile of rows, never a map of the prompt. Each decoded token also rotates all N
stored keys, once per KV head: O(N D). The authors rotate the keys for every query and head, O(N D) each.

**Deviations.** 1. Rotary attention depends on distances only, so the *query* is turned ahead by shift[j] where the
paper turns the keys of segment j back: the same dot products. 2. Equal importance keeps the order of the segments in
the prompt; whoever wants no trace of it sorts them by content first (`SegmentedPrompt.in_canonical_order`). 3. Where
an embedding scales what it rotates (YaRN), the softmax of the importance keeps that factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.segments import Layout, Region, SegmentCall
from sparing.measures.attention import ELEMENTS_PER_TILE, ROWS_PER_TILE


@dataclass(frozen=True)
class Pine:
    """See `core.segments.SegmentAttention`."""

    def attend(self, call: SegmentCall) -> Tensor:
        """(B, Hq, Q, Dv): every region of the prompt in tiles of rows."""
        where = call.layout.positions(call.tokens).to(call.query.device)
        keys = call.turn(call.keys, where)
        parts = []
        for region in call.layout.regions(call.start, call.tokens):
            tiles = list(_tiles(call, region))
            for rows, shift in zip(tiles, _shifts(call, region, tiles), strict=True):
                parts.append(_attend(call, keys, where, region, rows, shift))
        return torch.cat(parts, dim=2)


def _shifts(call: SegmentCall, region: Region, tiles: Sequence[slice]) -> Iterator[Tensor | None]:
    """For each tile (B, Hq, rows or 1, k): how far every segment moves back; None in the prefix, which sees none."""
    if region.own is not None:
        importance = torch.stack([_importance(call, rows, region.own).sum(2, keepdim=True) for rows in tiles]).sum(0)
        yield from [shifts(importance, call.layout, region.own)] * len(tiles)
        return
    for rows in tiles:
        yield None if region.visible <= call.layout.prefix else shifts(_importance(call, rows), call.layout)


def shifts(importance: Tensor, layout: Layout, own: int | None = None) -> Tensor:
    """(..., k) int64 from (..., k) importance: how far each segment moves back; `own` is the nearest by definition."""
    lengths = torch.tensor(layout.lengths, device=importance.device)
    if own is not None:
        importance = importance.index_fill(-1, torch.tensor([own], device=importance.device), torch.inf)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    ranked = lengths[order]
    return torch.empty_like(order).scatter_(-1, order, ranked.cumsum(-1) - ranked)


def _importance(call: SegmentCall, rows: slice, own: int | None = None) -> Tensor:
    """(B, Hq, rows, k): I[h, t, j] of the module's docstring, for query tokens of the segment `own`, or of none."""
    region = call.keys[:, :, call.layout.prefix : call.layout.end]
    logits = _exact(_dots(_queries(call, rows), region)) * call.scaling
    if own is not None:
        first, last = (token - call.layout.prefix for token in call.layout.spans[own])
        logits[..., first:last] = -torch.inf
    shares = logits.softmax(-1).split(call.layout.lengths, dim=-1)
    return torch.stack([share.mean(-1) for share in shares], dim=-1)


def _attend(
    call: SegmentCall, keys: Tensor, where: Tensor, region: Region, rows: slice, shift: Tensor | None
) -> Tensor:
    """(B, Hq, rows, Dv): attention of some query tokens of a region over rotated keys, given each segment's shift."""
    layout, query = call.layout, _queries(call, rows)
    near = call.turn(query, where[rows])
    if shift is None:
        logits = _dots(near, keys[:, :, : region.visible])
    else:
        turned = query[:, :, :, None].expand(-1, -1, -1, len(layout.lengths), -1)
        turned = call.turn(turned, where[rows, None] + shift)
        parts = [_dots(near, keys[:, :, : layout.prefix])]
        parts += [_dots(turned[..., j, :], keys[:, :, slice(*span)]) for j, span in enumerate(layout.spans)]
        parts += [_dots(near, keys[:, :, layout.end : region.visible])]
        logits = torch.cat(parts, dim=-1)
    tokens = torch.arange(call.tokens, device=keys.device)
    future = tokens[region.first : region.last] > tokens[rows, None]
    logits = _exact(logits) * call.scaling
    logits[..., region.first : region.last].masked_fill_(future, -torch.inf)
    shares = logits.softmax(-1).to(call.values.dtype)
    batch, heads, count, _ = query.shape
    grouped = shares.view(batch, call.values.shape[1], -1, region.visible)
    return (grouped @ call.values[:, :, : region.visible]).view(batch, heads, count, -1)


def _tiles(call: SegmentCall, region: Region) -> Iterator[slice]:
    """The query tokens of a region, in slices of as many as may be attended at once."""
    batch, heads, _, dim = call.query.shape
    per_row = batch * heads * (region.visible + dim * len(call.layout.lengths))
    height = max(1, min(ROWS_PER_TILE, ELEMENTS_PER_TILE // per_row))
    start, stop = region.rows
    for first in range(start, stop, height):
        yield slice(first, min(first + height, stop))


def _queries(call: SegmentCall, rows: slice) -> Tensor:
    return call.query[:, :, rows.start - call.start : rows.stop - call.start]


def _dots(query: Tensor, keys: Tensor) -> Tensor:
    """(B, Hq, T, n) from (B, Hq, T, D) and (B, H, n, D); every KV head serves Hq / H query heads."""
    batch, heads, count, dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, dim)
    return (grouped @ keys.transpose(-1, -2)).view(batch, heads, count, -1)


def _exact(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()
