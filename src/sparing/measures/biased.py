"""Attention over a few keys of one's own, with a number added to their logits, and its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.pattern import Partial
from sparing.core.scorer import Softmax

# Logits that are held at a time.
HELD = 2**24


def attend_biased(query: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, bias: Tensor) -> Partial:
    """Attention of (..., R, D) queries over (..., K, D) keys, in float32 or, if the query is that, float64.

    Args:
        bias: (..., K) added to the logits of all rows; -inf for keys that are not there, of which one must be.
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values, bias = keys.to(exact), values.to(exact), bias.to(exact)[..., None, :]
    rows = max(HELD // (keys.numel() // keys.shape[-1]), 1)
    outs, sums = [], []
    for some in query.split(rows, dim=-2):
        logits = softmax.capped(some.to(exact) @ keys.mT * softmax.scaling) + bias
        lse = logits.logsumexp(-1)
        outs.append(((logits - lse[..., None]).exp_() @ values).to(query.dtype))
        sums.append(lse)
    return Partial(torch.cat(outs, dim=-2), torch.cat(sums, dim=-1))
