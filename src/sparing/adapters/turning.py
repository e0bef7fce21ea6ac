"""Keys as they were cached, of tokens that an action has turned to other positions.

Turning a key rounds it. In half precision the errors of thousands of turns add up, and steps of one position are lost
altogether, so a cache that turns keys again and again keeps the originals of those and turns them from there. Turned
are the tokens before the last gap of a lane, so they are its first: for StreamingLLM the sinks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparing.core.actions import Folded, Rerotate
from sparing.core.scorer import KeyValues


@dataclass(frozen=True)
class Originals:
    """The originals of a layer. `lanes`: (n, D) for the first n tokens of every lane, n may be 0."""

    lanes: tuple[Tensor, ...]

    def turned(self, action: Rerotate, kept: list[list[Tensor]], stored: KeyValues) -> tuple[Folded, Originals]:
        """What the action leaves, with every key turned once, and the originals of what it leaves."""
        keys, (rows, heads) = stored.keys.clone(), stored.keys.shape[:2]
        for lane, originals in enumerate(self.lanes):
            row, head = divmod(lane, heads)
            first = stored.valid[row, head].nonzero().squeeze(-1)[: len(originals)]
            keys[row, head, first] = originals
        folded = action.place(kept, replace(stored, keys=keys), stored.positions)
        left = []
        for row in range(rows):
            for head, slots in enumerate(kept[row]):
                count = len(slots)
                newest = stored.positions[row, head][stored.valid[row, head]].max()
                last = torch.arange(count, device=slots.device) + newest.to(slots.device) - count + 1
                moved = slots[stored.positions[row, head].to(slots.device)[slots] != last]
                left.append(keys[row, head, moved.to(keys.device)])
        return folded, Originals(tuple(left))

    def rows(self, rows: list[int], heads: int) -> Originals:
        """Those of the given sequences."""
        return Originals(tuple(self.lanes[row * heads + head] for row in rows for head in range(heads)))
