"""EMS: evict, then merge what resembles a kept token (Li et al. 2024, arXiv:2412.08521).

Ranks: kv_token. Attention summed over the whole prompt favours early tokens, attention of its last rows recent topics;
a token counts if either says so, once both are brought to the same mean:

    glo[h, j] = Σ over all rows i of A[h, i, j],   loc[h, j] = Σ over the last W rows,   both averaged over the group
    s[h, j] = pool_k( max(loc[h, j], glo[h, j] · mean loc / mean glo) ),   the last W tokens are always kept
    window ↔ W = 32,   kernel_size ↔ k = 7

The kept tokens are class centres. Of the others the best are merged and the rest is evicted; a token is merged into the
centre c that it resembles most, by r(j, c) = cos(k_j, k_c) · cos(v_j, v_c), or, if r is below τ, into the zero class,
which means that it is gone. A centre and its members become one token, weighted by their scores, which stands for as
many as they are:

    v = Σ w v / Σ w,   k = (Σ w ‖k‖ / Σ w) · the direction of Σ w k / ‖k‖,   bias += log(number of tokens)
    threshold ↔ τ = 0.6,   mass ↔ the share of all scores up to which tokens are merged, 0.95

Cost: the prompt's column sums, O(n² d) time tile by tile, and O(n · kept · d) for the resemblances.

What was not in the sources that we could read, and is our choice:
1. The maximum, W, k, τ, the share of mass, and weighting by the scores.
2. The bias: with it, merging tokens that are equal changes nothing in any later output.
3. Both cosines must be positive; a product of two negative ones would read as resemblance.
4. A centre keeps its own position. Keys are rotated to different positions, so only what is near, or does not depend
   on the position, resembles; averaging directions and norms apart keeps the merged key from shrinking.
5. Compression happens at the end of the prompt (and of every turn); the paper goes on while decoding.
6. All heads keep equally many tokens; the budget counts centres, so it is honoured exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.actions import Action, Folded
from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.errors import require
from sparing.measures.attention import attention_mass, column_mass, window_rows
from sparing.measures.pooling import check_window, over_group, pool_tokens

# Tokens compared with all centres at a time: bounds the similarities to (ROWS, kept).
ROWS = 1024


@dataclass(frozen=True)
class GlobalLocal(Scorer):
    """s[h, j] = pooled maximum of the attention of the last rows and of all rows, at the same mean.

    Attributes:
        window: rows that make the local score, always kept themselves.
        kernel_size: odd width of the smoothing over neighbours, 1 for none.
    """

    window: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel_size)

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> tuple[Tensor, Queries]:
        """See `Scorer.observe`; the state is the (B, H, N) sums so far and the last rows."""
        sums = over_group(column_mass(queries, stored), stored.keys.shape[1])
        if state is None:
            return sums, window_rows(None, queries, self.window)
        sums[..., : state[0].shape[-1]] += state[0]
        return sums, window_rows(state[1], queries, self.window)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        sums, last = state
        everywhere = torch.nn.functional.pad(sums, (0, stored.keys.shape[2] - sums.shape[-1]))
        local = over_group(attention_mass(last, stored), stored.keys.shape[1])
        before = stored.valid & (stored.positions < last.positions[0])
        means = [x.masked_fill(~before, 0.0).sum(-1, keepdim=True) for x in (local, everywhere)]
        aligned = torch.maximum(local, everywhere * (means[0] / means[1].clamp_min(torch.finfo(torch.float32).tiny)))
        return local.where(~before, pool_tokens(aligned, before, self.kernel_size, "avg"))

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, self.window)


@dataclass(frozen=True)
class Merge(Action):
    """Tokens that resemble a kept one are merged into it; the others are gone.

    Attributes:
        threshold: the least resemblance of a token that is merged; above 1 nothing is.
        mass: share of a head's scores, the kept tokens' included, up to which tokens are merged, best first, in [0, 1].
    """

    threshold: float = 0.6
    mass: float = 0.95
    is_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.threshold >= 0, "threshold", self.threshold, "a number >= 0; above 1 merges nothing")
        require(0 <= self.mass <= 1, "mass", self.mass, "a share in [0, 1]")

    def apply(self, kept: list[list[Tensor]], stored: KeyValues, scores: Tensor) -> Folded:
        """See `Action.apply`."""
        keys, values = stored.keys.clone(), stored.values.clone()
        bias = torch.zeros_like(scores) if stored.bias is None else stored.bias.clone()
        for row, heads in enumerate(kept):
            for head, slots in enumerate(heads):
                if len(slots) == 0:
                    continue
                lane = _Lane(stored, scores, row, head, slots.to(keys.device))
                members, centres = lane.pairs(self.threshold, self.mass)
                if len(members):
                    keys[row, head], values[row, head], bias[row, head] = lane.merged(members, centres, bias[row, head])
        # Without a bias attention is faster, so there is none where nothing was merged.
        return Folded(kept, keys, values, bias if bool(bias.any()) else None, stored.positions)


class _Lane:
    """The tokens of one row and head, in at least float32."""

    def __init__(self, stored: KeyValues, scores: Tensor, row: int, head: int, kept: Tensor) -> None:
        exact = torch.promote_types(stored.keys.dtype, torch.float32)
        self.keys, self.values = stored.keys[row, head].to(exact), stored.values[row, head].to(exact)
        self.valid, self.kept = stored.valid[row, head], kept
        # A score below 0 counts as the least there is, so that weights are weights.
        self.weights = scores[row, head].to(exact).clamp_min(torch.finfo(torch.float32).tiny)

    def pairs(self, threshold: float, mass: float) -> tuple[Tensor, Tensor]:
        """The slots that are merged, and the slots of the centres that they are merged into."""
        others = self.valid.clone()
        others[self.kept] = False
        order = torch.sort(self.weights.masked_fill(~others, -torch.inf), descending=True, stable=True).indices
        order = order[: int(others.sum())]
        so_far = self.weights[self.kept].sum() + self.weights[order].cumsum(0)
        members = order[so_far <= mass * self.weights.masked_fill(~self.valid, 0.0).sum() * (1 + 1e-6)]
        best = [self._most_alike(part) for part in members.split(ROWS)]
        if not best:
            return members, members
        likeness, centre = (torch.cat(parts) for parts in zip(*best, strict=True))
        merged = likeness >= threshold
        return members[merged], self.kept[centre[merged]]

    def _most_alike(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """The largest resemblance of every member, and the centre that it is with."""
        of_keys, of_values = (_cosines(x[members], x[self.kept]) for x in (self.keys, self.values))
        likeness = (of_keys * of_values).masked_fill((of_keys <= 0) | (of_values <= 0), -1.0)
        best: tuple[Tensor, Tensor] = likeness.max(-1)
        return best

    def merged(self, members: Tensor, centres: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and bias of the lane with the members folded into the centres."""
        # A centre is a member of its own class.
        sources, targets = torch.cat([self.kept, members]), torch.cat([self.kept, centres])
        weights = self.weights[sources] / self._sum(self.weights[sources], targets)[targets]
        norms = self.keys.norm(dim=-1, keepdim=True)
        parts = (self.keys / norms.clamp_min(torch.finfo(norms.dtype).tiny), norms, self.values)
        direction, norm, value = (self._sum(x[sources] * weights[:, None], targets) for x in parts)
        key = torch.nn.functional.normalize(direction, dim=-1) * norm
        count = self._sum(bias.to(weights.dtype).exp()[sources], targets)
        changed = torch.zeros_like(self.valid)
        changed[centres] = True  # what got no member stays as it was, bit for bit
        return (
            torch.where(changed[:, None], key, self.keys),
            torch.where(changed[:, None], value, self.values),
            torch.where(changed, count.clamp_min(1.0).log().float(), bias),
        )

    def _sum(self, x: Tensor, targets: Tensor) -> Tensor:
        return x.new_zeros(len(self.valid), *x.shape[1:]).index_add_(0, targets, x)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


@register(
    "ems", paper="2412.08521", summary="what the whole prompt or its last rows attend to; what resembles it merged"
)
@dataclass(frozen=True)
class EMS(Method):
    """Evict, then merge.

    Attributes:
        window: last rows with a score of their own, always kept themselves (32).
        kernel_size: odd width of the average over neighbours (7).
        threshold: the least resemblance of a token that is merged (0.6); above 1 nothing is.
        mass: share of a head's scores up to which tokens are merged (0.95).
    """

    window: int = 32
    kernel_size: int = 7
    threshold: float = 0.6
    mass: float = 0.95

    def parts(self) -> Parts:
        """See `Method.parts`."""
        action = Merge(self.threshold, self.mass)
        return Parts(GlobalLocal(self.window, self.kernel_size), Uniform(), action=action)
