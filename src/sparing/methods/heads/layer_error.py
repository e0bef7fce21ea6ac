"""Layer error: what a layer's attention output loses under a small budget (CompressKV, arXiv:2508.02401).

Ranks: layer. A text is read, a layer keeps `tokens` of its prompt, and its output at the next steps is compared with
that of the whole prompt, behind the output projection and all heads together; no other layer notices.

    e_l = mean over decode steps of ‖O_kept - O_full‖₂ / (‖O_full‖₂ + 1e-5),   mean over samples
    kept: the last W tokens of the prompt, and those with the largest pooled mean attention of the last W rows over all
    heads of the layer;  tokens ↔ 32, window ↔ W = 8, kernel_size ↔ 5 (average) as in the authors' code

Cost: one forward; W + steps rows of attention per layer, the latter twice.

Deviations:
1. Steps are the last tokens of the text, not the model's own answer, so that one forward does and any text will do.
2. All heads choose the kept tokens; in CompressKV it is the layer's semantic retrieval heads, another measurement.
3. The mean over samples, not first a share of each data set's sum; CompressKV uses the errors relative to each other.
4. A bias of the output projection, which is no part of what was lost, is not counted in O_full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.errors import require
from sparing.measures.attention import attention_rows
from sparing.measures.batches import pad_left
from sparing.measures.pooling import check_window, pool_tokens


@register_scorer("layer_error", family="causal", data="text", paper="2508.02401", axes=("layer",),
                 summary="relative error of the layer's attention output if it keeps few tokens")  # fmt: skip
@dataclass(frozen=True)
class LayerError(MeanScorer):
    """Error of a layer's attention output under a trial budget.

    Attributes:
        tokens: of the prompt that the layer keeps (32), the last ones among them. steps: decoded tokens to compare.
        window: rows that choose, and tokens that are always kept (8). kernel_size: odd width of the average (5).
    """

    tokens: int = 32
    steps: int = 16
    window: int = 8
    kernel_size: int = 5

    def __post_init__(self) -> None:
        require(self.tokens >= self.window, "tokens", self.tokens, f"at least the window of {self.window}")
        require(self.steps >= 1, "steps", self.steps, "a number of tokens >= 1")
        check_window(self.window, self.kernel_size)

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`; a text that is too short for steps and window is not counted."""
        ids, mask = pad_left([sample.ids for sample in batch])
        errors = torch.full((len(batch), lens.num_layers), torch.nan)
        counted = mask.sum(-1) >= self.steps + self.window
        if not bool(counted.any()):
            return errors

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            full = attend(call)
            weight = lens.output_weight(call.layer).float()
            last = slice(call.queries.shape[2] - self.steps, call.queries.shape[2])
            error = _relative(self._trial(call, mask, last), full[:, last].float(), weight)
            errors[:, call.layer] = error.cpu().where(counted, torch.nan)
            return full

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(ids, mask, last=1)
        return errors

    def _trial(self, call: AttentionCall, mask: Tensor, rows: slice) -> Tensor:
        """(B, rows, Hq, Dv) heads' outputs at the last rows, if only few tokens of what comes before them were kept."""
        kept = self._kept(call, mask, rows.start + call.first)
        seen = call.may_see(rows) & kept[:, None, None]
        part = replace(call, queries=call.queries[:, :, rows], may_see=lambda _: seen)
        attention = attention_rows(part)
        batch, heads, count, stored = attention.shape
        grouped = attention.view(batch, call.keys.shape[1], -1, stored)
        return (grouped @ call.values.to(attention.dtype)).view(batch, heads, count, -1).transpose(1, 2).float()

    def _kept(self, call: AttentionCall, mask: Tensor, end: int) -> Tensor:
        """(B, S) bool: tokens of the prompt, which ends before `end`, that are kept, and all that come later."""
        stored = call.keys.shape[2]
        at = torch.arange(stored, device=call.keys.device)
        window = slice(end - call.first - self.window, end - call.first)
        votes = attention_rows(call, window).mean((1, 2))[:, None].float()
        real = mask[:, -stored:].to(votes.device)[:, None]
        pooled = pool_tokens(votes, real & (at < end - self.window), self.kernel_size, "avg")[:, 0]
        pooled = pooled.masked_fill(~real[:, 0] | (at >= end - self.window), -torch.inf)
        best = torch.sort(pooled, dim=-1, descending=True, stable=True).indices[:, : self.tokens - self.window]
        return torch.zeros_like(real[:, 0]).scatter(1, best, True) | (at >= end - self.window)


def _relative(kept: Tensor, full: Tensor, weight: Tensor) -> Tensor:
    """(B,) mean over rows of the relative error behind the output projection, of (B, rows, Hq, Dv) heads' outputs."""
    lost, whole = (torch.einsum("bthd,hde->bte", z, weight).norm(dim=-1) for z in (kept - full, full))
    return (lost / (whole + 1e-5)).mean(-1)
