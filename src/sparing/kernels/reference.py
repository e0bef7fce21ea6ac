"""The slow, obvious reference: dense attention with the dropped keys at minus infinity, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_with_dropped_keys(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the last q of N tokens over the keys that are kept, written out head by head.

    Args:
        query: (B, Hq, q, D). keys, values: (B, H, N, D): all tokens, the last q being the queries' own.
        keep: (B, H, N) bool; dropped keys get the logit -inf. A query never sees later tokens.
        sinks: (Hq,) learned logits in the denominator.

    Returns:
        (B, Hq, q, Dv) float64.
    """
    batch, query_heads, count, _ = query.shape
    kv_heads, tokens = keys.shape[1:3]
    out = torch.zeros(batch, query_heads, count, values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            kv = h // (query_heads // kv_heads)
            for i in range(count):
                logits = keys[b, kv].double() @ query[b, h, i].double() * scaling
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                for j in range(tokens):
                    if not keep[b, kv, j] or j > tokens - count + i:
                        logits[j] = -torch.inf
                weights = torch.exp(logits - logits.max())
                total = weights.sum()
                if sinks is not None:
                    total = total + torch.exp(sinks[h].double() - logits.max())
                out[b, h, i] = (weights / total) @ values[b, kv].double()
    return out
