"""ICR, in-context re-ranking: what a query attends to (Chen et al. 2024, arXiv:2410.02642).

Ranks: documents. All stand in one prompt, and behind them an instruction and the query. Nothing is generated:

    s_j(Q) = sum over layers l and heads h of  mean over t in I_Q of  A[l, h, t, j]
    c_j    = s_j(Q) - s_j("N/A")
    score(D) = sum of c_j over the tokens j of D with c_j > mean_D(c) - 2 std_D(c)

where I_Q are the tokens behind the documents (instruction, query, and what ends a chat turn), and "N/A" is the same
prompt with a query that asks nothing: what both attend to (places, punctuation, sinks) cancels.

Cost: the documents are read once for all queries; each query reads its own tokens, and looks at its own rows of
attention only. Where a model keeps more than keys and values (recurrent layers), each query reads everything.

Deviations:
1. The documents' keys and values are only read, where the paper's code writes behind them and cuts that off again.
2. Prompts are put together from token ids piece by piece, so documents and queries begin where they are said to begin;
   the wording is ours.
3. Documents are not cut (the paper cuts them to 300 words): too long a prompt is refused.
4. A document of one token has no deviation, and keeps its token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.lens import Lens
from sparing.core.ranker import Ranker, register_ranker, require_finite, require_fits
from sparing.core.ranking_prompt import NO_QUERY, PromptText, before_query, from_query
from sparing.measures.documents import document_scores, total_query_attention

TOO_LONG = "give fewer documents (the best of a first-stage ranking) or shorter ones"


@register_ranker("icr", paper="2410.02642",
                 summary="the query's attention to the documents, less that of a query that asks nothing")  # fmt: skip
@dataclass(frozen=True)
class ICR(Ranker):
    """In-context re-ranking; works with any model whose attention can be seen.

    Attributes:
        reverse: put the documents into the prompt last one first, so that the best of a first-stage ranking stand
            next to the query.
        calibrated: take off what a query that asks nothing attends to; without it c_j = s_j(Q).
    """

    reverse: bool = True
    calibrated: bool = True

    def chosen(self, lens: Lens) -> Mapping[int, Sequence[int]] | None:
        """Layer → the heads that are summed over; None for all."""
        return None

    def score(self, lens: Lens, text: PromptText, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        """See `Ranker.score`."""
        heads = self.chosen(lens)
        ids, spans = before_query(text, reversed(documents) if self.reverse else documents)
        endings = [from_query(text, query) for query in (NO_QUERY, *queries)]
        require_fits(lens, len(ids) + max(map(len, endings)), TOO_LONG)
        prefix = lens.prefix(torch.tensor([ids]))

        def attention(ending: Sequence[int]) -> Tensor:
            found = total_query_attention(lens, [*ids, *ending], len(ids), prefix, heads)
            return require_finite(self, found)  # the filter would hide what is no number

        null = attention(endings[0]) if self.calibrated else 0.0
        placed = torch.stack([document_scores(attention(ending) - null, spans) for ending in endings[1:]])
        return placed.flip(-1) if self.reverse else placed
