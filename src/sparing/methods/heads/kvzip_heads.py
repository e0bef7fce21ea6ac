"""Which KV heads a model needs to repeat its context: KVzip's scores of heads (Kim et al. 2025, arXiv:2505.23416).

Ranks: KV head. The text is read and then read once more, as KVzip does to score tokens (see `methods.kv.kvzip`); a
head matters as much as the token that it looks at most. Heads that score high need everything, the others live with
sinks and near tokens, as in DuoAttention, and without an optimisation:

    s[h] = max over tokens j, replay rows i and the group of  softmax_j( q_i · k_j over [sinks | chunk | replay] )
    chunk, sinks, overlap ↔ as for tokens;  reduce ↔ max over tokens (the paper's), or their mean

Cost: one forward over text and replay per chunk of a sample.

Deviations:
1. The mean over samples; the paper measures on one long text.
2. The replay begins without an instruction (see `methods.kv.kvzip`).
3. Each chunk's pass is read together with the text instead of from a cache, which gives the same attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.errors import require
from sparing.measures.attention import row_tiles


@register_scorer("kvzip_heads", family="retrieval", data="text", paper="2505.23416", axes=("layer", "kv_head"),
                 summary="how much a KV head looks back when the model repeats its context")  # fmt: skip
@dataclass(frozen=True)
class KVzipHeads(MeanScorer):
    """KVzip's head scores.

    Attributes:
        chunk: tokens replayed at a time. sinks: first tokens, which every chunk may attend to, and which do not count.
        overlap: tokens of the chunk before that stand in front of a later one.
        reduce: "max" or "mean" over a head's tokens.
    """

    chunk: int = 2048
    sinks: int = 4
    overlap: int = 8
    reduce: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk", self.chunk, "a number of tokens >= 1")
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")
        require(self.overlap >= 0, "overlap", self.overlap, "a number of tokens >= 0")
        require(self.reduce in ("max", "mean"), "reduce", self.reduce, '"max" or "mean"')

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`; (batch, layers, KV heads)."""
        return torch.stack([self._one(lens, sample.ids) for sample in batch])

    def _one(self, lens: Lens, ids: Sequence[int]) -> Tensor:
        tokens = torch.zeros(lens.num_layers, lens.num_kv_heads, len(ids))
        for start in range(0, len(ids), self.chunk):
            end = min(start + self.chunk, len(ids))
            again = ids[max(start - self.overlap, 0) : end]
            length = len(ids) + len(again)
            fits = lens.max_length is None or length <= lens.max_length
            require(fits, "length", length, f"text and replay within the model's {lens.max_length} positions")
            self._read(lens, torch.tensor([[*ids, *again]]), len(ids), (start, end), tokens)
        counted = tokens[..., self.sinks :] if len(ids) > self.sinks else tokens
        return counted.amax(-1) if self.reduce == "max" else counted.mean(-1)

    def _read(self, lens: Lens, ids: Tensor, text: int, chunk: tuple[int, int], tokens: Tensor) -> None:
        """Note in `tokens` (layers, KV heads, text) what the rows behind the text pay to the chunk."""
        slots = torch.arange(ids.shape[1])
        is_in = (slots >= chunk[0]) & (slots < chunk[1])
        slots = slots[is_in | (slots < self.sinks) | (slots >= text)].to(lens.device)
        places = ((slots >= chunk[0]) & (slots < chunk[1])).nonzero().squeeze(-1)

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            best = torch.zeros(lens.num_heads, len(places), device=call.queries.device)
            for _, attention in row_tiles(_among(call, slots, text)):
                best = torch.maximum(best, attention[0, :, :, places].amax(1).float())
            tokens[call.layer, :, chunk[0] : chunk[1]] = best.unflatten(0, (lens.num_kv_heads, -1)).amax(1).cpu()
            return attend(call)

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(ids, last=1)


def _among(call: AttentionCall, slots: Tensor, first: int) -> AttentionCall:
    """The rows from `first` on, with only the given keys to see."""

    def may_see(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(call.queries.shape[2] - first)
        return call.may_see(slice(first + start, first + stop))[..., slots]

    keys, values = call.keys[:, :, slots], call.values[:, :, slots]
    return AttentionCall(call.layer, call.queries[:, :, first:], keys, values, call.softmax, may_see)
