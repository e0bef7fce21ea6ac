"""Subnetwork: a smallest set of heads that does a task alone, after bigram subnetworks (Chang and Bergen 2025,
arXiv:2504.15471), whose masks are learned by continuous sparsification (Savarese et al. 2020, arXiv:1912.04427).

Ranks: head, by the gate that it ends with: 1 keep, 0 drop. What is dropped is zero-ablated: z = 0 before the output
projection. MLPs, norms and embeddings stay. A gate is

    g[l, h] = σ(β · m[l, h]),      m = 0 at first,      z[l, h] ← g[l, h] · z[l, h]

and the numbers m are learned so that few heads answer the samples, while β grows by the same factor each step from 1
to `sharpness`, which turns the gates into a mask:

    loss = cross-entropy of the answers + penalty · mean g;      kept are the heads with m > 0.

The penalty is in nats a token: a head that lowers the loss by more than penalty / number of heads is worth keeping.
Two heads of which either one is enough are told apart by chance; a set, once found, is sufficient, not unique.

Result: extras["loss"] is (steps, 2): answers and penalty; extras["answer_loss"] has the loss on all samples with all
heads, and with the kept heads alone; extras["kept"] their number.

Cost: steps · batch size forwards and backwards, and two forwards of all samples. layers · heads numbers are learned.

From the authors' code: the sigmoid, m = 0 at first, β growing by a factor, the mean of the gates as penalty with
factor 0.1, AdamW, m > 0. Deviations: 1. gates of heads instead of weights. 2. Answers about planted facts instead of
a bigram model's predictions. 3. Hundreds of steps with a high learning rate; theirs are up to 15000 of 5e-5 with β
times 1.001, stopped when hardly a gate is undecided. 4. No weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, Measured, Run, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import NeedleSample
from sparing.errors import require
from sparing.measures.optimise import answer_loss, learn, numbers_for


@register_scorer("subnetwork", family="learned", data="needle", paper="2504.15471",
                 summary="learned mask: a smallest set of heads that does the task alone")  # fmt: skip
@dataclass(frozen=True)
class Subnetwork(HeadScorer):
    """The final gate of each head.

    Args:
        penalty: on the mean gate, in nats a token. steps: of learning. learning_rate: constant.
        sharpness: β at the last step.
    """

    penalty: float = 0.1
    steps: int = 100
    learning_rate: float = 0.05
    sharpness: float = 200.0

    def __post_init__(self) -> None:
        require(self.penalty >= 0, "penalty", self.penalty, "a number >= 0")
        require(self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        require(self.sharpness >= 1, "sharpness", self.sharpness, "a number >= 1")

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`."""
        scores = numbers_for(lens, torch.zeros(lens.num_layers, lens.num_heads))

        def loss(step: int, batch: Sequence[NeedleSample]) -> tuple[Tensor, Tensor]:
            gates = torch.sigmoid(self.sharpness ** (step / max(self.steps - 1, 1)) * scores)
            return gated_loss(lens, batch, gates), self.penalty * gates.mean()

        learned = learn(lens, scores, loss, run, steps=self.steps, learning_rate=self.learning_rate,
                        batch_size=run.batch_size)  # fmt: skip
        mask = (scores.detach() > 0).to(scores)
        kept, total = int(mask.sum()), mask.numel()
        everything, alone = (_mean_loss(lens, run, gates) for gates in (torch.ones_like(mask), mask))
        told = (
            f"{kept} of {total} heads kept; loss on the answers {alone:.4g} with these alone, {everything:.4g} with all"
        )
        extras = {"loss": learned.curve, "answer_loss": torch.tensor([everything, alone]), "kept": torch.tensor(kept)}
        values = torch.sigmoid(self.sharpness * scores.detach())
        notes = (*learned.notes, told, "loss: answers, penalty")
        return Measured(values.float(), len(run.samples), extras=extras, notes=notes)


def gated_loss(lens: Lens, samples: Sequence[NeedleSample], gates: Tensor) -> Tensor:
    """Loss on the answers with every head's output times its gate (layers, heads)."""
    with lens.hooked(heads=lambda layer, z: z * gates[layer, :, None].to(z)):
        return answer_loss(lens, samples)


def _mean_loss(lens: Lens, run: Run, gates: Tensor) -> float:
    """Over all answer tokens of all samples."""
    total = tokens = 0.0
    with torch.no_grad():
        for batch in run.batches():
            count = sum(len(sample.answer_ids) for sample in batch)
            total += float(gated_loss(lens, batch, gates)) * count
            tokens += count
    return total / tokens
