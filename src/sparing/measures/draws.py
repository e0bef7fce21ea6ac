"""Random numbers that belong to a token, not to the call that asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.scorer import KeyValues


def uniform(stored: KeyValues, seed: int) -> Tensor:
    """(B, H, N) float32 numbers in [0, 1), drawn for layer, KV head and position in the token's own sequence.

    So a row of a batch, or the same prompt in chunks, draws the same numbers.
    """
    positions = stored.true_positions
    heads, length = positions.shape[1], int(positions.max()) + 1
    generator = torch.Generator().manual_seed(seed * 1_000_003 + stored.layer)
    # Positions come first, so a longer prompt draws the same numbers for its beginning.
    table = torch.rand(length, heads, generator=generator).T.to(positions.device)
    return table.expand(positions.shape[0], -1, -1).gather(-1, positions)
