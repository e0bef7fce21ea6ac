"""Sequences of several lengths as one left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(sequences: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """(B, T) int64 token ids and (B, T) bool mask, False for pads, which stand on the left."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(list(sequence))
        mask[row, length - len(sequence) :] = True
    return ids, mask
