"""A prompt's beginning, computed once and read by many forwards: a transformers cache that nobody writes to."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def holds_keys_only(cache: DynamicCache, layers: int) -> bool:
    """Whether so many layers hold keys and values, and none of them a recurrent state, which `read_only` would lose."""
    kinds = [type(layer) for layer in cache.layers]
    return len(kinds) == layers and set(kinds) <= {DynamicLayer, DynamicSlidingWindowLayer}


def read_only(cache: DynamicCache) -> DynamicCache:
    """The same cache, whose layers from now on hand out old and new tokens together and keep the old ones alone.

    What is held has one row; a batch of any size reads it.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.update = partial(_both, layer.keys, layer.values)
    return cache


def _both(
    old_keys: Tensor, old_values: Tensor, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Stands in for the layer's own `update`."""
    rows = len(keys)
    return (
        torch.cat([old_keys.expand(rows, -1, -1, -1), keys], dim=-2),
        torch.cat([old_values.expand(rows, -1, -1, -1), values], dim=-2),
    )
