"""DuoAttention: some heads keep everything, the others stream (Xiao et al. 2024, arXiv:2410.10819).

Ranks: KV head, by gates that were learned beforehand (`sparing calibrate --method duo`, see `methods/heads/duo.py`); in
streaming heads kv_token, by position.

    heads by gate a_h, largest first:   full while all others still get sinks + recent tokens
    other heads:                        the first `sinks` tokens, and the newest in equal parts of the rest
    sinks, recent ↔ the paper's sink and recent sizes; keep ↔ 1 - sparsity, the share of full heads, for long contexts

Cost: nothing to compute; the measurement once per model.

Deviations:
1. The authors fix the share of full heads (0.5 with grouped queries) and the streaming window (64 + 256). Here `keep`
   is the whole budget: as many heads are full as fit, and what is left over makes the streaming windows longer.
2. 16 + 64 tokens at least, what the gates are learned with by default, so that short contexts can have full heads too.
3. Equal gates go by lower index; the authors add noise.
4. The prompt is attended in full and evicted at its end; what is decoded stays until the next turn has been read.
5. Any measurement of query or KV heads is taken in place of gates; of query heads, the best of a KV head counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sparing.core.allocate_heads import FullHeads
from sparing.core.measured import MeasuredMethod
from sparing.core.method import Parts, register
from sparing.errors import require
from sparing.methods.kv.streaming_llm import Recency


@register("duo", paper="2410.10819", summary="everything in heads with open gates, sinks and recent tokens in others",
          training_free=False, needs=("duo",))  # fmt: skip
@dataclass(frozen=True)
class DuoAttention(MeasuredMethod):
    """Full and streaming heads, by learned gates.

    Attributes:
        scores: the gates, as `sparing.score(model, "duo", tokenizer)` measures them.
        sinks: first tokens that every head keeps. recent: newest tokens that it keeps at least.
    """

    sinks: int = 16
    recent: int = 64

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")
        require(self.recent >= 0, "recent", self.recent, "a number of tokens >= 0")
        super().__post_init__()

    @cached_property
    def _parts(self) -> Parts:
        return Parts(Recency(self.sinks), FullHeads(self.per_kv_head("duo", "max"), self.sinks + self.recent))

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return self._parts
