"""Memory heads and context heads: which heads push what the model remembers, and which what it has just read.

After PH3 (Jin et al. 2024, arXiv:2402.18154), which finds heads by path patching and prunes the unwanted kind. Its
exact score could not be obtained; **what follows is our own form of it**:

    I_c(h) = P(a_c) - P(a_c | h patched),  I_m(h) = P(a_m) - P(a_m | h patched)
    score[h] = I_c(h) - I_m(h):  high = a context head, low = a memory head
    a_c ↔ sample.answer (what the clean prompt says), a_m ↔ sample.wrong (what the corrupt one, or memory, says)

"h patched" is path patching to the logits: the head's output comes from the corrupt prompt, all other heads are
frozen, MLPs and norms recomputed. Both parts are in the extras, as means over samples.

Use: `AblateHeads` on the top heads leans the model on its memory, on the bottom ones on its context. Others report
(arXiv:2505.16518) that this works on plain conflicts and harms elsewhere: measure both.
Cost: as path patching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, Measured, Run, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import PairSample
from sparing.measures.patching import check_pair, groups, record
from sparing.methods.heads.path_patching import HEADS_AT_ONCE, others_frozen


@register_scorer("ph3", family="causal", data="pair", paper="2402.18154",
                 summary="context heads (high) against memory heads (low)")  # fmt: skip
@dataclass(frozen=True)
class PH3(MeanScorer):
    """How much more a head carries the answer of the context than that of the memory."""

    def observe(self, lens: Lens, batch: Sequence[PairSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        parts = self.parts(lens, batch)
        return parts[:, 0] - parts[:, 1]

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`; the extras hold I_c and I_m over the first batch."""
        measured = super().measure(lens, run)
        parts = self.parts(lens, next(iter(run.batches()))).mean(0)
        return Measured(
            measured.values, measured.n, measured.standard_error, measured.labels,
            {"context": parts[0], "memory": parts[1]}, measured.notes,
        )  # fmt: skip

    def parts(self, lens: Lens, batch: Sequence[PairSample]) -> Tensor:
        """(samples, 2, L, Hq): I_c and I_m."""
        return torch.stack([self._one(lens, sample) for sample in batch])

    def _one(self, lens: Lens, sample: PairSample) -> Tensor:
        check_pair(sample)
        clean, corrupt = record(lens, sample.clean), record(lens, sample.corrupt)
        answers = [sample.answer, sample.wrong]
        before = clean.logits.float().softmax(-1)[answers]
        found = torch.zeros(2, lens.num_layers, lens.num_heads)
        with torch.no_grad():
            for layer in range(lens.num_layers):
                for heads in groups(lens.num_heads, HEADS_AT_ONCE):
                    logits = others_frozen(lens, layer, heads, clean, corrupt)[:, -1]
                    found[:, layer, heads] = (before - logits.float().softmax(-1)[:, answers]).T.cpu()
        return found
