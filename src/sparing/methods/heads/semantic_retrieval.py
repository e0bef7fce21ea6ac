"""Semantic retrieval heads: attention to the whole fact while it is told (CompressKV, arXiv:2508.02401).

Ranks: head. As `retrieval`, but a head need not point at the very token: whenever the model says a token of the fact,
the head's whole attention to the fact counts.

    score[h] = mean over generated tokens w that occur in the needle of  sum over j in the needle of A[h, last, j]

Cost: as `retrieval`.

Deviations:
1. The mean over such tokens, not their sum, so that scores of answers of different lengths compare.
2. Once per generated token; the authors' code counts a token again for every place of the fact where it occurs.
3. A sample counts as in `retrieval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import NeedleSample
from sparing.measures.decoding import Step
from sparing.methods.heads.retrieval import AnswerScorer, answer, only_right, still_answering


@register_scorer("semantic_retrieval", family="retrieval", data="needle", paper="2508.02401",
                 summary="attention to the whole fact while it is being told")  # fmt: skip
@dataclass(frozen=True)
class SemanticRetrieval(AnswerScorer):
    """Mass on the fact's sentence while its tokens are generated."""

    def observe(self, lens: Lens, batch: Sequence[NeedleSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        mass = torch.zeros(len(batch), lens.num_layers, lens.num_heads)
        told = torch.zeros(len(batch))

        def watch(step: Step) -> None:
            for row, sample in still_answering(step, batch):
                start, end = sample.needle
                if int(step.tokens[row]) in sample.ids[start:end]:
                    pad = int(step.pads[row])
                    mass[row] += step.attention[:, row, :, start + pad : end + pad].sum(-1).float()
                    told[row] += 1

        said = answer(lens, batch, watch)
        return only_right(mass / told.clamp_min(1)[:, None, None], said, batch, self.min_recall)
