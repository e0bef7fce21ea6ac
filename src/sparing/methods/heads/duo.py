"""DuoAttention: which KV heads need the whole context (Xiao et al. 2024, arXiv:2410.10819).

Ranks: KV head, from 0 (near tokens and sinks do) to 1 (needs all). Each head's attention is blended of two,

    out = a · full + (1 - a) · streaming,      streaming row i sees keys j < sinks and keys i - j < recent,

and the gates a (one a KV head; at first 1, kept in [0, 1]) are learned so that the model's final hidden states stay
what they are while as many heads as possible stream:

    loss = mean (h_full - h_blended)² + penalty · mean |a|

over hidden dimensions and the tokens that passkeys are told from (`PasskeySample`). AdamW without weight decay, one
sample a step, learning rate up over the first fifth of the steps and down over the last, not below a tenth: as in the
authors' code. Everything else in the model stays as it is; gradients reach the gates through the blend alone.

Result: extras["loss"] is (steps, 2): distillation and penalty. Only the order and the distance from 0 and 1 mean
something; the paper cuts at a quantile of the gates.

Cost: per step two forwards (one only, from the second time that a sample is met) and one backward. The streaming part
reads `sinks + recent` keys a row, in tiles.

Deviations: 1. `steps`, `sinks` and `recent` suit the samples of 512 tokens that are made by default and a CPU; the
paper's are 2000, 128 and 256. 2. The states compared are those that predict the passkeys' tokens; the authors' code
takes the states at these tokens, at the questions and at the separators. 3. A step is one sample; a sample's full
states are computed once. 4. The blend is made in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, Measured, Run, register_scorer
from sparing.core.lens import Attend, AttentionCall, AttentionHook, Lens
from sparing.core.samples import PasskeySample
from sparing.errors import require
from sparing.measures.attention import ROWS_PER_TILE, attention_rows
from sparing.measures.optimise import exact, learn, numbers_for, trapezoid


@register_scorer("duo", family="learned", data="passkey", paper="2410.10819", axes=("layer", "kv_head"),
                 summary="learned gates: how much a KV head needs more than sinks and near tokens")  # fmt: skip
@dataclass(frozen=True)
class Duo(HeadScorer):
    """Learned gates of KV heads.

    Args:
        sinks: first tokens that a streaming head sees. recent: last tokens that it sees, the row's own among them.
        steps: of learning. learning_rate: at its highest. penalty: on the mean gate.
    """

    sinks: int = 16
    recent: int = 64
    steps: int = 100
    learning_rate: float = 0.02
    penalty: float = 0.05

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks", self.sinks, "a whole number >= 0")
        require(self.recent >= 1, "recent", self.recent, "a whole number >= 1")
        require(self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        require(self.penalty >= 0, "penalty", self.penalty, "a number >= 0")

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`.

        Raises:
            InvalidInputError: no sample is longer than what a streaming head sees.
        """
        longest = max(len(sample.ids) for sample in run.samples)
        fix = "measure longer samples, or take fewer sinks and recent tokens"
        require(longest > self.sinks + self.recent, "sinks + recent", self.sinks + self.recent,
                f"fewer than the {longest} tokens of the longest sample", fix)  # fmt: skip
        gates = numbers_for(lens, torch.ones(lens.num_layers, lens.num_kv_heads))
        full: dict[PasskeySample, Tensor] = {}

        def loss(step: int, batch: Sequence[PasskeySample]) -> tuple[Tensor, Tensor]:
            (sample,) = batch
            if sample not in full:
                with torch.no_grad():
                    full[sample] = telling_states(lens, sample)
            with lens.hooked(attention=self.blend(gates)):
                blended = telling_states(lens, sample)
            return (blended - full[sample]).square().mean(), self.penalty * gates.abs().mean()

        learned = learn(lens, gates, loss, run, steps=self.steps, learning_rate=self.learning_rate, batch_size=1,
                        schedule=trapezoid, bounds=(0.0, 1.0))  # fmt: skip
        notes = (*learned.notes, "loss: distillation, penalty")
        return Measured(gates.detach().float(), len(run.samples), extras={"loss": learned.curve}, notes=notes)

    def blend(self, gates: Tensor) -> AttentionHook:
        """Every layer's attention as the gates (layers, KV heads) have it."""

        def hook(call: AttentionCall, attend: Attend) -> Tensor:
            full = attend(call)
            share = gates[call.layer].to(full.device).repeat_interleave(call.queries.shape[1] // call.keys.shape[1])
            share = share[:, None]
            return (share * full + (1 - share) * streaming(call, self.sinks, self.recent)).to(full.dtype)

        return hook


def telling_states(lens: Lens, sample: PasskeySample) -> Tensor:
    """(answer tokens, E) float32: the final hidden states from which the tokens of the answers are predicted."""
    at = torch.cat([torch.arange(start - 1, end - 1) for start, end in sample.answers])
    last = len(sample.ids) - int(at.min())
    states = lens.final_states(torch.tensor([sample.ids]), last=last)[0]
    return exact(states[(at - at.min()).to(states.device)])


def streaming(call: AttentionCall, sinks: int, recent: int) -> Tensor:
    """The heads' outputs if every row saw, of what it may see, the first and the last tokens only.

    Args:
        call: of a sequence without pads. sinks: j < sinks is seen. recent: i - j < recent is seen.

    Returns:
        (B, T, Hq, Dv) in float32 (float64 for float64 calls).
    """
    rows = call.queries.shape[2]
    tiles = [slice(start, min(start + ROWS_PER_TILE, rows)) for start in range(0, rows, ROWS_PER_TILE)]
    return torch.cat([_streaming_rows(call, tile, sinks, recent) for tile in tiles], dim=1)


def _streaming_rows(call: AttentionCall, rows: slice, sinks: int, recent: int) -> Tensor:
    """Only the keys that any row of the tile sees are touched."""
    at = torch.arange(rows.start, rows.stop, device=call.keys.device) + call.first
    keys = torch.arange(int(at[-1]) + 1, device=call.keys.device)
    keys = keys[(keys < sinks) | (keys > at[0] - recent)]
    seen = call.may_see(rows)[..., keys] & ((keys < sinks) | (at[:, None] - keys < recent))
    part = AttentionCall(
        call.layer, call.queries[:, :, rows], call.keys[:, :, keys], call.values[:, :, keys], call.softmax,
        lambda _: seen,
    )  # fmt: skip
    attention = attention_rows(part)
    batch, heads, count, _ = attention.shape
    grouped = attention.reshape(
        batch, call.keys.shape[1], -1, len(keys)
    )  # a value is never copied to its group's heads
    return (grouped @ exact(part.values)).view(batch, heads, count, -1).transpose(1, 2)
