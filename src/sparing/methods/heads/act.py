"""ACT: take attention from hidden sinks and give it to the rest (Yu et al. 2024, "Unveiling and Harnessing Hidden
Attention Sinks", ICML 2024).

Acts on: heads, in their attention over a whole prompt. With A one head's map over T tokens:

    r_j = Σ_{i >= j} A_ij / (T - j);   sinks S = { j > 0 : r_j > θ }
    A'_ij = β A_ij for j in S;   A'_ij = A_ij + f_i A_ij / Σ_{k not in S} A_ik otherwise,  f_i = (1 - β) Σ_{j in S} A_ij

Rows still sum to what they did. β ↔ beta = 0.4, θ ↔ theta = 0.1.
Cost: two passes over the rows of the layers that have such heads, in tiles.

Deviations:
1. The first token is spared because it is the first; the authors' code spares the first sink that it finds.
2. Row 0 sees only itself and stays as it is by the formula; the authors set it by hand.
3. A later, single token (decoding) is not edited: sinks are found over a prompt.
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
class RedistributeSinks(HeadEdit):
    """Scale hidden sinks by β and spread what becomes free.

    Attributes:
        pairs: the (layer, head) pairs. beta: what sinks keep, in [0, 1]; 1 changes nothing.
        theta: mean attention from which a token is a sink.
    """

    at = "attention"
    pairs: tuple[Head, ...]
    beta: float = 0.4
    theta: float = 0.1

    def __post_init__(self) -> None:
        require(bool(self.pairs), "pairs", self.pairs, "at least one (layer, head)")
        require(0 <= self.beta <= 1, "beta", self.beta, "a share in [0, 1]")
        require(0 < self.theta < 1, "theta", self.theta, "a share in (0, 1)")

    def touched(self) -> Sequence[Head]:
        """See `HeadEdit.touched`."""
        return self.pairs

    def attention(self, call: AttentionCall, attend: Attend) -> Tensor:
        """See `HeadEdit.attention`."""
        out = attend(call)
        mine = [head for layer, head in self.pairs if layer == call.layer]
        if not mine or call.queries.shape[2] == 1 or self.beta == 1.0:
            return out
        is_sink = self._sinks(call)[:, mine]
        group = call.queries.shape[1] // call.values.shape[1]
        new = out.clone()
        values = call.values[:, [head // group for head in mine]]
        for rows, attention in row_tiles(call):
            edited = self.redistributed(attention[:, mine], is_sink)
            new[:, rows, mine] = (edited @ values.to(edited)).transpose(1, 2).to(out.dtype)
        return new

    def redistributed(self, attention: Tensor, is_sink: Tensor) -> Tensor:
        """(B, heads, rows, S) rows after the edit, given (B, heads, S) sinks."""
        at = is_sink[:, :, None]
        on_sinks = attention.where(at, 0.0)
        freed = (1 - self.beta) * on_sinks.sum(-1, keepdim=True)
        others = attention.where(~at, 0.0)
        rest = others.sum(-1, keepdim=True)
        # A row that sees sinks only has nowhere to put what becomes free, and stays as it is.
        spread = others * (1 + freed / rest.clamp_min(torch.finfo(rest.dtype).tiny))
        return torch.where(rest > 0, self.beta * on_sinks + spread, attention)

    def _sinks(self, call: AttentionCall) -> Tensor:
        """(B, Hq, S) bool."""
        received: Tensor | None = None
        viewers: Tensor | None = None
        for rows, attention in row_tiles(call):
            seen = call.may_see(rows)[:, 0].sum(1)
            received = attention.sum(2) if received is None else received + attention.sum(2)
            viewers = seen if viewers is None else viewers + seen
        assert received is not None
        assert viewers is not None
        first = call.starts().to(received.device)
        sinks = received / viewers.clamp_min(1)[:, None] > self.theta
        start = torch.arange(sinks.shape[-1], device=sinks.device) <= first[:, None]
        return sinks & ~start[:, None]
