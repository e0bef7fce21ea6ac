"""Back-patching: give an early layer what a late layer knows, and read on (Biran et al. 2024, arXiv:2406.12775).

Ranks: (source, target) layers. The residual stream that goes into layer `source` is put, at the last position, where
layer `target` < source begins, and the rest of the model runs again:

    score[source, target] = log p(answer | back-patched) - log p(answer);  nan where target >= source

Above 0: the model answers better when it may use late layers twice; the first of the two steps of a question was
resolved too late. Cost: one forward per pair of layers, from the target on; targets share nothing, sources do.

Deviation: the last position only; the paper also patches at the position of the entity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import PairSample
from sparing.measures.patching import groups, record

SOURCES_AT_ONCE = 16


@register_scorer("back_patching", family="causal", data="pair", paper="2406.12775", axes=("source", "target"),
                 summary="log-probability gained when an early layer gets what a late one knows")  # fmt: skip
@dataclass(frozen=True)
class BackPatching(MeanScorer):
    """Late residual streams put into early layers, on the clean prompt of each pair."""

    def observe(self, lens: Lens, batch: Sequence[PairSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        return torch.stack([self._one(lens, sample) for sample in batch])

    def _one(self, lens: Lens, sample: PairSample) -> Tensor:
        run = record(lens, sample.clean)
        before = run.logits.float().log_softmax(-1)[sample.answer]
        found = torch.full((lens.num_layers, lens.num_layers), math.nan)
        with torch.no_grad():
            for target in range(lens.num_layers - 1):
                for group in groups(lens.num_layers - target - 1, SOURCES_AT_ONCE):
                    sources = [target + 1 + i for i in group]
                    residual = run.residual[target].repeat(len(sources), 1, 1)
                    residual[:, -1] = torch.stack([run.residual[source][0, -1] for source in sources])
                    logits = lens.forward_from(target, residual, last=1)[:, -1]
                    found[sources, target] = (logits.float().log_softmax(-1)[:, sample.answer] - before).cpu()
        return found
