"""Geometry of keys and values (primitive P4): norms, the mean direction, leverage."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_direction(keys: Tensor, valid: Tensor) -> Tensor:
    """The mean of the unit keys: a = mean over valid j of k_j / ||k_j||.

    Args:
        keys: (B, H, N, D). valid: (B, H, N).

    Returns:
        (B, H, D) float32.
    """
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    weight = valid.float()[..., None]
    return (unit * weight).sum(2) / weight.sum(2).clamp_min(1.0)


def centred(x: Tensor, valid: Tensor) -> Tensor:
    """x minus its mean over the valid tokens, 0 where not valid; (B, H, N, D) float32."""
    weight = valid.float()[..., None]
    mean = (x.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1.0)
    return (x.float() - mean) * weight


def leverage(x: Tensor, jitter: float) -> Tensor:
    """Statistical leverage of every row: l_j = x_j^T (X^T X + jitter * I)^-1 x_j, in [0, 1].

    Args:
        x: (B, H, N, K); rows of pads must be 0.
        jitter: added to the diagonal, in the units of X^T X.

    Returns:
        (B, H, N) float32.
    """
    x = x.float()
    gram = x.transpose(-1, -2) @ x
    eye = torch.eye(gram.shape[-1], device=x.device)
    factor = torch.linalg.cholesky(gram + jitter * eye)
    whitened = torch.linalg.solve_triangular(factor, x.transpose(-1, -2), upper=False)
    return whitened.square().sum(-2)
