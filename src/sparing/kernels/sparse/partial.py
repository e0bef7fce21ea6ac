"""Attention over a part of the keys, with the log-sum-exp that lets parts be merged into one exact result."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.pattern import Partial
from sparing.core.scorer import Softmax


def attend_part(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: Softmax,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Partial:
    """Attention of (n, rows, D) queries over (n, keys, D) keys of their own, n problems at once.

    Args:
        is_causal: row i sees the keys up to i. mask: (n, 1 or rows, keys) bool, True where a row reads a key; every
            row must read one.
    """
    exact = query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fast = query.device.type == "cpu" and exact and softmax.softcap is None and query.shape[-1] == values.shape[-1]
    if fast and not needs_gradients(query, keys, values):  # of the log-sum-exp it would have none
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)[:, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, None], keys[:, None], values[:, None], is_causal=is_causal, attn_mask=bias, scale=softmax.scaling
        )
        return Partial(out[:, 0], lse[:, 0].float())
    return _plain(query, keys, values, softmax, is_causal, mask)


def needs_gradients(*tensors: Tensor) -> bool:
    """True if what is computed from these is to be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _plain(
    query: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, is_causal: bool, mask: Tensor | None
) -> Partial:
    exact = query.dtype if query.dtype == torch.float64 else torch.float32
    logits = softmax.capped(query.to(exact) @ keys.to(exact).transpose(-1, -2) * softmax.scaling)
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    out = (logits - lse[..., None]).exp() @ values.to(exact)
    return Partial(out.to(query.dtype), lse)


def with_sinks(part: Partial, softmax: Softmax) -> Tensor:
    """The output once learned sink logits (Hq,) take part in the normalisation; `part` is (Hq, rows, ...)."""
    if softmax.sinks is None:
        return part.out
    share = torch.sigmoid(part.lse - softmax.sinks.to(part.lse.dtype)[:, None])
    return part.out * share[..., None].to(part.out.dtype)
