"""DeltaLLM: old keys as sums of thresholded differences (Qi et al. 2025, arXiv:2507.19608).

Ranks: kv_token by recency. The newest tokens keep their keys; of the others, keys are what a chain of sparse
differences gives back:

    r_0 = k_0,   r_j = r_{j-1} + d_j,   d_j = k_j − r_{j-1} where that is at least θ in absolute value, else 0

θ ↔ theta. So |r_j − k_j| < θ in every number, θ = 0 changes nothing, and errors don't add up. Values stay as they are.
`keep` is the share of tokens (their number, their bytes) in the window.

This simulates what hardware that skips zeros would compute: **nothing is freed**, all tokens stay and are read. The
report says what share of the differences is zero. Cost: one pass over the keys at the end of each prompt.

Deviations:
1. How the paper weighs accuracy and memory in choosing its thresholds is not known here: there is one θ.
2. Differences are of keys as cached, rotated, per KV head. The prompt itself is read with its own keys; what comes
   after it sees the reconstructed ones. Decoded tokens keep their keys until the next turn's end.
3. What a turn has reconstructed stays; doing so again changes nothing, and the chain goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.actions import Action, Folded
from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues
from sparing.errors import require
from sparing.methods.kv.streaming_llm import Recency


def reconstructed(keys: Tensor, valid: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Keys (B, H, N, D) from thresholded differences, and (B, H, N, D) bool where a difference is left out."""
    held = torch.zeros_like(keys[:, :, 0])
    begun = torch.zeros_like(valid[:, :, :1])
    result, skipped = torch.empty_like(keys), torch.empty_like(keys, dtype=torch.bool)
    for slot in range(keys.shape[2]):
        key, real = keys[:, :, slot], valid[:, :, slot, None]
        changes = ((key - held).abs() >= theta) | ~begun
        held = torch.where(changes & real, key, held)
        result[:, :, slot] = torch.where(real, held, key)
        skipped[:, :, slot] = ~changes & real
        begun |= real
    return result, skipped


@dataclass(frozen=True)
class Differences(Action):
    """What is not kept stays, with keys from thresholded differences.

    Attributes:
        theta: smaller differences are left out.
    """

    theta: float = 0.1

    is_exact: ClassVar[bool] = False
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 <= self.theta < float("inf"), "theta", self.theta, "a finite number >= 0")

    def apply(self, kept: list[list[Tensor]], stored: KeyValues, scores: Tensor) -> Folded:
        """See `Action.apply`."""
        keys, skipped = reconstructed(stored.keys, stored.valid, self.theta)
        everything = [[head.nonzero().squeeze(-1) for head in row] for row in stored.valid]
        exact = torch.zeros_like(stored.valid)
        for row, heads in enumerate(kept):
            for head, slots in enumerate(heads):
                exact[row, head, slots] = True
        outside = (stored.valid & ~exact)[..., None]
        numbers = int(stored.valid.sum()) * stored.keys.shape[-1]
        keys = torch.where(outside, keys, stored.keys)
        zeros = (int((skipped & outside).sum()), numbers)
        return Folded(everything, keys, stored.values, stored.bias, stored.positions, zeros)


@register("deltallm", paper="2507.19608", summary="old keys from thresholded differences, simulated; frees no memory")
@dataclass(frozen=True)
class DeltaLLM(Method):
    """Sparse differences of keys outside a recent window.

    Attributes:
        theta: differences below are left out (0.1).
    """

    theta: float = 0.1

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(Recency(0), Uniform(), action=Differences(self.theta))
