"""Task-KV's distance to the semantic centre: heads that say something else than the others (arXiv:2501.15113).

Ranks: head. Each head's semantic vector is what the most attended tokens of the prompt give it:

    C[h, j] = mean over the last W rows i of A[h, i, j];  I = the t tokens with the largest C[h, j]
    v'[h]   = sum over j in I of C[h, j] V[j];   score[h] = || v'[h] - mean over heads of v' ||_2
    W ↔ window = 32, t ↔ tokens = 256

Far heads ("heterogeneous") keep their whole cache in Task-KV. Distances compare within a layer only.
Cost: one forward, W rows per head.

Deviations:
1. No pooling of C over neighbours, which the paper leaves optional.
2. L2 distance; the paper does not say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.errors import require
from sparing.measures.attention import attention_rows
from sparing.measures.batches import pad_left


@register_scorer("semantic_distance", family="retrieval", data="text", paper="2501.15113",
                 summary="distance of what the head gathers from what all heads of its layer gather")  # fmt: skip
@dataclass(frozen=True)
class SemanticDistance(MeanScorer):
    """Distance to the semantic centre.

    Attributes:
        window: rows at the end of the prompt that are looked at (32). tokens: the most attended ones that count (256).
    """

    window: int = 32
    tokens: int = 256

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "a number of rows >= 1")
        require(self.tokens >= 1, "tokens", self.tokens, "a number of tokens >= 1")

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        ids, mask = pad_left([sample.ids for sample in batch])
        result = torch.zeros(len(batch), lens.num_layers, lens.num_heads)

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            count = call.queries.shape[2]
            rows = attention_rows(call, slice(max(count - self.window, 0), count))
            real = mask[:, -rows.shape[2] :].to(rows)[:, None, :, None]  # a short text has pads among its last rows
            mean = (rows * real).sum(2) / real.sum(2)
            mass, places = mean.topk(min(self.tokens, count), dim=-1)
            values = call.values.to(mass.dtype).repeat_interleave(lens.num_heads // lens.num_kv_heads, dim=1)
            chosen = values.gather(2, places[..., None].expand(-1, -1, -1, values.shape[-1]))
            gathered = (mass[..., None] * chosen).sum(2)
            result[:, call.layer] = (gathered - gathered.mean(1, keepdim=True)).norm(dim=-1).float().cpu()
            return attend(call)

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(ids, mask, last=1)
        return result
