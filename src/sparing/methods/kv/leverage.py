"""Leverage scores, and Compactor, which blends them with attention (Chari and Van Durme 2025, arXiv:2507.08143).

Ranks: kv_token. Query-agnostic: what is asked later plays no part. Leverage is by the keys before rotation, centred
over the sequence, after a Gaussian sketch Φ: how little the other keys explain a key.

    X = (K - mean K) Φ,   Φ ∈ R^{d × k}, entries N(0, 1/k),     l_j = x_jᵀ (XᵀX + ε I)⁻¹ x_j
    sketch ↔ k = 48, jitter ↔ ε = 0.01

Compactor adds the attention that a token gets from its surroundings in both directions. The prompt is cut into chunks
of c tokens; inside a chunk every row sees every key:

    m_j = Σ over the rows i of j's chunk of softmax(q_i · k)_j, mean over the group,     a = pool_3(m · ‖v‖)
    s = λ z(l) + z(a),   z = (x - mean) / deviation
    chunk ↔ c = 256,   blend ↔ λ = the share that is dropped (0.35 where `keep` is no ratio)

Cost: O(n k²) for leverage, O(n c d) for the attention. The sketch is seeded and the same for every row and head, so
results repeat and batches agree.

Deviations:
1. Keys before rotation are recovered by inverting the model's own rotation.
2. The first 8 and last 4 tokens are protected, as in kvpress, and do not count in Compactor's means and deviations:
   they do not compete, and a sink would flatten all others.
3. The Gram matrix is solved in float64 by its eigenvectors: in float32 ε drowns beside large keys.
4. Logits are scaled (and capped) as the model does it. The authors' engine and kvpress leave out 1/sqrt(d).
5. A short last chunk is a softmax over the tokens that are there. kvpress gives its padding a share of the attention.
6. z is per sequence and KV head. In kvpress the "head-wise" statistics are over all heads and the whole batch.
7. Tokens of earlier turns have no queries any more, so their attention counts as average and leverage decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer, standardised
from sparing.errors import require
from sparing.measures.attention import bidirectional_mass, joined, rows_from
from sparing.measures.keys import centred, leverage
from sparing.measures.pooling import over_group, pool_tokens


@dataclass(frozen=True)
class LeverageScore(Scorer):
    """s[h, j] = leverage of key j among the keys of its head, in [0, 1].

    Attributes:
        sketch: width of the Gaussian sketch; 0 for none (exact leverage).
        jitter: added to the diagonal of the Gram matrix.
        first, recent: tokens protected at both ends.
        seed: of the sketch.
    """

    sketch: int = 48
    jitter: float = 0.01
    first: int = 8
    recent: int = 4
    seed: int = 0
    comparable_across_heads: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.sketch >= 0, "sketch", self.sketch, "a width >= 1, or 0 for none")
        require(self.jitter >= 0, "jitter", self.jitter, "a number >= 0")

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        keys = stored.keys.float()
        if stored.rotary is not None:
            heads = [
                stored.rotary.unrotate(keys[:, h : h + 1], stored.true_positions[:, h]) for h in range(keys.shape[1])
            ]
            keys = torch.cat(heads, dim=1)
        x = centred(keys, stored.valid)
        if self.sketch:
            generator = torch.Generator().manual_seed(self.seed)
            phi = torch.randn(keys.shape[-1], self.sketch, generator=generator) / self.sketch**0.5
            x = x @ phi.to(x.device)
        return leverage(x, self.jitter)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (self.first, self.recent)


@dataclass(frozen=True)
class Chunks:
    """What both-sided attention has been seen so far.

    Attributes:
        start: (B,) position of the first token that has a query.
        mass: (B, H, T) attention of the tokens from there on, of all complete chunks.
        queries: those of the tokens after them, in any row.
        end: position after the last token that was seen.
    """

    start: Tensor
    mass: Tensor
    queries: Queries
    end: int


@dataclass(frozen=True)
class LeverageAndAttention(LeverageScore):
    """s[h, j] = λ · leverage + attention inside the token's chunk, each standardised per head.

    Attributes:
        chunk: tokens that see each other.
        blend: λ, the weight of leverage.
    """

    chunk: int = 256
    blend: float = 0.35
    state_outlives_eviction: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.chunk >= 1, "chunk", self.chunk, "a number of tokens >= 1")
        require(0 <= self.blend < float("inf"), "blend", self.blend, "a finite weight >= 0")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Chunks:
        """See `Scorer.observe`."""
        end, mass = (
            int(queries.positions[-1]) + 1,
            stored.keys.new_zeros(*stored.keys.shape[:2], 0, dtype=torch.float32),
        )
        if state is None:
            state = Chunks(torch.maximum(stored.pads, queries.positions[0]), mass, queries, end)
        else:
            state = replace(state, queries=joined(state.queries, queries), end=end)
        while int(state.start.max()) + state.mass.shape[-1] + self.chunk <= end:  # complete in every row
            state = self._with_next_chunk(state, stored)
        read = int(state.start.min()) + state.mass.shape[-1] - int(state.queries.positions[0])
        return replace(state, queries=rows_from(state.queries, read))

    def _with_next_chunk(self, state: Chunks, stored: KeyValues) -> Chunks:
        """One more chunk; at the prompt's end it may be short, and nothing may be left of rows that began early."""
        wanted = (state.start + state.mass.shape[-1])[:, None] + torch.arange(self.chunk, device=state.start.device)
        there = wanted < state.end
        wanted = wanted.clamp_max(state.end - 1)
        dim, heads = stored.keys.shape[-1], stored.keys.shape[1]
        rows = (wanted - state.queries.positions[0])[:, None, :, None].expand(
            -1, state.queries.states.shape[1], -1, dim
        )
        slots = _slots(stored, wanted)[..., None].expand(-1, -1, -1, dim)
        states, keys = state.queries.states.gather(2, rows), stored.keys.gather(2, slots)
        mass = over_group(bidirectional_mass(states, keys, there, state.queries.softmax), heads)
        return replace(state, mass=torch.cat([state.mass, mass], dim=-1))

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        while int(state.start.min()) + state.mass.shape[-1] < state.end:
            state = self._with_next_chunk(state, stored)
        index = stored.positions - state.start[:, None, None]
        has_queries = stored.valid & (index >= 0) & (index < state.mass.shape[-1])
        mass = state.mass.gather(-1, index.clamp(0, state.mass.shape[-1] - 1))
        norms = stored.values.float().masked_fill(~stored.valid[..., None], 0.0).norm(dim=-1)
        attention = pool_tokens(mass * norms, has_queries, 3, "avg")
        competes = (stored.true_positions >= self.first) & (stored.positions < state.end - self.recent) & stored.valid
        rare = standardised(super().score(None, stored), competes)
        return self.blend * rare + standardised(attention, competes & has_queries)


def _slots(stored: KeyValues, positions: Tensor) -> Tensor:
    """(B, H, C) slots of the tokens at the given (B, C) positions, which lie without a gap up to the newest."""
    ordered = stored.positions.masked_fill(~stored.valid, -1)
    newest = ordered.amax(-1)
    return (ordered.argmax(-1) - newest)[..., None] + positions[:, None]


@register("leverage", paper="2507.08143", summary="the tokens whose keys the other keys do not explain (Compactor)")
@dataclass(frozen=True)
class Leverage(Method):
    """Statistical leverage of the keys.

    Attributes:
        sketch: width of the Gaussian sketch (48); 0 for exact leverage.
        jitter: added to the diagonal of the Gram matrix (0.01).
        seed: of the sketch.
    """

    sketch: int = 48
    jitter: float = 0.01
    seed: int = 0

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(LeverageScore(self.sketch, self.jitter, seed=self.seed), Uniform())


@register("compactor", paper="2507.08143", summary="rare keys, and tokens that their surroundings attend to both ways")
@dataclass(frozen=True)
class Compactor(Method):
    """Leverage blended with both-sided attention.

    Attributes:
        chunk: tokens that see each other (256).
        sketch: width of the Gaussian sketch (48); 0 for exact leverage.
        jitter: added to the diagonal of the Gram matrix (0.01).
        blend: weight of leverage; below 0: the share that is dropped, or 0.35 where `keep` is no ratio.
        seed: of the sketch.
    """

    chunk: int = 256
    sketch: int = 48
    jitter: float = 0.01
    blend: float = -1.0
    seed: int = 0

    def parts(self) -> Parts:
        """See `Method.parts`."""
        by_keep = 1.0 - self.budget.amount if self.budget.kind == "ratio" else 0.35
        blend = by_keep if self.blend < 0 else self.blend
        scorer = LeverageAndAttention(self.sketch, self.jitter, seed=self.seed, chunk=self.chunk, blend=blend)
        return Parts(scorer, Uniform())
