"""Allocators that know which heads or layers matter: from a measurement, or from what the scorer saw of the prompt.

Measured importances are written per attention layer of the model, sliding ones included; `TokenScores.layer` says which
of them a compressed layer is. All give each sequence `tokens_per_head * layers * kv_heads` tokens, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.budget import round_to_total, share_of
from sparing.core.token_scores import TokenScores
from sparing.errors import ScoresMismatchError, require

# [attention layer of the model][KV head]
Importances = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class FullHeads:
    """The most important heads keep everything, the others share what is left evenly.

    Heads are taken in order of importance as long as all others still get `least` tokens (or all that they have).

    Attributes:
        importances: one number per (attention layer, KV head); equal ones go by lower index.
        least: tokens that a head needs that does not keep everything (sinks and recent ones).
        most: heads that may keep everything; None for as many as the budget allows.
    """

    importances: Importances
    least: int = 68
    most: int | None = None

    def __post_init__(self) -> None:
        require(self.least >= 0, "FullHeads.least", self.least, "a number of tokens >= 0")
        require(self.most is None or self.most >= 0, "FullHeads.most", self.most, "a number of heads >= 0, or None")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        importance, heads = _importances(self.importances, scores)
        rows = []
        for row, tokens in enumerate(tokens_per_head):
            longest = _longest(scores, row)
            total = min(tokens * sum(heads), int(longest.sum()))
            rows.append(_full_then_even(importance, longest, total, longest.clamp_max(self.least), self.most))
        return list(torch.stack(rows).split(heads, dim=1))


@dataclass(frozen=True)
class FullHeadsByLayer:
    """In every layer the heads that the scorer ranks first keep everything, fewer of them with depth (Task-KV).

    Layer r of R gives everything to the share first - (first - last) · r / (R - 1) of its heads, rounded (half up), or
    to as many as the layer's even budget allows if the others are to keep their protected tokens; these share the rest.

    Attributes:
        first, last: share of heads in the first and the last layer, in [0, 1].
    """

    first: float = 0.25
    last: float = 0.125

    def __post_init__(self) -> None:
        require(0 <= self.first <= 1, "FullHeadsByLayer.first", self.first, "a share in [0, 1]")
        require(0 <= self.last <= 1, "FullHeadsByLayer.last", self.last, "a share in [0, 1]")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        counts = Uniform().allocate(scores, tokens_per_head)
        for number, layer in enumerate(scores):
            heads = layer.values.shape[1]
            share = self.first - (self.first - self.last) * number / max(len(scores) - 1, 1)
            most = int(share * heads + 0.5)
            guarded = ((layer.guard > 0) & layer.valid).sum(-1).cpu()
            for row in range(len(tokens_per_head)):
                importance = torch.zeros(heads) if layer.heads is None else layer.heads[row].cpu()
                longest, total = _longest([layer], row), int(counts[number][row].sum())
                counts[number][row] = _full_then_even(importance, longest, total, guarded[row], most)
        return counts


@dataclass(frozen=True)
class WeightedHeads:
    """So many tokens for every head, and the rest of the budget in proportion to importance (HeadKV).

    Attributes:
        importances: one number per (attention layer, KV head); none counts as less than 0.
        base: tokens that every head gets first (a window). even: share of the rest that is spread evenly, in [0, 1].
    """

    importances: Importances
    base: int = 8
    even: float = 0.0

    def __post_init__(self) -> None:
        require(self.base >= 0, "WeightedHeads.base", self.base, "a number of tokens >= 0")
        require(0 <= self.even <= 1, "WeightedHeads.even", self.even, "a share in [0, 1]")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        importance, heads = _importances(self.importances, scores)
        weights = self.even / len(importance) + (1 - self.even) * _normalised(importance)
        rows = []
        for row, tokens in enumerate(tokens_per_head):
            longest = _longest(scores, row)
            rows.append(_base_then_weighted(weights, longest, tokens, self.base, longest))
        return list(torch.stack(rows).split(heads, dim=1))


@dataclass(frozen=True)
class WeightedLayers:
    """So many tokens for every layer, the rest in proportion to its importance; heads of a layer alike (CompressKV).

    Attributes:
        importances: one number per attention layer; none counts as less than 0.
        base: tokens that every head gets first. cap: the most that a head gets, as a multiple of the average.
    """

    importances: tuple[float, ...]
    base: int = 32
    cap: float = 3.0

    def __post_init__(self) -> None:
        require(self.base >= 0, "WeightedLayers.base", self.base, "a number of tokens >= 0")
        require(self.cap >= 1, "WeightedLayers.cap", self.cap, "a multiple >= 1")

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        table = tuple((number,) * s.values.shape[1] for number, s in zip(self._layers(scores), scores, strict=True))
        heads = [len(row) for row in table]
        weights = _normalised(torch.tensor([row[0] for row in table], dtype=torch.float64))
        rows = []
        for row, tokens in enumerate(tokens_per_head):
            longest = _longest(scores, row)
            shortest = torch.stack([lengths.min() for lengths in longest.split(heads)])
            high = shortest.clamp_max(share_of(min(self.cap, len(heads)), tokens))
            levels = _base_then_weighted(weights, shortest, tokens, self.base, high)
            rows.append(_exactly(levels.repeat_interleave(torch.tensor(heads)), tokens * sum(heads), longest))
        return list(torch.stack(rows).split(heads, dim=1))

    def _layers(self, scores: list[TokenScores]) -> list[float]:
        return [row[0] for row in _rows(tuple((number,) for number in self.importances), scores)]


def _full_then_even(importance: Tensor, longest: Tensor, total: int, least: Tensor, most: int | None) -> Tensor:
    """Counts of some heads: all of the best ones while every other can have its `least`; the rest in equal parts."""
    order = torch.sort(importance, descending=True, stable=True).indices[:most]
    cost = (longest - least)[order].cumsum(0)
    full = order[: int((cost <= total - int(least.sum())).sum())]
    counts = torch.zeros_like(longest)
    counts[full] = longest[full]
    others = torch.ones(len(longest), dtype=torch.bool)
    others[full] = False
    counts[others] = round_to_total(torch.ones(int(others.sum())), total - int(counts.sum()), high=longest[others])
    return counts


def _base_then_weighted(weights: Tensor, longest: Tensor, tokens: int, base: int, high: Tensor) -> Tensor:
    """Counts of `tokens` on average: `base` each (or all there is), the rest by weight, none above `high`."""
    total = min(tokens * len(longest), int(longest.sum()))
    if int(high.sum()) < total:  # what a cap would waste is given back
        high = longest
    first = high.clamp_max(min(base, tokens))
    return first + round_to_total(weights, total - int(first.sum()), high=high - first)


def _exactly(counts: Tensor, total: int, longest: Tensor) -> Tensor:
    """The counts, brought to the total by the same number everywhere: needed only where layers differ in heads."""
    missing = min(total, int(longest.sum())) - int(counts.sum())
    room = longest - counts if missing > 0 else counts
    change = round_to_total(torch.ones(len(counts)), abs(missing), high=room)
    return counts + change if missing > 0 else counts - change


def _normalised(importance: Tensor) -> Tensor:
    """Shares that sum to 1; equal ones where nothing is important."""
    weights = importance.clamp_min(0)
    total = float(weights.sum())
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))


def _longest(scores: Sequence[TokenScores], row: int) -> Tensor:
    """(all kv_heads,) tokens that each head has."""
    return torch.cat([s.valid[row].sum(-1).cpu() for s in scores])


def _importances(table: Importances, scores: list[TokenScores]) -> tuple[Tensor, list[int]]:
    """The importance of every head of the compressed layers, float64, and how many heads each layer has.

    Raises:
        ScoresMismatchError: they are of another model.
    """
    found = []
    for row, layer in zip(_rows(table, scores), scores, strict=True):
        heads = layer.values.shape[1]
        if heads == 1:  # a layer that evicts whole tokens matters as much as its best head
            row = (max(row),)
        if len(row) != heads:
            problem = f"importances of {len(row)} KV heads were given for a layer of {heads}"
            raise ScoresMismatchError(problem, "measure this model")
        found.append(row)
    flat = torch.tensor([number for row in found for number in row], dtype=torch.float64)
    return flat.nan_to_num(-math.inf), [len(row) for row in found]


def _rows(table: Importances, scores: list[TokenScores]) -> Importances:
    """The rows of the compressed layers.

    Raises:
        ScoresMismatchError: there are fewer rows than layers.
    """
    layers = [number if s.layer is None else s.layer for number, s in enumerate(scores)]
    if max(layers) >= len(table):
        problem = f"importances of {len(table)} layers were given for a model with a layer {max(layers)}"
        raise ScoresMismatchError(problem, "measure this model")
    return tuple(table[layer] for layer in layers)
