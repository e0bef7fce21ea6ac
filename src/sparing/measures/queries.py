"""Moments of the queries before rotation (primitive P5), gathered chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of the rows so far.

    Attributes:
        count: (B, 1, 1) rows counted. mean: (B, Hq, D). scatter: (B, Hq, D, D), the sum of (q - mean)(q - mean)^T.
            All float32.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """(B, Hq, D, D), divided by the count."""
        return self.scatter / self.count.clamp_min(1.0)[..., None]


def add_moments(state: Moments | None, queries: Tensor, counts: Tensor) -> Moments:
    """Add a chunk of queries.

    Chunks are merged by their means (Chan, Golub and LeVeque 1979): sums of squares would lose a covariance that is
    small beside the mean, which is how queries with a bias are.

    Args:
        queries: (B, Hq, Q, D). counts: (B, Q) bool, True for the rows that count.
    """
    kept = queries.float().masked_fill(~counts[:, None, :, None], 0.0)
    count = counts.sum(-1)[:, None, None].to(torch.float32)
    mean = kept.sum(2) / count.clamp_min(1.0)
    offset = (kept - mean[:, :, None]).masked_fill(~counts[:, None, :, None], 0.0)
    scatter = offset.transpose(-1, -2) @ offset
    if state is None:
        return Moments(count, mean, scatter)
    total = state.count + count
    share = count / total.clamp_min(1.0)
    step = mean - state.mean
    between = step[..., :, None] * step[..., None, :] * (state.count * share)[..., None]
    return Moments(total, state.mean + step * share, state.scatter + scatter + between)
