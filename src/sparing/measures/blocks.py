"""Attention by blocks: the rows, sums and pooled products that sparse prefill chooses by (primitives P3 and P6).

Blocks lie on a grid that begins at position 0, so the first block of rows may lack some when a prompt is read in parts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.prefill import PromptCall


def last_rows(call: PromptCall, count: int) -> Tensor:
    """(Hq, rows, N) float32: the attention of the last `count` query rows, or of all if there are fewer."""
    rows = min(count, call.rows)
    states = call.query[:, call.rows - rows :].float()
    keys = call.keys.float().repeat_interleave(call.group, dim=0)
    logits = states @ keys.transpose(-1, -2) * call.softmax.scaling
    if call.softmax.softcap is not None:
        logits = torch.tanh(logits / call.softmax.softcap) * call.softmax.softcap
    numbers = torch.arange(call.tokens, device=logits.device)
    return logits.masked_fill_(numbers > numbers[-rows:, None], -torch.inf).softmax(-1)


def diagonal_sums(rows: Tensor) -> Tensor:
    """(Hq, N): of the last rows (Hq, R, N) of a causal map, the sum over each diagonal; entry o is offset i - j = o."""
    heads, count, tokens = rows.shape
    # Shifted so that equal offsets lie in one column: row r of the R ends at position N - R + r.
    padded = F.pad(rows.flip(-1), (0, count))
    shifted = padded.flatten(1)[:, : count * (tokens + count - 1)].reshape(heads, count, tokens + count - 1)
    return shifted.sum(1)[:, count - 1 :]


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
