"""Head ablation: how much worse the answers get when one head is taken away.

Ranks: head.

    score[h] = mean over samples of ( log p(answer | context) - log p(answer | context, head h ablated) ) / |answer|

in nats per answer token, with the true answer given (teacher forcing). What "taken away" means is named:

| ablation | the head's output becomes |
|---|---|
| `zero` | 0 |
| `mean` | its mean over the sample's own tokens, the same at every token |
| `uniform` | the mean of the values that it sees (its attention made uniform) |
| `resample` | its output at another token of the sample, drawn anew for every token |

Cost: one forward per head and sample from the head's layer on; heads of a layer share a batch.

A head whose work others do as well scores near 0 although it does the work: see the ablation curve for sets of heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.edits import ABLATIONS, Ablation, replacement
from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import NeedleSample
from sparing.errors import require
from sparing.measures.uniform import uniform_attention

# Rows of a batch: one head each.
HEADS_AT_ONCE = 8


@register_scorer("ablation", family="causal", data="needle", paper="-",
                 summary="loss of the right answer when the head is taken away")  # fmt: skip
@dataclass(frozen=True)
class HeadAblation(MeanScorer):
    """Log-probability lost per answer token.

    Attributes:
        kind: "zero", "mean", "uniform" or "resample". seed: of resampling.
    """

    kind: Ablation = "zero"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.kind in ABLATIONS, "kind", self.kind, ", ".join(ABLATIONS))

    def observe(self, lens: Lens, batch: Sequence[NeedleSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        return torch.stack([self._one(lens, sample) for sample in batch])

    def _one(self, lens: Lens, sample: NeedleSample) -> Tensor:
        ids = torch.tensor([[*sample.ids, *sample.answer_ids]])
        into: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        found = torch.zeros(lens.num_layers, lens.num_heads)
        with torch.no_grad():
            with lens.hooked(sites={"resid_pre": into.__setitem__}, heads=outputs.__setitem__):
                intact = answer_log_prob(lens.forward(ids, last=len(sample.answer_ids) + 1), sample)
            for layer in range(lens.num_layers):
                for heads in _groups(lens.num_heads):
                    residual = into[layer].expand(len(heads), -1, -1)
                    with self._ablated(lens, layer, heads, outputs[layer][0]):
                        logits = lens.forward_from(layer, residual, last=len(sample.answer_ids) + 1)
                    found[layer, heads] = (intact - answer_log_prob(logits, sample)).float().cpu()
        return found / len(sample.answer_ids)

    def _ablated(self, lens: Lens, layer: int, heads: list[int], outputs: Tensor) -> AbstractContextManager[None]:
        """A block in which row i of the batch lacks head heads[i] of the layer."""
        rows = torch.arange(len(heads))
        if self.kind == "uniform":

            def attention(call: AttentionCall, attend: Attend) -> Tensor:
                out = attend(call)
                if call.layer == layer:
                    out = out.clone()
                    out[rows, :, heads] = uniform_attention(call)[rows, :, heads]
                return out

            return lens.hooked(attention=attention)

        def on_heads(at: int, z: Tensor) -> Tensor | None:
            if at != layer:
                return None
            new = z.clone()
            # One reference for every layer number: `replacement` is given this layer's own tokens.
            reference = outputs[None].expand(layer + 1, *outputs.shape)
            new[rows, :, heads] = replacement(self.kind, z, reference, layer, self.seed)[rows, :, heads]
            return new

        return lens.hooked(heads=on_heads)


def answer_log_prob(logits: Tensor, sample: NeedleSample) -> Tensor:
    """(B,) log-probability of the answer, from the logits of the last |answer| + 1 positions."""
    log_probs = logits[:, :-1].float().log_softmax(-1)
    answer = torch.tensor(sample.answer_ids, device=logits.device)
    return log_probs.gather(-1, answer.expand(len(logits), -1)[..., None]).sum((1, 2))


def _groups(heads: int) -> Iterator[list[int]]:
    for start in range(0, heads, HEADS_AT_ONCE):
        yield list(range(start, min(start + HEADS_AT_ONCE, heads)))
