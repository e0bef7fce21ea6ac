"""Retrieval heads: heads that look at what is being copied (Wu et al. 2024, arXiv:2404.15574).

Ranks: head. A question about a fact in a long context is answered greedily. A head copies a token of the fact when,
in the row that predicts it, the token attended to most lies in the fact and is the very token that is predicted.

    score[h] = |tokens of the value that h copied| / |value|,   mean over the samples answered rightly
    k (needle) ↔ sample.needle, sample.value

1 for a head that copies every token of every answer; Wu et al. call heads from 0.1 on retrieval heads.
Cost: one prefill and a few decoded tokens per sample; one attention row per token.

Deviations:
1. The score is relative to the tokens of the fact's value, not of its whole sentence: a synthetic answer repeats the
   value only, so a perfect head would otherwise score far below 1.
2. A token of the value counts once (the paper's set); the authors' code counts repeats, so its scores can exceed 1.
3. A sample counts if more than `min_recall` of the answer's tokens were said (ROUGE-1 recall over tokens, not words).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import NeedleSample
from sparing.errors import require
from sparing.measures.decoding import Step, decode_watched


@dataclass(frozen=True)
class AnswerScorer(MeanScorer):
    """Base of what is measured while a model answers, and counts where it answered right.

    Attributes:
        min_recall: a sample counts if more than this share of the answer's tokens were said.
    """

    min_recall: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.min_recall < 1, "min_recall", self.min_recall, "a share in [0, 1)")


@register_scorer("retrieval", family="retrieval", data="needle", paper="2404.15574",
                 summary="share of answer tokens that the head looks at while they are copied")  # fmt: skip
@dataclass(frozen=True)
class Retrieval(AnswerScorer):
    """Copy score on generated tokens."""

    def observe(self, lens: Lens, batch: Sequence[NeedleSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        copied = [
            torch.zeros(lens.num_layers, lens.num_heads, s.value[1] - s.value[0], dtype=torch.bool) for s in batch
        ]

        def watch(step: Step) -> None:
            most = step.attention.argmax(-1)  # (L, B, Hq)
            for row, sample in still_answering(step, batch):
                start, end = sample.value
                for place in range(start, end):
                    if sample.ids[place] == int(step.tokens[row]):
                        copied[row][:, :, place - start] |= most[:, row] == place + int(step.pads[row])

        said = answer(lens, batch, watch)
        scores = torch.stack([hits.float().mean(-1) for hits in copied])
        return only_right(scores, said, batch, self.min_recall)


def answer(lens: Lens, batch: Sequence[NeedleSample], watch: Callable[[Step], None]) -> Tensor:
    """What the model says to each sample, (B, steps), watched."""
    return decode_watched(lens, [sample.ids for sample in batch], max(s.max_new_tokens for s in batch), watch)


def still_answering(step: Step, batch: Sequence[NeedleSample]) -> Iterator[tuple[int, NeedleSample]]:
    """Rows whose own limit has not been reached; a batch is decoded for as long as any of its samples needs."""
    return ((row, sample) for row, sample in enumerate(batch) if step.number < sample.max_new_tokens)


def only_right(scores: Tensor, said: Tensor, batch: Sequence[NeedleSample], min_recall: float) -> Tensor:
    """The scores, with nan for samples of which too little of the answer was said."""
    for row, sample in enumerate(batch):
        expected = Counter(sample.answer_ids)
        found = expected & Counter(said[row, : sample.max_new_tokens].tolist())
        if found.total() <= min_recall * expected.total():
            scores[row] = torch.nan
    return scores
