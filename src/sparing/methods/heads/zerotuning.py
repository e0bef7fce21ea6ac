"""ZeroTuning: turn the attention to the first token up or down (Han et al. 2025, arXiv:2505.11739).

Acts on: heads, in their attention. With a_i a row's weights and 0 the first token that is no pad:

    a'_0 = γ a_0 / (γ a_0 + Σ_{i>0} a_i),   a'_i = a_i / (the same)

which is adding ln γ to the first token's logit. As a_0 and the output are all it takes, no map is built:

    out' = (out + (γ - 1) a_0 v_0) / (1 + (γ - 1) a_0)

The authors report that γ > 1 tends to help classification and γ < 1 question answering.
Cost: a_0 of each row of the layers that have such heads, in tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.edits import Head, HeadEdit
from sparing.core.lens import Attend, AttentionCall
from sparing.errors import require
from sparing.measures.attention import row_tiles


@dataclass(frozen=True)
class BiasFirstToken(HeadEdit):
    """Multiply the weight of the first token by γ and renormalise.

    Attributes:
        pairs: the (layer, head) pairs. gamma: γ > 0; 1 changes nothing.
    """

    at = "attention"
    pairs: tuple[Head, ...]
    gamma: float = 1.5

    def __post_init__(self) -> None:
        require(bool(self.pairs), "pairs", self.pairs, "at least one (layer, head)")
        require(0 < self.gamma < float("inf"), "gamma", self.gamma, "a finite number above 0")

    def touched(self) -> Sequence[Head]:
        """See `HeadEdit.touched`."""
        return self.pairs

    def attention(self, call: AttentionCall, attend: Attend) -> Tensor:
        """See `HeadEdit.attention`."""
        out = attend(call)
        mine = [head for layer, head in self.pairs if layer == call.layer]
        if not mine or self.gamma == 1.0:
            return out
        starts = call.starts().to(out.device).expand(out.shape[0])
        first = starts.clamp_min(0)
        paid = torch.cat([_weight_of(attention, first) for _, attention in row_tiles(call)], dim=-1)  # (B, Hq, T)
        # Where a sliding window hides the first token a_0 is 0 and nothing changes; so it is where it was dropped.
        paid = paid * (starts >= 0)[:, None, None]
        extra = (self.gamma - 1) * paid.transpose(1, 2)[..., None]
        group = call.queries.shape[1] // call.values.shape[1]
        value = call.values[torch.arange(len(first)), :, first].repeat_interleave(group, dim=1)[:, None]
        edited = (out + extra * value) / (1 + extra)
        new = out.clone()
        new[:, :, mine] = edited[:, :, mine].to(out.dtype)
        return new


def _weight_of(attention: Tensor, first: Tensor) -> Tensor:
    """(B, Hq, rows) attention to the given key of each sequence."""
    places = first.view(-1, 1, 1, 1).expand(-1, *attention.shape[1:3], 1)
    return attention.gather(-1, places).squeeze(-1)
