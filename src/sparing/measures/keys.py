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
    return _mean(unit, valid)[:, :, 0]


def centred(x: Tensor, valid: Tensor) -> Tensor:
    """x minus its mean over the valid tokens, 0 where not valid; (B, H, N, D) float32."""
    return (x.float() - _mean(x.float(), valid)).masked_fill(~valid[..., None], 0.0)


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """(B, H, 1, D) mean over the valid tokens; 0 if there are none. What is not valid may hold anything."""
    total = x.masked_fill(~valid[..., None], 0.0).sum(2, keepdim=True)
    return total / valid.sum(-1)[..., None, None].clamp_min(1)


def leverage(x: Tensor, jitter: float) -> Tensor:
    """Statistical leverage of every row: l_j = x_j^T (X^T X + jitter * I)^-1 x_j, in [0, 1].

    In float64 and by eigenvectors, since X^T X is singular where there are fewer rows than columns, and float32
    loses a small jitter beside large keys. Without jitter, directions that no row has are left out
    (pseudo-inverse), and the scores sum to the rank of X.

    Args:
        x: (B, H, N, K); rows of pads must be 0.
        jitter: added to the diagonal, in the units of X^T X.

    Returns:
        (B, H, N) float32.
    """
    wide = x.double()
    strength, directions = torch.linalg.eigh(wide.transpose(-1, -2) @ wide)
    rounding = x.shape[-1] * torch.finfo(torch.float64).eps * strength[..., -1:]
    weight = torch.where(strength > rounding, 1.0 / (strength + jitter), 0.0)
    return ((wide @ directions).square() @ weight[..., None])[..., 0].float()
