"""Allocators: scores and a budget in, whole numbers of tokens per layer, sequence and KV head out.

Every allocator gives each sequence `tokens_per_head * layers * kv_heads` tokens in all, exactly, and moves them
between layers and heads in its own way. Layers may differ in KV heads. Rows (sequences of a batch) never compete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparing.core.budget import round_to_total
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError


class Allocator(Protocol):
    """Distributes a budget."""

    def allocate(self, scores: list[Scores], tokens_per_head: list[int]) -> list[Tensor]:
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
    """Every layer and every head keeps the same number."""

    def allocate(self, scores: list[Scores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        return _split_within_layers(scores, _equal_layers(scores, tokens_per_head))


@dataclass(frozen=True)
class Pyramid:
    """Linearly fewer tokens with depth (PyramidKV, arXiv:2406.02069).

    With C = tokens per head and W = `window`, X = C - W, the first layer keeps W + 2X - X/beta per head and the
    last W + X/beta; layers between lie on the line. beta = 1 is uniform.

    Attributes:
        beta: how steep, >= 1. The authors' default is 20.
        window: tokens that every layer keeps before the slope is applied (the observation window).
    """

    beta: float = 20.0
    window: int = 32

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise InvalidInputError("Pyramid.beta", self.beta, "a number >= 1")

    def allocate(self, scores: list[Scores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        layers = len(scores)
        per_row = []
        for row, tokens in enumerate(tokens_per_head):
            base = min(self.window, tokens)
            least = (tokens - base) / self.beta
            most = 2 * (tokens - base) - least
            line = torch.linspace(base + most, base + least, layers, dtype=torch.float64)
            if layers == 1:
                line = torch.ones(1, dtype=torch.float64)
            # A layer's count is the same for its heads, so the ceiling is its shortest head.
            longest = torch.tensor([int(s.valid[row].sum(-1).min()) for s in scores])
            per_row.append(round_to_total(line, tokens * layers, high=longest))
        return _split_within_layers(scores, torch.stack(per_row, dim=1))


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
        if not 0 <= self.floor <= 1:
            raise InvalidInputError("Proportional.floor", self.floor, "a share in [0, 1]")
        if not self.cap >= 1:
            raise InvalidInputError("Proportional.cap", self.cap, "a multiple >= 1")

    def allocate(self, scores: list[Scores], tokens_per_head: list[int]) -> list[Tensor]:
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
            low = torch.full_like(longest, int(self.floor * tokens)).minimum(longest)
            high = torch.full_like(longest, int(self.cap * tokens)).minimum(longest)
            total = tokens * sum(heads)
            if int(high.sum()) < total:  # short heads: what the cap would waste is given back
                high = longest
            rows.append(round_to_total(weights, min(total, int(high.sum())), low, high))
        return list(torch.stack(rows).split(heads, dim=1))


@dataclass(frozen=True)
class AdaptiveHeads:
    """The best tokens of a layer win across its heads (AdaKV, arXiv:2407.11550).

    Each head first gets its best `floor` share of the average for free (and its protected tokens); the rest of
    the layer's pool goes to the highest scores of all heads.

    Attributes:
        floor: the safeguard, in [0, 1]: 1 is uniform, 0 is pure competition. The authors' default is 0.2.
        layers: how the layers' budgets are set: `Uniform()` or `Pyramid(...)`.
    """

    floor: float = 0.2
    layers: Uniform | Pyramid = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        _check_floor("AdaptiveHeads.floor", self.floor)

    def allocate(self, scores: list[Scores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        per_layer = self.layers.allocate(scores, tokens_per_head)
        result = []
        for layer, even in zip(scores, per_layer, strict=True):
            rows = [
                _compete([_row(layer, row)], int(even[row].sum()), int(self.floor * int(even[row, 0])))[0]
                for row in range(even.shape[0])
            ]
            result.append(torch.stack(rows))
        return result


@dataclass(frozen=True)
class GlobalTopK:
    """The best tokens of the whole model win, across layers and heads (as in KVzip, arXiv:2505.23416).

    Attributes:
        floor: share of the average that every head gets for free, in [0, 1]; 0 is pure competition.
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_floor("GlobalTopK.floor", self.floor)

    def allocate(self, scores: list[Scores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        heads = sum(s.values.shape[1] for s in scores)
        rows = [
            _compete([_row(s, row) for s in scores], tokens * heads, int(self.floor * tokens))
            for row, tokens in enumerate(tokens_per_head)
        ]
        return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def _compete(groups: list[Scores], pool: int, free: int) -> list[Tensor]:
    """Counts per head for one row: `free` each (and protected tokens), then the best of all heads together.

    Args:
        groups: scores of (1, kv_heads, tokens) each; token axes may differ in length.
        pool: tokens to give out in all.
        free: tokens that every head gets before the competition.
    """
    heads = [g.values.shape[1] for g in groups]
    longest = torch.cat([g.valid[0].sum(-1).cpu() for g in groups])
    pool = min(pool, int(longest.sum()))
    guarded = torch.cat([((g.guard > 0) & g.valid)[0].sum(-1).cpu() for g in groups])
    sure = guarded.clamp_min(free).minimum(longest)
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


def _row(scores: Scores, row: int) -> Scores:
    """One row's scores, with a row axis of 1."""
    part = slice(row, row + 1)
    return Scores(scores.values[part], scores.valid[part], scores.guard[part])


def _equal_layers(scores: list[Scores], tokens_per_head: list[int]) -> Tensor:
    """(layers, rows): the same tokens per head for every layer."""
    return torch.tensor(tokens_per_head).expand(len(scores), -1)


def _split_within_layers(scores: list[Scores], per_layer: Tensor) -> list[Tensor]:
    """Give each head of a layer the layer's tokens per head; a head too short for it hands the rest on."""
    result = []
    for layer, tokens in zip(scores, per_layer, strict=True):
        longest = layer.valid.sum(-1).cpu()
        rows = []
        for row in range(longest.shape[0]):
            heads = longest.shape[1]
            total = min(int(tokens[row]) * heads, int(longest[row].sum()))
            rows.append(round_to_total(torch.ones(heads), total, high=longest[row]))
        result.append(torch.stack(rows))
    return result


def _check_floor(what: str, floor: float) -> None:
    if not 0 <= floor <= 1:
        raise InvalidInputError(what, floor, "a share in [0, 1]")


ALLOCATORS: dict[str, type] = {
    "uniform": Uniform,
    "pyramid": Pyramid,
    "proportional": Proportional,
    "adaptive": AdaptiveHeads,
    "global": GlobalTopK,
}
