"""Group reduction and pooling along the sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.errors import require

Reduce = Literal["mean", "max", "sum"]


def over_group(x: Tensor, kv_heads: int, how: Reduce = "mean") -> Tensor:
    """Reduce the query heads of each KV head: (B, Hq, N) → (B, H, N); query head h belongs to KV head h // G."""
    grouped = x.unflatten(1, (kv_heads, -1))
    if how == "mean":
        return grouped.mean(2)
    return grouped.sum(2) if how == "sum" else grouped.amax(2)


def check_window(window: int, kernel_size: int) -> None:
    """Refuse what is no number of rows that vote, or no width to pool their votes by.

    Raises:
        InvalidInputError: no rows, or a width that has no middle.
    """
    require(window >= 1, "window", window, "a number of rows >= 1")
    require(kernel_size >= 1 and kernel_size % 2 == 1, "kernel_size", kernel_size, "an odd number >= 1")


def pool_tokens(scores: Tensor, valid: Tensor, kernel_size: int, how: Literal["avg", "max"]) -> Tensor:
    """Smooth scores over neighbouring tokens, so that what surrounds an important token stays too.

    Pads and the borders are left out of the window: an average is over the tokens that are there, so a constant
    stays constant up to the ends (dividing by the full kernel would scale the first token, the sink, to 0.6).

    Args:
        scores: (B, H, N). valid: (B, H, N). kernel_size: odd; 1 changes nothing.
    """
    if kernel_size == 1:
        return scores
    half = kernel_size // 2
    if how == "max":
        low = torch.finfo(scores.dtype).min
        return F.max_pool1d(scores.masked_fill(~valid, low), kernel_size, 1, half).masked_fill(~valid, 0.0)
    weight = valid.to(scores.dtype)
    total = F.avg_pool1d(scores * weight, kernel_size, 1, half)
    count = F.avg_pool1d(weight, kernel_size, 1, half)
    return (total / count.clamp_min(1e-9)).masked_fill(~valid, 0.0)
