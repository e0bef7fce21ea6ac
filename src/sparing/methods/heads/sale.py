"""SALE's thresholds: how small a weight a head may leave out (Ji et al. 2025, arXiv:2505.24179).

Ranks: query head, by −log2 of its threshold: higher = reads more. From tau = `start` on, the threshold is halved until

    Σ |O_sparse − O_dense| over rows and channels of the head's output  <  error · n,     n tokens of the sample

where O_sparse reads what `Sale(tau=tau)` reads. Where no tau above 1e-4 does it, the last one tried, not above 1e-4,
stands for a head that reads everything. start ↔ 0.008, error ↔ θ = 0.4 as in the authors' script.

The error is absolute: it grows with the values' size and the head's channels, so thresholds belong to one model.

Cost: attention by definition, a tile of rows at a time, once more for each threshold.

Deviations: 1. Passkey samples (`PasskeySample`), whose words have to be found again, in place of the paper's key-value
retrieval prompts. 2. Thresholds of several samples are averaged as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.pattern import Partial, Pattern
from sparing.core.prefill import PromptCall
from sparing.core.samples import PasskeySample
from sparing.errors import require
from sparing.measures.batches import pad_left
from sparing.methods.prefill.sale import DENSE, Sale


@register_scorer("sale", family="causal", data="passkey", paper="2505.24179",
                 summary="how small a threshold of SALE has to be for the head's output to stay")  # fmt: skip
@dataclass(frozen=True)
class SaleThresholds(MeanScorer):
    """−log2 of the largest threshold that changes a head's output little enough.

    Attributes:
        start: the largest threshold (0.008). error: allowed per token, summed over channels (0.4).
        block, first, local, estimate_bits, stride: see `Sale`.
    """

    start: float = 0.008
    error: float = 0.4
    block: int = 64
    first: int = 1
    local: int = 128
    estimate_bits: int = 4
    stride: int = 8

    def __post_init__(self) -> None:
        require(self.start > DENSE, "start", self.start, f"more than {DENSE}")
        require(self.error >= 0, "error", self.error, "a number >= 0")
        self._method(self.start)

    def observe(self, lens: Lens, batch: Sequence[PasskeySample]) -> Tensor:
        """See `MeanScorer.observe`."""
        ids, mask = pad_left([sample.ids for sample in batch])
        found = torch.full((len(batch), lens.num_layers, lens.num_heads), torch.nan)

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            for row, pads in enumerate((~mask).sum(-1).tolist()):
                query, keys, values = (x[row, :, pads:] for x in (call.queries, call.keys, call.values))
                prompt = PromptCall(query, keys, values, call.softmax, _attend)
                found[row, call.layer] = self._halvings(prompt).cpu() - math.log2(self.start)
            return attend(call)

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(ids, mask, last=1)
        return found

    def _method(self, tau: float) -> Sale:
        return Sale(
            1.0, block=self.block, first=self.first, local=self.local, tau=tau, estimate_bits=self.estimate_bits,
            stride=self.stride,
        )  # fmt: skip

    def _halvings(self, call: PromptCall) -> Tensor:
        """(Hq,) how often `start` is halved."""
        dense = call.attend(call.grid(self.block).dense()).out
        result = torch.zeros(call.heads, device=dense.device)
        is_open, tau = torch.ones(call.heads, dtype=torch.bool, device=dense.device), self.start
        while tau > DENSE and bool(is_open.any()):
            sparse = call.attend(self._method(tau).pattern(call)).out
            is_open &= (sparse - dense).abs().sum((1, 2)) >= self.error * call.tokens
            result += is_open
            tau /= 2
        return result


def _attend(call: PromptCall, pattern: Pattern) -> Partial:
    """Attention under a pattern by its definition, a block of rows at a time; sinks take part in the output."""
    outs, sums = zip(*_tiles(call, pattern), strict=True)
    return Partial(torch.cat(outs, dim=1), torch.cat(sums, dim=1))


def _tiles(call: PromptCall, pattern: Pattern) -> Iterator[tuple[Tensor, Tensor]]:
    keys, values = (x.float().repeat_interleave(call.group, dim=0) for x in (call.keys, call.values))
    for rows in torch.arange(call.start, call.tokens, device=keys.device).split(pattern.size):
        logits = call.query[:, rows - call.start].float() @ keys.transpose(-1, -2) * call.softmax.scaling
        may = torch.stack([pattern.may_read(head, rows) for head in range(call.heads)])
        logits = call.softmax.capped(logits).masked_fill(~may, -torch.inf)
        lse = logits.logsumexp(-1)
        sinks = call.softmax.sinks
        total = lse if sinks is None else torch.logaddexp(lse, sinks.float()[:, None])
        yield (logits - total[..., None]).exp() @ values, lse
