"""Readers: everything stays stored, and every decoded token reads a part of it.

They save the time of reading, not memory. A prompt is read densely, in however many chunks; tokens after it read a part
each, one after another, also where several come at once (a question to a context that was read before, drafts).

A reader is a frozen dataclass; what it knows of a layer (page bounds, the last row of attention) is a state that it
builds from the prompt and the stored tokens, and extends token by token.

Shape legend: B rows, Hq query heads, H KV heads, G = Hq / H, N stored tokens, D head size, k tokens read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.scorer import KeyValues, Queries, Scorer, Softmax


@dataclass(frozen=True)
class Step:
    """One decoded token, as a reader sees it.

    Attributes:
        query: (B, Hq, D), rotated as the model does.
        stored: all tokens, the new one last; views, not to be changed. Pads are not valid.
        softmax: how the model turns logits into attention.
        counts: (B, H) int64, tokens that each KV head may read.
    """

    query: Tensor
    stored: KeyValues
    softmax: Softmax
    counts: Tensor

    @property
    def reads_all(self) -> bool:
        """True if there is nothing to choose."""
        tokens = self.stored.keys.shape[2] - self.stored.pads
        return bool((self.counts >= tokens[:, None]).all())


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

    A state is None, or a dict or tuple of tensors whose first axis is the row. It may be changed in place. None means
    that nothing is known, which every reader copes with.

    Class attributes:
        needs_rotary: True if the model's rotary embedding must be invertible for this reader.
    """

    needs_rotary: ClassVar[bool] = False

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """Watch one chunk of a prompt, as `Scorer.observe` does; a later turn begins with the state of decoding."""
        return None

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """(B, H, N) float32 scores at the prompt's end, for the allocator only; by default all alike."""
        return torch.zeros(stored.keys.shape[:3], device=stored.keys.device)

    def begin(self, state: Any, stored: KeyValues) -> Any:
        """The state at the prompt's end, for readers that prepare what they know of the stored tokens."""
        return state

    def choose(self, state: Any, step: Step) -> tuple[Any, Choice]:
        """The new state, and what this token reads."""
        raise NotImplementedError

    def crop(self, state: Any, tokens: int) -> Any:
        """What is still known once only the first `tokens` are left, pads included; by default nothing."""
        return None


@dataclass(frozen=True)
class Watching(Scorer):
    """Lets a reader watch the prompt, in the place of a scorer.

    Attributes:
        reader: the reader.
    """

    reader: Reader

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs_rotary", self.reader.needs_rotary)

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """See `Scorer.observe`."""
        return self.reader.observe(state, queries, stored)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        return self.reader.score(state, stored)


def best_blocks(scores: Tensor, size: int, step: Step) -> Choice:
    """The tokens of the best blocks, exactly as many as may be read.

    Block b holds the real tokens b * size to b * size + size - 1 of a row; the last block may be shorter. Of the block
    that exceeds the count, the newest tokens are read.

    Args:
        scores: (B, H, blocks) for all blocks that any row has; ties go to the earlier block.
    """
    stored, device = step.stored, scores.device
    slots_held, blocks = stored.keys.shape[2], scores.shape[-1]
    pads, counts = stored.pads.to(device), step.counts.to(device)
    lengths = (slots_held - pads[:, None] - torch.arange(blocks, device=device) * size).clamp(0, size)
    lengths = lengths[:, None].expand_as(scores)
    order = torch.sort(scores.masked_fill(lengths == 0, -torch.inf), dim=-1, descending=True, stable=True).indices
    top = order[..., : int(counts.max()) // size + 2]  # one block may be shorter, one may be cut
    length = lengths.gather(-1, top)
    before = length.cumsum(-1) - length
    top, place = top.sort(-1)
    length, before = length.gather(-1, place), before.gather(-1, place)
    taken = (counts[..., None] - before).clamp_min(0).minimum(length)
    inside = torch.arange(size, device=device)
    valid = (inside >= (length - taken)[..., None]) & (inside < length[..., None])
    slots = pads[:, None, None, None] + top[..., None] * size + inside
    return Choice(slots.clamp_max(slots_held - 1).flatten(2), valid.flatten(2))


def with_ends(scores: Tensor, size: int, stored: KeyValues) -> Tensor:
    """Scores (B, H, blocks) with the newest block, the first and the last full one above all others, in this order.

    Args:
        scores: of the first blocks, any number of them.
    """
    blocks, full = num_blocks(stored, size), (stored.keys.shape[2] - stored.pads) // size
    scores = F.pad(scores, (0, max(int(blocks.max()) - scores.shape[2], 0)))
    number, most = torch.arange(scores.shape[2], device=scores.device), torch.finfo(scores.dtype).max
    for which, value in ((full - 1, most / 2), (torch.zeros_like(full), most), (blocks - 1, torch.inf)):
        scores = torch.where((number == which.to(scores.device)[:, None])[:, None], value, scores)
    return scores


def num_blocks(stored: KeyValues, size: int) -> Tensor:
    """(B,) int64: blocks of every row, an unfinished last one included."""
    return (stored.keys.shape[2] - stored.pads + size - 1) // size


def until(stored: KeyValues, tokens: int) -> KeyValues:
    """The first tokens of what is stored, pads included; views."""
    part = slice(None, tokens)
    return replace(
        stored, keys=stored.keys[:, :, part], values=stored.values[:, :, part], valid=stored.valid[:, :, part],
        positions=stored.positions[:, :, part],
    )  # fmt: skip
