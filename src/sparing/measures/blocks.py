"""Attention by blocks: the rows, sums and pooled products that sparse prefill chooses by (primitives P3 and P6).

Blocks lie on a grid that begins at position 0, so the first block of rows may lack some when a prompt is read in parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.pattern import Pattern
from sparing.core.prefill import PromptCall


def last_rows(call: PromptCall, count: int) -> Tensor:
    """(Hq, rows, N) float32: the attention of the last `count` query rows, or of all if there are fewer."""
    rows = min(count, call.rows)
    states = call.query[:, call.rows - rows :].float() * call.softmax.scaling
    grouped = states.reshape(call.keys.shape[0], -1, states.shape[-1])  # a key is never copied to its group's heads
    logits = call.softmax.capped((grouped @ call.keys.float().transpose(-1, -2)).view(call.heads, rows, -1))
    later = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., call.tokens - rows :].masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


def diagonal_sums(rows: Tensor) -> Tensor:
    """(Hq, N): of the last rows (Hq, R, N) of a causal map, the sum over each diagonal; entry o is offset i - j = o."""
    heads, count, tokens = rows.shape
    padded, width = F.pad(rows, (count, 0)), tokens + count
    # Every row begins one place later than that before it, so that equal offsets lie in one column.
    return padded.as_strided((heads, count, tokens), (count * width, width + 1, 1), 1).sum(1).flip(-1)


def pooled(states: Tensor, size: int, start: int = 0) -> Tensor:
    """(heads, blocks, D) float32: the mean over each block of (heads, T, D) states that begin at position `start`."""
    front, tokens = start % size, states.shape[1]
    back = -(start + tokens) % size
    sums = F.pad(states.float(), (0, 0, front, back)).unflatten(1, (-1, size)).sum(2)
    counts = F.pad(torch.ones(tokens, device=states.device), (front, back)).view(-1, size).sum(-1)
    return sums / counts[:, None]


def pooled_logits(call: PromptCall, size: int) -> Tensor:
    """(Hq, nq, nk) float32: mean query of a block times mean key of a block, scaled as the model does."""
    queries = pooled(call.query, size, call.start)
    keys = pooled(call.keys, size).repeat_interleave(call.group, dim=0)
    return queries @ keys.transpose(-1, -2) * call.softmax.scaling


def block_sums(columns: Tensor, size: int) -> Tensor:
    """(..., nk): sums of (..., N) over blocks of keys."""
    return F.pad(columns, (0, -columns.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


# Entries of a float32 array of attention rows that are held at a time.
ROWS_HELD = 2**24


def last_means(call: PromptCall, count: int) -> tuple[Tensor, Tensor]:
    """(Hq, N) float32 twice: the mean attention of the last `count` rows to each key, and to each offset i - j."""
    columns, offsets = [], []
    for rows in _last_rows_by_heads(call, count):
        columns.append(rows.mean(1))
        offsets.append(diagonal_sums(rows) / rows.shape[1])
    return torch.cat(columns), torch.cat(offsets)


def last_mean(call: PromptCall, count: int) -> Tensor:
    """(Hq, N) float32: the mean attention of the last `count` rows to each key."""
    return torch.cat([rows.mean(1) for rows in _last_rows_by_heads(call, count)])


def _last_rows_by_heads(call: PromptCall, count: int) -> Iterator[Tensor]:
    """`last_rows` of a few KV heads after another."""
    width = max(ROWS_HELD // (min(count, call.rows) * call.tokens * call.group), 1)
    for low in range(0, call.keys.shape[0], width):
        some, theirs = slice(low, low + width), slice(low * call.group, (low + width) * call.group)
        part = replace(call, query=call.query[theirs], keys=call.keys[some], values=call.values[some])
        yield last_rows(part, count)


def best_offsets(scores: Tensor, size: int) -> Tensor:
    """(..., nk): of scores (..., N) of offsets i - j, the best that every diagonal of blocks holds a part of.

    The rows of a block meet offset d * size + r in the d-th block before their own and, unless r is 0, in the one
    before that: to read the best diagonals of blocks is to read the best offsets, wherever a row lies in its block.
    """
    inside = F.pad(scores, (0, -scores.shape[-1] % size), value=-torch.inf).unflatten(-1, (-1, size))
    best = inside.amax(-1)
    best[..., 1:] = best[..., 1:].maximum(inside[..., :-1, 1:].amax(-1))
    return best


def diagonals_of(grid: Pattern) -> Tensor:
    """(nq, nk) int64: how many blocks before a row's own every block lies; 0 for those after it."""
    numbers = torch.arange(grid.num_key_blocks, device=grid.blocks.device)
    return (numbers[grid.first_block :, None] - numbers).clamp_min(0)


def column_costs(blocks: Tensor, areas: Tensor, size: int) -> Tensor:
    """(Hq, nk) int64: pairs that a column of each key block costs: a row each, but where its block is on already.

    Args:
        blocks: (Hq, nq, nk) bool. areas: (nq, nk) pairs of the blocks before the rows' own, 0 for others.
    """
    return (~blocks * areas).sum(1).div(size, rounding_mode="floor")


def best_that_fit(scores: Tensor, costs: Tensor, room: Tensor | int) -> Tensor:
    """(..., n) bool: the highest scores, as many as fit into the room together; -inf never. Ties go to the earlier."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    fits = costs.gather(-1, order).cumsum(-1) <= room
    return torch.zeros_like(fits).scatter_(-1, order, fits) & (scores > -torch.inf)
