"""QRHead ranker: in-context re-ranking by few heads (Zhang et al. 2025, arXiv:2506.09944).

Ranks: documents, by the equations of `icr`, with the sum over layers and heads taken over chosen heads alone:

    s_j(Q) = sum over chosen (l, h) of  mean over t in I_Q of  A[l, h, t, j]

Attention is summed over the heads first and filtered per document afterwards. With all heads it is ICR. Heads are found
by the scorer `qrhead` (`methods/heads/qrhead.py`) or any other that measures query heads.

Cost: that of ICR, with the attention of the chosen heads only.

Deviations:
1. See `icr`, 1 to 4. 2. A document's number in the prompt is not counted as part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparing.core.edits import Head, chosen_heads
from sparing.core.lens import Lens
from sparing.core.ranker import register_ranker
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError
from sparing.methods.rerank.icr import ICR

FIX = "make scores: sparing score --scorer qrhead --out FILE, then give qrhead(scores=FILE)"


@register_ranker("qrhead", paper="2506.09944", summary="in-context re-ranking by the heads that find documents best")
@dataclass(frozen=True)
class QRHeadRanker(ICR):
    """In-context re-ranking by few heads.

    Attributes:
        scores: a measurement of this model's query heads, of which the `top` are taken (a number, or a share of all).
        heads: or the (layer, head) pairs themselves.

    Raises:
        InvalidInputError: neither or both are given, or a head that the model does not have.
        ScoresMismatchError: scores of a model of another shape, or over other units.
    """

    scores: Scores | None = None
    top: int | float = 16
    heads: tuple[Head, ...] | None = None

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.heads is None):
            got = {"scores": self.scores, "heads": self.heads}
            raise InvalidInputError("qrhead", got, "either scores or heads", FIX)
        if self.scores is not None and not isinstance(self.scores, Scores):
            raise InvalidInputError("qrhead.scores", self.scores, "what was measured on the model (Scores)", FIX)
        self._pairs()

    def chosen(self, lens: Lens) -> Mapping[int, Sequence[int]]:
        """See `ICR.chosen`."""
        if self.scores is not None:
            self.scores.check_model(lens.identity)
        by_layer: dict[int, list[int]] = {}
        for layer, head in self._pairs():
            if not (0 <= layer < lens.num_layers and 0 <= head < lens.num_heads):
                allowed = f"layers 0 to {lens.num_layers - 1}, heads 0 to {lens.num_heads - 1}"
                raise InvalidInputError("head", (layer, head), allowed)
            by_layer.setdefault(layer, []).append(head)
        return by_layer

    def _pairs(self) -> tuple[Head, ...]:
        return chosen_heads(self.scores if self.scores is not None else self.heads or (), self.top)
