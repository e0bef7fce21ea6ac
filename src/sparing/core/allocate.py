"""Allocators: scores and a budget in, whole numbers of tokens per layer, sequence and KV head out.

Every allocator gives each sequence `tokens_per_head * layers * kv_heads` tokens in all, exactly, and moves them
between layers and heads in its own way. Layers may differ in KV heads. Rows (sequences of a batch) never compete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparing.core.budget import round_to_total, share_of
from sparing.core.token_scores import TokenScores
from sparing.errors import InvalidInputError, require


class Allocator(Protocol):
    """Distributes a budget."""

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """Decide how many tokens every layer, row and KV head keeps.

        Args:
            scores: one per compressed layer, (rows, kv_heads, tokens).
            tokens_per_head: per row, the average that each KV head may keep.

        Returns:
            One (rows, kv_heads) int64 tensor per layer. For every row the sum over layers and heads is
            `tokens_per_head[row]` times the number of (layer, head) pairs, exactly, unless that many tokens
            do not exist; no count exceeds the head's valid tokens.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """Every layer and every head keeps the same number; what a short one cannot hold goes to the others."""

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        level = torch.ones(len(scores), dtype=torch.float64)
        return _stack([_spread(scores, row, level, tokens) for row, tokens in enumerate(tokens_per_head)])


@dataclass(frozen=True)
class Pyramid:
    """Linearly fewer tokens with depth (PyramidKV, arXiv:2406.02069).

    With C = tokens per head, W = `window`, n = the tokens that there are and X = C - W, the last layer keeps W + least
    per head and the first W + most: least = X / beta, most = 2X - least, or where that exceeds the tokens that there
    are, most = n - W, least = 2X - most. Layers between lie on the line. beta = 1 is uniform.

    Attributes:
        beta: how steep, >= 1. The authors' default is 20.
        window: tokens that every layer keeps before the slope is applied (the observation window).
    """

    beta: float = 20.0
    window: int = 32

    def __post_init__(self) -> None:
        require(self.beta >= 1, "Pyramid.beta", self.beta, "a number >= 1")
        require(self.window >= 0, "Pyramid.window", self.window, "a number of tokens >= 0")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        rows = []
        for row, tokens in enumerate(tokens_per_head):
            present = max(int(s.valid[row].sum(-1).max()) for s in scores)
            base = min(self.window, tokens, present)
            slope = min(tokens, present) - base
            most = min(slope * (2 - 1 / self.beta), present - base)
            least = 2 * slope - most
            line = torch.linspace(base + most, base + least, len(scores), dtype=torch.float64)
            rows.append(_spread(scores, row, line, tokens))
        return _stack(rows)


@dataclass(frozen=True)
class Proportional:
    """Tokens in proportion to given weights of heads or layers, each head within [floor, cap].

    Attributes:
        weights: one per layer, or one per (layer, KV head) layer by layer, >= 0.
        floor: the least a head keeps, as a share of the average budget, in [0, 1].
        cap: the most a head keeps, as a multiple of the average budget, >= 1.
    """

    weights: tuple[float, ...]
    floor: float = 0.1
    cap: float = 3.0

    def __post_init__(self) -> None:
        sensible = len(self.weights) > 0 and all(0 <= weight < float("inf") for weight in self.weights)
        require(sensible, "Proportional.weights", self.weights, "one or more finite numbers >= 0")
        require(0 <= self.floor <= 1, "Proportional.floor", self.floor, "a share in [0, 1]")
        require(self.cap >= 1, "Proportional.cap", self.cap, "a multiple >= 1")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        heads = [s.values.shape[1] for s in scores]
        weights = torch.tensor(self.weights, dtype=torch.float64)
        if len(self.weights) == len(scores):
            weights = weights.repeat_interleave(torch.tensor(heads))
        elif len(self.weights) != sum(heads):
            allowed = f"{len(scores)} (one per layer) or {sum(heads)} (one per layer and KV head) of them"
            raise InvalidInputError("Proportional.weights", f"{len(self.weights)} weights", allowed)
        rows = []
        for row, tokens in enumerate(tokens_per_head):
            longest = torch.cat([s.valid[row].sum(-1).cpu() for s in scores])
            total = min(tokens * sum(heads), int(longest.sum()))
            low = longest.clamp_max(share_of(self.floor, tokens))
            high = longest.clamp_max(share_of(min(self.cap, len(weights)), tokens))
            if int(high.sum()) < total:  # short heads: what the cap would waste is given back
                high = longest
            rows.append(round_to_total(weights, total, low, high))
        return list(torch.stack(rows).split(heads, dim=1))


@dataclass(frozen=True)
class AdaptiveHeads:
    """The best tokens of a layer win across its heads (AdaKV, arXiv:2407.11550).

    Each head keeps its protected tokens and, for free, its best `floor` share of what an even split would leave it
    beside them; the rest of the layer's pool goes to the highest scores of all heads.

    Attributes:
        floor: the safeguard, in [0, 1]: 1 is uniform, 0 is pure competition. 0.2 in the authors' experiments.
        layers: how the layers' budgets are set: `Uniform()` or `Pyramid(...)`.
    """

    floor: float = 0.2
    layers: Uniform | Pyramid = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        require(0 <= self.floor <= 1, "AdaptiveHeads.floor", self.floor, "a share in [0, 1]")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        even = self.layers.allocate(scores, tokens_per_head)
        return [
            torch.stack([_compete([_row(layer, row)], counts, self.floor)[0] for row, counts in enumerate(even_layer)])
            for layer, even_layer in zip(scores, even, strict=True)
        ]


@dataclass(frozen=True)
class GlobalTopK:
    """The best tokens of the whole model win, across layers and heads (as in KVzip, arXiv:2505.23416).

    Attributes:
        floor: share of the average (beside the protected tokens) that every head gets for free, in [0, 1]; 0 is
            pure competition.
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.floor <= 1, "GlobalTopK.floor", self.floor, "a share in [0, 1]")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        heads = sum(s.values.shape[1] for s in scores)
        return _stack(
            [
                _compete([_row(s, row) for s in scores], torch.full((heads,), tokens), self.floor)
                for row, tokens in enumerate(tokens_per_head)
            ]
        )


def _compete(groups: list[TokenScores], even: Tensor, floor: float) -> list[Tensor]:
    """Counts per head for one row: what is sure for each head, then the best of all heads together.

    Args:
        groups: scores of (1, kv_heads, tokens) each; token axes may differ in length.
        even: (all kv_heads,) what each head would keep without competition; their sum is given out.
        floor: the share of it, protected tokens set aside, that is sure.
    """
    heads = [g.values.shape[1] for g in groups]
    longest = torch.cat([g.valid[0].sum(-1).cpu() for g in groups])
    pool = min(int(even.sum()), int(longest.sum()))
    guarded = torch.cat([((g.guard > 0) & g.valid)[0].sum(-1).cpu() for g in groups])
    free = torch.tensor([share_of(floor, max(rest, 0)) for rest in (even - guarded).tolist()])
    sure = (guarded + free).minimum(longest)
    if int(sure.sum()) >= pool:  # the protection alone exceeds the pool: shrink it evenly
        return list(round_to_total(sure, pool, high=longest).split(heads))
    contenders = []
    for group, taken in zip(groups, sure.split(heads), strict=True):
        rank = torch.empty_like(group.order)
        rank.scatter_(-1, group.order, torch.arange(rank.shape[-1], device=rank.device).expand_as(rank))
        out = (rank[0] < taken.to(rank.device)[:, None]) | ~group.valid[0]
        contenders.append(group.values[0].masked_fill(out, -torch.inf))
    flat = torch.cat([c.flatten() for c in contenders])
    owner = torch.cat([torch.full((c.numel(),), i) for i, c in enumerate(_heads(contenders))]).to(flat.device)
    winners = torch.sort(flat, descending=True, stable=True).indices[: pool - int(sure.sum())]
    won = torch.bincount(owner[winners], minlength=sum(heads)).cpu()
    return list((sure + won).split(heads))


def _heads(contenders: list[Tensor]) -> list[Tensor]:
    return [head for layer in contenders for head in layer]


def _row(scores: TokenScores, row: int) -> TokenScores:
    """One row's scores, with a row axis of 1."""
    part = slice(row, row + 1)
    return TokenScores(scores.values[part], scores.valid[part], scores.guard[part])


def _spread(scores: list[TokenScores], row: int, level: Tensor, tokens: int) -> list[Tensor]:
    """One row's counts: `tokens` per head on average, layers in proportion to `level`, heads of a layer alike."""
    longest = [s.valid[row].sum(-1).cpu() for s in scores]
    heads = torch.tensor([len(layer) for layer in longest])
    room = torch.stack([layer.sum() for layer in longest])
    total = min(tokens * int(heads.sum()), int(room.sum()))
    per_layer = round_to_total(level * heads, total, high=room).tolist()
    return [
        round_to_total(torch.ones(len(layer)), count, high=layer)
        for layer, count in zip(longest, per_layer, strict=True)
    ]


def _stack(rows: list[list[Tensor]]) -> list[Tensor]:
    """[row][layer] (kv_heads,) → [layer] (rows, kv_heads)."""
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


# By the names that method texts use. `Proportional` is not here: its weights cannot be written as text.
ALLOCATORS: dict[str, type] = {
    "uniform": Uniform,
    "pyramid": Pyramid,
    "adaptive": AdaptiveHeads,
    "global": GlobalTopK,
}
