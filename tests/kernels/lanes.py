"""Uneven lanes, and attention over them by its definition: for the decode kernels of every device."""

import torch

LENGTHS = [1, 2, 15, 16, 17, 255, 256, 257, 777]
EPS = 2.0**-24


def case(dim: int, group: int, dtype: torch.dtype, seed: int = 0):
    """Queries, and lanes with slack between them that is full of nan: what is no token must never be read into."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    starts = (lengths + 5).cumsum(0) - lengths - 5
    capacity = int((lengths + 5).sum())
    keys, values = (torch.full((capacity, dim), torch.nan, dtype=dtype) for _ in range(2))
    for start, length in zip(starts.tolist(), LENGTHS, strict=True):
        for buffer in (keys, values):
            buffer[start : start + length] = torch.randn(length, dim, generator=g).to(dtype)
    queries = torch.randn(len(LENGTHS), group, dim, generator=g).to(dtype)
    bias = torch.randn(capacity, generator=g)
    return queries, keys, values, starts, lengths, bias


def reference(queries, keys, values, starts, lengths, scaling, bias=None):
    """Attention by its definition, one lane and one query at a time, in float64."""
    out = torch.zeros(*queries.shape[:2], values.shape[1], dtype=torch.float64)
    lse = torch.zeros(queries.shape[:2], dtype=torch.float64)
    for lane, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        part = slice(start, start + length)
        for g in range(queries.shape[1]):
            logits = keys[part].double() @ queries[lane, g].double() * scaling
            if bias is not None:
                logits = logits + bias[part].double()
            out[lane, g] = logits.softmax(0) @ values[part].double()
            lse[lane, g] = logits.logsumexp(0)
    return out, lse


def bound(queries, dim: int, scaling: float) -> float:
    """A logit is off by at most D ε |q||k| s (norms of these normal tensors stay below 2 sqrt(D)); exp and sums add
    2 + n ε each; the output is a weighted mean of values below 6."""
    logit = dim * EPS * 4 * dim * scaling
    return 6 * (2 * logit + (4 + max(LENGTHS) / 16) * 2 * EPS)
