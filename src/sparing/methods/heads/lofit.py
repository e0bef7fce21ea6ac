"""LoFiT: heads whose outputs are worth changing for a task, and the changes (Yin et al. 2024, arXiv:2406.01563).

Ranks: head. Heads' outputs z (before the output projection) are scaled and shifted, everything else is frozen:

    z[l, h] ← (1 + A[l, h]) ⊙ z[l, h] + v[l, h],      A, v of the head's size

1. Select (`Lofit`): A of all heads is learned, v is 0. A starts as N(0, 0.001); AdamW without weight decay, the
   learning rate falling to 0 in a line; loss = cross-entropy of the answers + sparsity · Σ|A|; s[l, h] = ‖A[l, h]‖₂.
2. Tune (`tune_vectors`): v of the chosen heads is learned, without A and without penalty. A shift of z is a shift of
   the projection's output, so it can be folded into its bias.

Defaults are those of the authors' code for a 7B model (questions on edited facts have sparsity 1e-3); it takes 8
samples a step, the paper's data sets have 134 to 326.

What a model does perfectly leaves nothing to learn: then the penalty wins, and A says little. The notes give the
loss on the answers in the first and in the last epoch, and say so; extras["loss"] is (steps, 2): answers and penalty.

Cost: epochs · samples forwards and backwards; layers · heads · head size numbers are learned.

Deviations: 1. data are questions about planted facts, not the paper's (TruthfulQA by preference pairs, MQuAKE,
CLUTRR). 2. Gradients are not clipped, and the last step counts, not the best epoch on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, Measured, Run, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import NeedleSample
from sparing.errors import InvalidInputError, require
from sparing.measures.optimise import Learned, answer_loss, falling, learn, numbers_for

_START = 1e-3

Head = tuple[int, int]


@register_scorer("lofit", family="learned", data="needle", paper="2406.01563",
                 summary="size of the learned scaling of a head's output that serves the task")  # fmt: skip
@dataclass(frozen=True)
class Lofit(HeadScorer):
    """The norm of each head's learned scaling.

    Args:
        learning_rate: at its highest. sparsity: factor on Σ|A|. epochs: over the samples.
    """

    learning_rate: float = 5e-3
    sparsity: float = 5e-4
    epochs: int = 5

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        require(self.sparsity >= 0, "sparsity", self.sparsity, "a number >= 0")
        require(self.epochs >= 1, "epochs", self.epochs, "a whole number >= 1")

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`."""
        scaling = numbers_for(lens, _noise(run.seed, lens.num_layers, lens.num_heads, lens.head_dim))

        def loss(step: int, batch: Sequence[NeedleSample]) -> tuple[Tensor, Tensor]:
            with adjusted(lens, scaling, torch.zeros_like(scaling)):
                return answer_loss(lens, batch), self.sparsity * scaling.abs().sum()

        learned = _learn(lens, scaling, loss, run, self.learning_rate, self.epochs)
        each = math.ceil(len(run.samples) / run.batch_size)
        first, last = learned.curve[:each, 0].mean(), learned.curve[-each:, 0].mean()
        told = f"loss on the answers: {first:.4g} in the first epoch, {last:.4g} in the last"
        told += "" if last < first else ", so nothing was learned and the scores say little"
        notes = (*learned.notes, told, "loss: answers, penalty")
        values = scaling.detach().norm(dim=-1)
        return Measured(values.float(), len(run.samples), extras={"loss": learned.curve}, notes=notes)


def adjusted(lens: Lens, scaling: Tensor, shift: Tensor) -> AbstractContextManager[None]:
    """While open, z ← (1 + scaling) ⊙ z + shift; both are (layers, heads, Dv)."""
    return lens.hooked(heads=lambda layer, z: z + scaling[layer].to(z) * z + shift[layer].to(z))


def tune_vectors(
    lens: Lens, heads: Sequence[Head], run: Run, learning_rate: float = 1e-2, epochs: int = 5
) -> dict[Head, Tensor]:
    """LoFiT's second stage: what to add to the outputs of a few heads so that the samples are answered better.

    Args:
        heads: (layer, head) of each. run: `NeedleSample`s, batch size, seed, time limit, progress (with the loss).
        learning_rate: the authors' code has 8e-3 to 2e-2.

    Returns:
        (layer, head) → (Dv,) float32, to be added to z; on the model's device.

    Raises:
        InvalidInputError: no samples, no heads, one twice, or one that the model has not.
    """
    allowed = f"different heads (layer, head) below ({lens.num_layers}, {lens.num_heads})"
    for layer, head in heads:
        require(0 <= layer < lens.num_layers and 0 <= head < lens.num_heads, "heads", (layer, head), allowed)
    if not heads or len(set(heads)) < len(heads):
        raise InvalidInputError("heads", list(heads), allowed)
    require(len(run.samples) >= 1, "run.samples", len(run.samples), "at least one sample")
    vectors = numbers_for(lens, _noise(run.seed, len(heads), lens.head_dim))
    where = tuple(torch.tensor(heads, device=vectors.device).T)
    nothing = vectors.new_zeros(lens.num_layers, lens.num_heads, lens.head_dim)

    def loss(step: int, batch: Sequence[NeedleSample]) -> tuple[Tensor]:
        with adjusted(lens, nothing, nothing.index_put(where, vectors)):
            return (answer_loss(lens, batch),)

    _learn(lens, vectors, loss, run, learning_rate, epochs)
    return dict(zip(heads, vectors.detach().float(), strict=True))


def _learn(
    lens: Lens, numbers: Tensor, loss: Callable[..., Sequence[Tensor]], run: Run, learning_rate: float, epochs: int
) -> Learned:
    steps = epochs * math.ceil(len(run.samples) / run.batch_size)
    return learn(lens, numbers, loss, run, steps=steps, learning_rate=learning_rate, batch_size=run.batch_size,
                 schedule=falling)  # fmt: skip


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * _START
