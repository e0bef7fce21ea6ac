"""What query tokens say about documents: attention per token, calibrated, filtered and added up per document.

After in-context re-ranking (Chen et al. 2024, arXiv:2410.02642) and QRHead (Zhang et al. 2025, arXiv:2506.09944):

    s[h, j]  = mean over query rows t of A[h, t, j]
    c[h, j]  = s[h, j] with the real query - s[h, j] with a content-free one
    score(D) = sum of c_j over the tokens j of D with c_j > mean_D(c) - 2 std_D(c)

Only the query's rows of attention are ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import Span
from sparing.errors import require
from sparing.measures.attention import row_tiles


def query_attention(lens: Lens, ids: Sequence[int], query_start: int) -> Tensor:
    """(L, Hq, query_start) float32: mean attention that the tokens from `query_start` on pay to those before."""
    result = torch.zeros(lens.num_layers, lens.num_heads, query_start)

    def take(call: AttentionCall, first: int, attention: Tensor) -> None:
        result[call.layer, :, first:] += attention.sum(1).float().cpu()

    _watch_query(lens, ids, query_start, None, take)
    return result / (len(ids) - query_start)


def total_query_attention(
    lens: Lens,
    ids: Sequence[int],
    query_start: int,
    prefix: Any = None,
    heads: Mapping[int, Sequence[int]] | None = None,
) -> Tensor:
    """(query_start,) float64: `query_attention` summed over layers and heads, without keeping them apart.

    Args:
        prefix: `lens.prefix` of ids[:query_start], so that only the tokens behind it are run.
        heads: layer → the heads to sum over; all of all layers by default.
    """
    result = torch.zeros(query_start, dtype=torch.float64)

    def take(call: AttentionCall, first: int, attention: Tensor) -> None:
        result[first:] += attention.sum((0, 1)).cpu().double()

    _watch_query(lens, ids, query_start, prefix, take, heads)
    return result / (len(ids) - query_start)


def _watch_query(
    lens: Lens,
    ids: Sequence[int],
    query_start: int,
    prefix: Any,
    take: Callable[[AttentionCall, int, Tensor], None],
    heads: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Run the prompt, and hand the query rows' attention to `take`, a tile of rows at a time.

    It gets (call, first, A): A is (heads, rows, query_start - first), attention to the tokens from `first` on.
    """
    new, asking = list(ids if prefix is None else ids[query_start:]), len(ids) - query_start

    def watch(call: AttentionCall, attend: Attend) -> Tensor:
        part = call if heads is None else _of_heads(call, heads.get(call.layer, ()))
        if part is not None:
            first = -int(call.starts()[0])  # a sliding window has forgotten what stands before
            for _, attention in row_tiles(part, start=call.queries.shape[2] - asking):
                take(call, first, attention[0, :, :, : query_start - first])
        return attend(call)

    with torch.no_grad(), lens.hooked(attention=watch):
        lens.forward(torch.tensor([new]), last=1, cache=prefix)


def _of_heads(call: AttentionCall, heads: Sequence[int]) -> AttentionCall | None:
    """The call with some of its query heads only, each with its own copy of its keys; None without heads."""
    if not heads:
        return None
    chosen = torch.tensor(list(heads), device=call.queries.device)
    group = call.queries.shape[1] // call.keys.shape[1]
    sinks = call.softmax.sinks
    softmax = call.softmax if sinks is None else replace(call.softmax, sinks=sinks.flatten()[chosen])
    return replace(call, queries=call.queries[:, chosen], keys=call.keys[:, chosen // group], softmax=softmax)


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
    grades = [0.0] * scores.shape[-1]
    for index in gold:
        grades[index] = 1.0
    return graded_ndcg(scores, grades, at)


def graded_ndcg(scores: Tensor, grades: Sequence[float], at: int = 10) -> Tensor:
    """(...,) nDCG of ranking (..., documents) by score: DCG = Σ_r grade_r / log2(r + 1) over ranks r = 1 to `at`,
    divided by that of the best ranking. Ties go to the lower index.

    Args:
        grades: how relevant each document is, 0 for not at all.

    Raises:
        InvalidInputError: no document is relevant, or a grade is below 0.
    """
    fine = all(0 <= grade < math.inf for grade in grades) and any(grade > 0 for grade in grades)
    require(fine, "grades", list(grades), "numbers from 0 on, one of them above 0")
    relevant = torch.tensor(list(grades), dtype=torch.float64)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :at].cpu()
    discount = 1 / torch.log2(torch.arange(2, at + 2, dtype=torch.float64))[: order.shape[-1]]
    best = float((torch.sort(relevant, descending=True).values[:at] * discount).sum())
    return (relevant[order] * discount).sum(-1) / best
