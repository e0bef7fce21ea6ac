"""What query tokens say about documents: attention per token, calibrated, filtered and added up per document.

After in-context re-ranking (Chen et al. 2024, arXiv:2410.02642) and QRHead (Zhang et al. 2025, arXiv:2506.09944):

    s[h, j]  = mean over query rows t of A[h, t, j]
    c[h, j]  = s[h, j] with the real query - s[h, j] with a content-free one
    score(D) = sum of c_j over the tokens j of D with c_j > mean_D(c) - 2 std_D(c)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import Span
from sparing.measures.attention import row_tiles


def query_attention(lens: Lens, ids: Sequence[int], query_start: int) -> Tensor:
    """(L, Hq, query_start) float32: mean attention that the tokens from `query_start` on pay to those before."""
    result = torch.zeros(lens.num_layers, lens.num_heads, query_start)

    def watch(call: AttentionCall, attend: Attend) -> Tensor:
        total = torch.zeros(lens.num_heads, query_start, device=call.queries.device)
        for _, attention in row_tiles(call, start=query_start):
            total += attention[0, :, :, :query_start].sum(1).float()
        result[call.layer] = (total / (len(ids) - query_start)).cpu()
        return attend(call)

    with torch.no_grad(), lens.hooked(attention=watch):
        lens.forward(torch.tensor([list(ids)]), last=1)
    return result


def document_scores(tokens: Tensor, documents: Sequence[Span]) -> Tensor:
    """(..., documents) scores from (..., tokens) calibrated attention, by the formula above.

    The standard deviation is the unbiased one; a document of one token keeps that token.
    """
    scores = []
    for start, end in documents:
        part = tokens[..., start:end]
        if end - start < 2:
            scores.append(part.sum(-1))
            continue
        least = part.mean(-1, keepdim=True) - 2 * part.std(-1, keepdim=True)
        scores.append(part.where(part > least, 0.0).sum(-1))
    return torch.stack(scores, dim=-1)


def ndcg(scores: Tensor, gold: Sequence[int], at: int = 10) -> Tensor:
    """(...,) nDCG of ranking (..., documents) by score, with binary relevance; ties go to the lower index."""
    documents = scores.shape[-1]
    relevant = torch.zeros(documents, dtype=torch.float64)
    relevant[list(gold)] = 1.0
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :at]
    discount = 1 / torch.log2(torch.arange(2, at + 2, dtype=torch.float64))[: order.shape[-1]]
    best = float((torch.sort(relevant, descending=True).values[:at] * discount).sum())
    return (relevant[order] * discount).sum(-1) / best
