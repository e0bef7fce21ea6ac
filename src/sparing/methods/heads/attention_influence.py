"""AttentionInfluence: texts that suffer when retrieval heads are missing (Hua et al. 2025, arXiv:2505.07293).

Ranks: sample (a text). With the model's retrieval heads made uniform (see `uniform_heads`) as the reference,

    score = (L_ref - L_base) / L_base,   L = mean cross-entropy of the text's tokens, in nats per token

Scores compare within a domain (web, mathematics, code) only. Known bias: long texts score higher.
Cost: two forwards per text; the heads' uniform attention needs no map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.edits import Head
from sparing.core.lens import Lens
from sparing.measures.batches import pad_left
from sparing.methods.heads.uniform_heads import UniformHeads

# Logits are upcast so many positions at a time.
POSITIONS_AT_ONCE = 512


@dataclass(frozen=True)
class Influence:
    """Losses of one text, in nats per token, with all heads and with the chosen ones uniform."""

    base: float
    reference: float
    tokens: int

    @property
    def score(self) -> float:
        """(reference - base) / base; 0 for a text that the model knows by heart."""
        return (self.reference - self.base) / self.base if self.base > 0 else 0.0


def influence(lens: Lens, texts: Sequence[Sequence[int]], heads: Sequence[Head]) -> list[Influence]:
    """Measure a batch of texts of at least two tokens each."""
    ids, mask = pad_left(texts)
    edit = UniformHeads(tuple(heads))
    edit.check(lens)
    with torch.no_grad():
        base = mean_losses(lens.forward(ids, mask), ids, mask)
        with lens.hooked(attention=edit.attention):
            reference = mean_losses(lens.forward(ids, mask), ids, mask)
    pairs = zip(base.tolist(), reference.tolist(), texts, strict=True)
    return [Influence(first, second, len(text)) for first, second, text in pairs]


def mean_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(B,) float64 mean cross-entropy of each row's tokens given those before them, pads left out."""
    ids, real = ids.to(logits.device), (mask[:, 1:] & mask[:, :-1]).to(logits.device)
    total = torch.zeros(len(ids), dtype=torch.float64, device=logits.device)
    for start in range(0, ids.shape[1] - 1, POSITIONS_AT_ONCE):
        part = slice(start, min(start + POSITIONS_AT_ONCE, ids.shape[1] - 1))
        following = ids[:, part.start + 1 : part.stop + 1, None]
        loss = -logits[:, part].float().log_softmax(-1).gather(-1, following).squeeze(-1)
        total += loss.where(real[:, part], 0.0).double().sum(-1)
    return (total / real.sum(-1)).cpu()
