"""Readers: everything stays stored, and every decoded token reads a part of it.

They save the time of reading, not memory. A reader is a frozen dataclass; what it knows of a layer (page bounds,
block means) is a state that it builds when a prompt has been read, and extends token by token.

Shape legend: B rows, Hq query heads, H KV heads, G = Hq / H, N stored tokens, D head size, k tokens read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.scorer import KeyValues, Softmax


@dataclass(frozen=True)
class Step:
    """One decoded token, as a reader sees it.

    Attributes:
        query: (B, Hq, D), rotated as the model does.
        stored: all tokens, the new one last; views, not to be changed. Pads are not valid.
        softmax: how the model turns logits into attention.
        counts: (B,) int64, tokens that each KV head may read.
        number: 0 for the first token decoded after a prompt.
    """

    query: Tensor
    stored: KeyValues
    softmax: Softmax
    counts: Tensor
    number: int


@dataclass(frozen=True)
class Choice:
    """What is read at a step.

    Attributes:
        slots: (B, H, k) int64 slots; None to read everything. valid: (B, H, k) bool, False for fillers; None: all.
        keys: (B, H, k, D) to be used instead of the stored keys of these slots, e.g. rotated to other positions.
        query: (B, Hq, D) to be used instead of the model's.
    """

    slots: Tensor | None
    valid: Tensor | None = None
    keys: Tensor | None = None
    query: Tensor | None = None


class Reader:
    """Base of all readers.

    Class attributes:
        needs_rotary: True if the model's rotary embedding must be invertible for this reader.
    """

    needs_rotary: ClassVar[bool] = False

    def begin(self, step: Step) -> Any:
        """The state after a prompt was read.

        Args:
            step: the prompt's last token; `step.stored` ends with it. If that is not known any more (beams have changed
                places), the first decoded token's query stands in.
        """
        return None

    def choose(self, state: Any, step: Step) -> tuple[Any, Choice]:
        """The new state, and what this token reads."""
        raise NotImplementedError


def best_slots(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of the best scores of every head, in order, and which of them are real.

    Args:
        scores: (B, H, N); -inf marks what must not be read. counts: (B,) how many each head of a row may read.

    Returns:
        (B, H, k) int64 and bool, k the largest count.
    """
    most = min(int(counts.max()), scores.shape[-1])
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    allowed = torch.arange(most, device=scores.device) < counts.to(scores.device)[:, None, None]
    real = (best.values[..., :most] > -torch.inf) & allowed
    slots, order = best.indices[..., :most].masked_fill(~real, scores.shape[-1]).sort(-1)
    return slots.clamp_max(scores.shape[-1] - 1), real.gather(-1, order)
