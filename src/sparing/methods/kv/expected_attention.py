"""Expected Attention: what future queries will look at, in closed form (Devoto et al. 2025, arXiv:2510.00636).

Ranks: kv_token. Future queries are taken as Gaussian with the prompt's own mean μ and covariance Σ (before
rotation), moved to the average of the next T positions by R̄ = mean over p = n..n+T-1 of the rotation R_p:

    μ' = R̄ μ,  Σ' = R̄ Σ R̄ᵀ
    z[h, j] = k_j · μ' / √d + k_jᵀ Σ' k_j / (2 d)        (the log of E[exp(q·k/√d)])
    s[h, j] = (softmax_j z, mean over the group, + epsilon) · ||v_j||₂
    n_future ↔ T = 512, sinks ↔ 4 first tokens protected and left out of μ, Σ, epsilon ↔ 0

Cost: O(n d²) per query head for the quadratic form, O(d²) memory per head.

Deviations:
1. Queries before rotation are recovered by inverting the model's own rotation, not recomputed from hidden states.
2. Scaled by the model's own `scaling` s where it is not 1/√d: z = s k·μ' + s² kᵀΣ'k / 2.
3. The softmax is over all tokens. The authors' code (kvpress) leaves the protected first ones out of it, which
   changes how much each query head of a group counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.errors import require
from sparing.measures.pooling import over_group
from sparing.measures.queries import Moments, add_moments


@dataclass(frozen=True)
class ExpectedAttentionScore(Scorer):
    """s[h, j] = expected attention of future queries to key j, times the size of its value.

    Attributes:
        n_future: future positions averaged over.
        sinks: first tokens that are protected, and whose queries are left out of the statistics.
        epsilon: added to the expected attention before it meets the value's norm.
    """

    n_future: int = 512
    sinks: int = 4
    epsilon: float = 0.0
    needs_rotary: ClassVar[bool] = True
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.n_future >= 1, "n_future", self.n_future, "a number of positions >= 1")
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")
        require(self.epsilon >= 0, "epsilon", self.epsilon, "a number >= 0")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> tuple[Moments, float]:
        """See `Scorer.observe`; the state is the queries' moments and the model's scaling."""
        positions = queries.positions[None, :] - stored.pads[:, None]
        states = queries.states
        if stored.rotary is not None:
            states = stored.rotary.unrotate(states, positions.clamp_min(0))
        counts = queries.valid & (positions >= self.sinks)
        moments = add_moments(state[0] if state is not None else None, states, counts)
        return moments, queries.softmax.scaling

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        moments, scaling = state
        mean, covariance = moments.mean, moments.covariance
        if stored.rotary is not None:
            turn = self._mean_rotation(stored, mean.shape[-1])
            mean = (turn @ mean[..., None])[..., 0]
            covariance = turn @ covariance @ turn.transpose(-1, -2)
        kv_heads = stored.keys.shape[1]
        keys = stored.keys.float()
        expected = keys.new_empty(keys.shape[0], mean.shape[1], keys.shape[2])
        for head in range(mean.shape[1]):  # one query head at a time bounds the (N, D) intermediate
            k = keys[:, head // (mean.shape[1] // kv_heads)]
            first = (k @ mean[:, head, :, None])[..., 0] * scaling
            second = ((k @ covariance[:, head]) * k).sum(-1) * (scaling**2 / 2)
            expected[:, head] = first + second
        valid = stored.valid.repeat_interleave(mean.shape[1] // kv_heads, dim=1)
        mass = expected.masked_fill(~valid, -torch.inf).softmax(-1)
        return (over_group(mass, kv_heads) + self.epsilon) * stored.values.float().norm(dim=-1)

    def _mean_rotation(self, stored: KeyValues, dim: int) -> Tensor:
        """(B, 1, D, D): the average of the rotations at the next `n_future` positions of every row."""
        assert stored.rotary is not None
        seen = stored.true_positions.masked_fill(~stored.valid, -1).amax((1, 2)) + 1
        future = seen[:, None] + torch.arange(self.n_future, device=seen.device)
        total = torch.zeros(seen.shape[0], 1, dim, dim, device=seen.device)
        for axis in torch.eye(dim, device=seen.device):  # the map is linear: rotate each axis, average
            moved = axis.expand(seen.shape[0], 1, self.n_future, dim)
            index = int(axis.argmax())
            total[..., index] = stored.rotary.rotate(moved, future).mean(2)
        return total

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (self.sinks, 0)


@register(
    "expected_attention",
    paper="2510.00636",
    summary="the tokens that future queries are expected to attend to, weighted by the value",
)
@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Gaussian estimate of the attention to come.

    Attributes:
        n_future: future positions averaged over (512).
        sinks: first tokens that are protected (4).
        epsilon: added before the value's norm (0).
    """

    n_future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(ExpectedAttentionScore(self.n_future, self.sinks, self.epsilon), Uniform())
