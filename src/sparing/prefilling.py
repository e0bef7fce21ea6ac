"""Sparse attention as a function: for any tensors, among them grids of tokens of vision and diffusion models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparing.core.grids import Grid, GridSparse
from sparing.core.pattern import blank
from sparing.core.prefill import PromptCall, SparsePrefill
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError, require
from sparing.kernels.sparse import attend_call, attend_sparse


@torch.no_grad()
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: SparsePrefill,
    grid: tuple[int, ...] | None = None,
    text_tokens: int = 0,
    scaling: float | None = None,
) -> Tensor:
    """Attention that computes what a method keeps; for inference, without gradients.

    Example:
        >>> video = sparing.sparse_attention(q, k, v, sparing.GRAT(keep=0.25), grid=(32, 48, 80), text_tokens=256)
        >>> prompt = sparing.sparse_attention(q, k, v, sparing.XAttention(keep=0.25))

    Args:
        query: (B, Hq, Q, D), rotated already. Without a grid, the last Q of N tokens, causal.
        key, value: (B, H, N, D) and (B, H, N, Dv), H a divisor of Hq. No pads.
        method: what is computed. With a grid, one that knows grids (`GRAT`, `Neighborhood`); without, any.
        grid: length of each axis, one to three, of tokens that see each other in both directions, the last axis
            fastest; None for a causal sequence.
        text_tokens: tokens after the grid's own, which read all and are read by all.
        scaling: factor on the dot products; 1/sqrt(D) by default.

    Returns:
        (B, Hq, Q, Dv), in the order of the query.

    Raises:
        InvalidInputError: shapes that do not fit. MethodRefusedError: a method that does not know grids.
    """
    _check(query, key, value, method)
    softmax = Softmax(query.shape[-1] ** -0.5 if scaling is None else scaling)
    rows = zip(query, key, value, strict=True)
    if grid is None:
        require(text_tokens == 0, "text_tokens", text_tokens, "0 without a grid")
        return torch.stack([_causal(PromptCall(q, k, v, softmax, attend_call), method) for q, k, v in rows])
    shape = Grid(tuple(grid), text_tokens)
    tokens = f"{shape.tokens}, the tokens of the grid and its text"
    require(key.shape[2] == shape.tokens, "key", f"{key.shape[2]} tokens", tokens)
    require(query.shape[2] == shape.tokens, "query", f"{query.shape[2]} tokens", tokens)
    if not isinstance(method, GridSparse):
        fix = "use one that knows grids: grat, neighborhood"
        raise MethodRefusedError(method.label, "is about tokens that see what is before them", fix)
    return _on_grid((query, key, value), softmax, method, shape)


def _causal(call: PromptCall, method: SparsePrefill) -> Tensor:
    if not method.reads_all:
        return method.attend(call).part.out
    return call.attend(call.grid(method.block).dense()).out


def _on_grid(states: tuple[Tensor, Tensor, Tensor], softmax: Softmax, method: GridSparse, grid: Grid) -> Tensor:
    query, key, value = states
    if method.reads_all:
        pattern = replace(blank(1, grid.tokens, 0, method.block), is_causal=False).dense()
        order = torch.arange(grid.tokens)
    else:
        layout = method.lay_out(grid)
        order, pattern = layout.order, layout.pattern
    heads, device = query.shape[1], query.device
    pattern = replace(pattern, blocks=pattern.blocks.to(device).expand(heads, -1, -1))
    order = order.to(device)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for row in range(len(query)):
        q, k, v = (x[row].index_select(1, order) for x in (query, key, value))
        out[row].index_copy_(1, order, attend_sparse(q, k, v, pattern, softmax).out)
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, method: object) -> None:
    if not isinstance(method, SparsePrefill):
        raise InvalidInputError("method", method, "a sparse prefill method, e.g. sparing.GRAT(keep=0.25)")
    for name, x in (("query", query), ("key", key), ("value", value)):
        require(x.dim() == 4, name, tuple(x.shape), "(batch, heads, tokens, size)")
    (batch, heads, rows, size), kv = query.shape, key.shape
    fits = kv[0] == batch and kv[3] == size and heads % kv[1] == 0 and 1 <= rows <= kv[2]
    require(fits, "key", tuple(kv), f"what fits the query {tuple(query.shape)}")
    require(value.shape[:3] == kv[:3], "value", tuple(value.shape), f"what fits the key {tuple(kv)}")
