"""Slow and obvious: attention in float64 with plain loops, and the cases that the fast code is compared on.

Nothing here imports the code under test, only the data types that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparing.core.scorer import KeyValues, Queries, Rotary, Softmax
from sparing.testing.checks.scoring import one_row, replayed

EPS = 2.0**-24  # half a unit in the last place of a float32 near 1


@dataclass(frozen=True)
class Case:
    """The queries of a whole prompt and what is stored after it."""

    queries: Queries
    stored: KeyValues

    @property
    def tokens(self) -> int:
        return self.stored.keys.shape[2]

    def chunks(self, sizes: Iterable[int]) -> Iterator[tuple[Queries, KeyValues]]:
        """The prompt as the scorer meets it: the chunk's queries, and the tokens stored up to its end."""
        start = 0
        for size in sizes:
            part, end = slice(start, start + size), start + size
            queries, stored = self.queries, self.stored
            yield (
                replace(
                    queries,
                    states=queries.states[:, :, part],
                    positions=queries.positions[part],
                    valid=queries.valid[:, part],
                ),
                replace(
                    stored,
                    keys=stored.keys[:, :, :end],
                    values=stored.values[:, :, :end],
                    valid=stored.valid[:, :, :end],
                    positions=stored.positions[:, :, :end],
                ),
            )
            start = end
        assert start == self.tokens

    def score(self, scorer, sizes: Iterable[int] | None = None) -> Tensor:
        """What the scorer says after it has watched the prompt, in chunks of the given sizes."""
        if scorer.replays and self.stored.keys.shape[0] > 1:  # one sequence at a time, as caches do
            rows = [Case(*one_row(self.queries, self.stored, row)) for row in range(self.stored.keys.shape[0])]
            return torch.cat([row.score(scorer, sizes) for row in rows])
        state = None
        for queries, stored in self.chunks(sizes or [self.tokens]):
            state = scorer.observe(state, queries, stored)
        if scorer.replays:
            state = replayed(scorer, state, self.queries, self.stored)
        return scorer.score(state, self.stored)

    def alone(self, row: int) -> Case:
        """One row without its pads, as a batch of one."""
        pad = int(self.stored.pads[row])
        queries, stored = self.queries, self.stored
        kv_heads, real = stored.keys.shape[1], self.tokens - pad
        return Case(
            Queries(
                queries.states[row : row + 1, :, pad:],
                torch.arange(real),
                torch.ones(1, real, dtype=torch.bool),
                queries.softmax,
            ),
            replace(
                stored,
                keys=stored.keys[row : row + 1, :, pad:],
                values=stored.values[row : row + 1, :, pad:],
                valid=torch.ones(1, kv_heads, real, dtype=torch.bool),
                positions=torch.arange(real).expand(1, kv_heads, -1),
                pads=torch.zeros(1, dtype=torch.int64),
            ),
        )


def build(
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    softmax: Softmax | None = None,
    rotary: Rotary | None = None,
) -> Case:
    """A case from (B, Hq, N, D) queries and (B, H, N, D) keys: every token of the prompt is a query and a key."""
    rows, kv_heads, tokens, dim = keys.shape
    left = torch.tensor(pads or [0] * rows)
    positions = torch.arange(tokens)
    valid = positions >= left[:, None]
    return Case(
        Queries(queries, positions, valid, softmax or Softmax(dim**-0.5)),
        KeyValues(
            keys,
            keys.clone() if values is None else values,
            valid[:, None].expand(rows, kv_heads, tokens),
            positions.expand(rows, kv_heads, tokens),
            left,
            layer=0,
            num_layers=2,
            rotary=rotary,
        ),
    )


def random_case(seed: int = 0, tokens: int = 13, dim: int = 8, kv_heads: int = 2, group: int = 2, **more) -> Case:
    """Three rows with 0, 3 and 7 left pads."""
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(3, kv_heads * group, tokens, dim, generator=g) * 1.5
    keys = torch.randn(3, kv_heads, tokens, dim, generator=g) * 1.5
    values = torch.randn(3, kv_heads, tokens, dim, generator=g)
    return build(queries, keys, values, pads=(0, 3, 7), **more)


def dense_attention(queries: Queries, stored: KeyValues) -> list:
    """A[b][h][i][j]: the softmax of q_i · k_j over the keys that are valid and not after row i, one number a time."""
    rows, heads, count, _ = queries.states.shape
    group = heads // stored.keys.shape[1]
    q, k = queries.states.double().tolist(), stored.keys.double().tolist()
    valid, where, at = stored.valid.tolist(), stored.positions.tolist(), queries.positions.tolist()
    tokens = stored.keys.shape[2]
    result = [[[[0.0] * tokens for _ in range(count)] for _ in range(heads)] for _ in range(rows)]
    for b in range(rows):
        for h in range(heads):
            kv = h // group
            for i in range(count):
                seen = [j for j in range(tokens) if valid[b][kv][j] and where[b][kv][j] <= at[i]]
                logits = [_logit(q[b][h][i], k[b][kv][j], queries.softmax) for j in seen]
                total = sum(math.exp(x) for x in logits)
                if queries.softmax.sinks is not None:
                    total += math.exp(float(queries.softmax.sinks[h]))
                for j, x in zip(seen, logits, strict=True):
                    result[b][h][i][j] = math.exp(x) / total
    return result


def _logit(q: list[float], k: list[float], softmax: Softmax) -> float:
    logit = softmax.scaling * sum(a * b for a, b in zip(q, k, strict=True))
    return logit if softmax.softcap is None else softmax.softcap * math.tanh(logit / softmax.softcap)


def attention_error(case: Case, summed_rows: int = 1) -> float:
    """What float32 may lose in attention summed over rows: a logit is off by at most D ε |q||k| s, a sum by N ε."""
    size = case.queries.states.norm(dim=-1).max() * case.stored.keys.norm(dim=-1).max() * case.queries.softmax.scaling
    dim, tokens = case.stored.keys.shape[-1], case.tokens
    return float(2 * EPS * (dim * size + tokens) * summed_rows)


class PlainRotary:
    """Rotary position embedding by its definition: the pair (x_i, x_{i + d/2}) turns by position * base^(-2i/d)."""

    def __init__(self, dim: int, base: float = 100.0) -> None:
        self.frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def matrix(self, position: int) -> Tensor:
        """(D, D) float64."""
        half = len(self.frequencies)
        result = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
        for i, angle in enumerate((position * self.frequencies).tolist()):
            result[i, i] = result[i + half, i + half] = math.cos(angle)
            result[i, i + half], result[i + half, i] = -math.sin(angle), math.sin(angle)
        return result

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None, :, None] * self.frequencies
        first, second = x.double().chunk(2, dim=-1)
        turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        return torch.cat(turned, dim=-1).float()

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotate(x, -positions)


def kept_positions(order: Tensor, count: int) -> list[int]:
    """The first `count` of one head's order, sorted."""
    return sorted(order[:count].tolist())
