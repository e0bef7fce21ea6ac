"""Moments of the queries before rotation (primitive P5), gathered chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums from which mean and covariance follow.

    Attributes:
        count: (B, 1, 1) rows counted. total: (B, Hq, D). outer: (B, Hq, D, D). All float32.
    """

    count: Tensor
    total: Tensor
    outer: Tensor

    @property
    def mean(self) -> Tensor:
        """(B, Hq, D)."""
        return self.total / self.count.clamp_min(1.0)

    @property
    def covariance(self) -> Tensor:
        """(B, Hq, D, D), divided by the count."""
        mean = self.mean
        second = self.outer / self.count.clamp_min(1.0)[..., None]
        return second - mean[..., :, None] * mean[..., None, :]


def add_moments(state: Moments | None, queries: Tensor, weight: Tensor) -> Moments:
    """Add a chunk of queries.

    Args:
        queries: (B, Hq, Q, D). weight: (B, Q), 1 for rows that count and 0 for the others.
    """
    weight = weight.to(torch.float32)
    weighted = queries.float() * weight[:, None, :, None]
    new = Moments(weight.sum(-1)[:, None, None], weighted.sum(2), weighted.transpose(-1, -2) @ queries.float())
    if state is None:
        return new
    return Moments(state.count + new.count, state.total + new.total, state.outer + new.outer)
