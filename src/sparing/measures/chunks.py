"""What a chunk of tokens is about, as a key (LongHeads)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunk_keys(mean: Tensor, local: Tensor, scaling: float) -> Tensor:
    """(..., D): attention of a chunk's mean output over its keys, which are their own values.

    Args:
        mean: (..., D) float32. local: (..., L, D) float32, keys rotated to the chunk's own positions.
    """
    return ((mean[..., None, :] @ local.mT * scaling).softmax(-1) @ local)[..., 0, :]


def mean_outputs(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """(..., Dv): the mean attention output of a chunk whose tokens all see each other: (..., L, D) each, float32."""
    batch = torch.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
    q, k, v = (x.expand(*batch, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, scale=scaling).mean(-2).view(*batch, -1)
