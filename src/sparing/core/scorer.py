"""What a scorer sees and what it returns.

A scorer is a frozen dataclass. It may watch the attention calls of the prompt (`observe`, called once per chunk
and layer, building up a small state), and then scores the stored tokens (`score`). A scorer that follows
decoding as well implements `step`. Scorers see tensors only; hooks, caches and rounding are elsewhere.

Shape legend: B rows (sequences), Hq query heads, H KV heads, G = Hq / H, Q query tokens, N stored tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class Rotary(Protocol):
    """The model's own rotary position embedding, as a linear map."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (B, heads, T, D) to positions (B, T)."""
        ...

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        ...


class OutputProjection(Protocol):
    """The weights that turn heads' outputs into the layer's output."""

    def weight(self) -> Tensor:
        """(Hq, Dv, hidden) float32: head h adds its output (Dv,) times weight[h] to the residual stream."""
        ...


@dataclass(frozen=True)
class Softmax:
    """How the model turns dot products into attention.

    Attributes:
        scaling: factor on q·k (usually 1/sqrt(D)).
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
        sinks: (Hq,) learned logits that take part in the normalisation only (gpt-oss); None for none.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """Scaled logits as the model caps them, if it does."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True)
class KeyValues:
    """The tokens that a layer stores, padded to the longest head.

    Attributes:
        keys, values: (B, H, N, D) as cached: rotated to their original positions where the model rotates.
        valid: (B, H, N) bool; False for pads and for slots beyond a head's length.
        positions: (B, H, N) int64 positions in the sequence as the cache counts them, left pads counted.
        pads: (B,) int64 left pads per row; `positions - pads` are the model's position ids.
        layer, num_layers: which of the compressed layers this is, and how many there are.
        rotary: the model's rotary embedding; None if the model rotates nothing.
        bias: (B, H, N) float32 added to a token's logits: log c for a token that stands for c merged ones; None for 0.
        output: the layer's output projection as it acts on the values of one KV head; None where it has none.
        attention_layer: the layer's number among all attention layers of the model, sliding ones included, which is
            how measurements count; None where that is `layer`.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    positions: Tensor
    pads: Tensor
    layer: int
    num_layers: int
    rotary: Rotary | None
    bias: Tensor | None = None
    output: OutputProjection | None = None
    attention_layer: int | None = None

    @property
    def true_positions(self) -> Tensor:
        """(B, H, N) position ids as the model counted them, pads not counted, at least 0."""
        return (self.positions - self.pads[:, None, None]).clamp_min(0)


@dataclass(frozen=True)
class Replay:
    """Tokens that are run after the prompt so that a scorer can watch them, and are then taken back.

    Attributes:
        ids: the tokens. start, end: which real tokens of the prompt the pass is about.
    """

    ids: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Queries:
    """The queries of one attention call.

    Attributes:
        states: (B, Hq, Q, D) after the model's normalisation and rotation.
        positions: (Q,) int64 positions in the sequence, left pads counted.
        valid: (B, Q) bool; False for pads.
        softmax: how the model turns logits into attention.
    """

    states: Tensor
    positions: Tensor
    valid: Tensor
    softmax: Softmax


class Scorer:
    """Base of all scorers: higher = keep.

    Class attributes:
        comparable_across_heads: True if scores of different heads mean the same (attention mass does, norms do
            not). Where False, allocators that let heads compete see scores standardised per head.
        needs_rotary: True if the model's rotary embedding must be invertible for this scorer.
        follows_decoding: True if `step` is implemented.
        accumulates: True if the scores of one turn are the state that the next turn begins with.
        state_outlives_eviction: True if the state is of queries, not of stored tokens, so that it stays right when
            tokens are dropped; such scorers can score again while decoding goes on.
        replays: True if `replay` and `observe_replay` are implemented.
        needs_output: True if `stored.output` is used.
        refines: True if `refine` is implemented.
        prunes_channels: True if `choose_channels` is implemented.
        step_needs_attention: True if `step` needs the attention of the new tokens.
    """

    comparable_across_heads: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = False
    follows_decoding: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    state_outlives_eviction: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    needs_output: ClassVar[bool] = False
    refines: ClassVar[bool] = False
    prunes_channels: ClassVar[bool] = False
    step_needs_attention: ClassVar[bool] = False

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """Watch one chunk of the prompt; `stored` already holds the chunk's own tokens.

        Args:
            state: what this method returned for the chunk before, None for the first.

        Returns:
            The new state: a tensor, or a tuple or dict of tensors. Nothing in it may be (B, Hq, N, N).
        """
        return None

    def meet(self, model: Any) -> None:
        """Refuse a model that this scorer cannot serve, before anything runs; for scorers that hold another model."""

    def replay(self, ids: Sequence[int], drafted: Any = None) -> list[Replay]:
        """What to run after a prompt of these real tokens, for scorers that replay.

        Args:
            drafted: what a draft model wrote after the prompt before it was shortened (`core.draft.Drafted`), if any.
        """
        raise NotImplementedError

    def observe_replay(self, state: Any, queries: Queries, stored: KeyValues, replay: Replay) -> Any:
        """Watch the queries of a pass; `stored` holds its own tokens last. Returns the new state."""
        raise NotImplementedError

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """(B, H, N) float32 scores of the stored tokens, finite where valid."""
        raise NotImplementedError

    def rank_heads(self, state: Any, stored: KeyValues) -> Tensor | None:
        """(B, H) how much each KV head matters for this prompt, for allocators that ask; None if that is not known."""
        return None

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """(first, recent): how many tokens at both ends are kept before all others, given the budget."""
        return (0, 0)

    def refine(self, values: Tensor, contenders: Tensor, room: Tensor, stored: KeyValues) -> Tensor:
        """New (B, H, N) values to choose by, now that every head's count is known, for scorers that refine.

        Args:
            values: (B, H, N) the scores by which the budget was given out; H is 1 where whole tokens are chosen.
            contenders: (B, H, N) bool, False for pads and for protected tokens. room: (B, H) how many of them stay.
        """
        raise NotImplementedError

    def choose_channels(self, state: Any, stored: KeyValues, kept: Tensor) -> Tensor:
        """(B, H, C) int64 key channels, sorted, that all but the newest tokens are held with, once a prompt has ended.

        Args:
            kept: (B, H, N) bool, the tokens that stay.
        """
        raise NotImplementedError

    def step(self, scores: Tensor, attention: Tensor | None, positions: Tensor) -> Tensor:
        """New (B, H, N) scores after tokens were decoded.

        Args:
            scores: (B, H, N) scores so far; 0 for the new tokens.
            attention: (B, H, G, Q, N) probabilities of the new tokens' rows if `step_needs_attention`.
            positions: (B, H, N) positions of the stored tokens.
        """
        raise NotImplementedError


def standardised(values: Tensor, valid: Tensor) -> Tensor:
    """Per row and head: subtract the mean and divide by the standard deviation of the valid entries.

    A head whose values differ by rounding noise only is 0 throughout.
    """
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    kept = values.masked_fill(~valid, 0.0)
    mean = kept.sum(-1, keepdim=True) / count
    centred = (values - mean).masked_fill(~valid, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    noise = 16 * torch.finfo(values.dtype).eps * kept.abs().amax(-1, keepdim=True)
    return torch.where(deviation > noise, centred / deviation, 0.0)
