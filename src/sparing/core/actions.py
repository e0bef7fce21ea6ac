"""Actions: what becomes of the tokens that are not kept. The default drops them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.scorer import KeyValues, Rotary


@dataclass(frozen=True)
class Folded:
    """What is stored after an action.

    Attributes:
        kept: [row][kv_head] → sorted slots that are stored, those that an action has written included.
        keys, values: (B, H, N, D), (B, H, N, Dv); only kept slots matter.
        bias: (B, H, N) float32 to be added to a token's attention logits; None for 0.
        positions: (B, H, N) int64 positions in the sequence.
        zeros: (zeros, all) numbers in what a sparse store would hold, of actions that only simulate one.
    """

    kept: list[list[Tensor]]
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    positions: Tensor
    zeros: tuple[int, int] = (0, 0)


class Action:
    """Base of all actions, and the plainest: what is not kept is gone.

    Class attributes:
        reserve: tokens that the action stores beside the kept ones in every head that loses any; they are part of
            the budget.
        drops: True if tokens go away; else all stay, in whatever form, and nothing is freed.
        is_exact: True if what is stored is a subset of the tokens, unchanged.
        counts_all: True if every dropped token is counted in the bias of a stored one, so that exp(bias) sums to all.
        needs_rotary: True if the model's rotary embedding must be invertible.
    """

    reserve: ClassVar[int] = 0
    drops: ClassVar[bool] = True
    is_exact: ClassVar[bool] = True
    counts_all: ClassVar[bool] = False
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


@dataclass(frozen=True)
class Rerotate(Action):
    """The kept keys close ranks: they are turned to consecutive positions that end at the newest token's.

    A key moves up by the number of tokens that were dropped behind it. So it lies as far from the queries to come as
    if the dropped tokens had never been, distances never exceed what is stored, and the model can go on beyond the
    positions that it was trained for. Nothing has to be remembered: in a lane of n tokens, slot i stands at position
    seen - n + i, and decoded tokens go on from there.

    `positions` remain those in the sequence. Scorers that turn stored keys back by them are refused.
    """

    is_exact: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True

    def apply(self, kept: list[list[Tensor]], stored: KeyValues, scores: Tensor) -> Folded:
        """See `Action.apply`."""
        return self.place(kept, stored, _from_the_newest(stored, stored.valid))

    def place(self, kept: list[list[Tensor]], stored: KeyValues, at: Tensor) -> Folded:
        """Turn the kept keys from the positions `at` (B, H, N) to those at the end of the sequence."""
        assert stored.rotary is not None
        stays = torch.zeros_like(stored.valid)
        for row, heads in enumerate(kept):
            for head, slots in enumerate(heads):
                stays[row, head, slots] = True
        steps = (_from_the_newest(stored, stays) - at).masked_fill(~stays, 0)
        keys = turn(stored.keys, steps, stored.rotary)
        return Folded(kept, keys, stored.values, stored.bias, stored.positions)


def _from_the_newest(stored: KeyValues, there: Tensor) -> Tensor:
    """(B, H, N) consecutive positions of the tokens that are there, so that the last stands where the newest is."""
    newest = stored.positions.masked_fill(~stored.valid, -1).amax(-1, keepdim=True)
    return newest + 1 - there.flip(-1).cumsum(-1).flip(-1)


def turn(keys: Tensor, steps: Tensor, rotary: Rotary) -> Tensor:
    """Rotated keys, moved by so many positions.

    Args:
        keys: (B, H, N, D). steps: (B, H, N) int64; keys that move by 0 are returned bit for bit.
    """
    flat = keys.flatten(0, 1)[:, None]
    moves = steps.flatten(0, 1)
    # To the position `steps`, and back from position 0, which takes the embedding's scale off again.
    turned = rotary.unrotate(rotary.rotate(flat, moves), torch.zeros_like(moves))
    return torch.where(steps[..., None] == 0, keys, turned.view_as(keys).to(keys.dtype))
