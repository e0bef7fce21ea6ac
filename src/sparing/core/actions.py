"""Actions: what becomes of the tokens that are not kept. The default drops them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparing.core.scorer import KeyValues


@dataclass(frozen=True)
class Folded:
    """What is stored after an action.

    Attributes:
        kept: [row][kv_head] → sorted slots that are stored, those that an action has written included.
        keys, values: (B, H, N, D), (B, H, N, Dv); only kept slots matter.
        bias: (B, H, N) float32 to be added to a token's attention logits; None for 0.
        positions: (B, H, N) int64 positions in the sequence.
    """

    kept: list[list[Tensor]]
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    positions: Tensor


class Action:
    """Base of all actions, and the plainest: what is not kept is gone.

    Class attributes:
        reserve: tokens that the action stores beside the kept ones in every head that loses any; they are part of
            the budget.
        is_exact: True if what is stored is a subset of the tokens, unchanged.
        needs_rotary: True if the model's rotary embedding must be invertible.
    """

    reserve: ClassVar[int] = 0
    is_exact: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = False

    def apply(self, kept: list[list[Tensor]], stored: KeyValues, scores: Tensor) -> Folded:
        """What to store.

        Args:
            kept: [row][kv_head] → sorted slots that the budget allows, `reserve` fewer in heads that lose any.
            stored: everything that there is; must not be changed. scores: (B, H, N) float32, the method's.
        """
        return Folded(kept, stored.keys, stored.values, stored.bias, stored.positions)


@dataclass(frozen=True)
class Drop(Action):
    """What is not kept is gone."""
