"""Heads made uniform: every visible key gets the same weight, whatever the query says.

This is what masking a retrieval head by zeroing its query amounts to (Wu et al. 2024, arXiv:2404.15574), and how
AttentionInfluence weakens its reference model (Hua et al. 2025, arXiv:2505.07293). The head goes on writing the mean
of what it sees.

    A'[h, t, s] = 1 / |visible(t)|,   z'[h, t] = mean over visible s of v_s

Cost: prefix sums of the values, O(n d); the other heads stay in the model's own attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparing.core.edits import Head, HeadEdit
from sparing.core.lens import Attend, AttentionCall
from sparing.errors import require
from sparing.measures.uniform import uniform_attention


@dataclass(frozen=True)
class UniformHeads(HeadEdit):
    """Make heads attend to all they may see alike.

    Attributes:
        pairs: the (layer, head) pairs.
    """

    at = "attention"
    pairs: tuple[Head, ...]

    def __post_init__(self) -> None:
        require(bool(self.pairs), "pairs", self.pairs, "at least one (layer, head)")

    def touched(self) -> Sequence[Head]:
        """See `HeadEdit.touched`."""
        return self.pairs

    def attention(self, call: AttentionCall, attend: Attend) -> Tensor:
        """See `HeadEdit.attention`."""
        out = attend(call)
        mine = [head for layer, head in self.pairs if layer == call.layer]
        if not mine:
            return out
        new = out.clone()
        new[:, :, mine] = uniform_attention(call)[:, :, mine]
        return new
