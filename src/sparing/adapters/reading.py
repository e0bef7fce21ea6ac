"""A layer that drops nothing and reads a part: dense storage with slack, and attention over what the reader chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sparing.core.budget import round_to_total
from sparing.core.reader import Choice, Reader, Step, until
from sparing.core.scorer import KeyValues, Softmax
from sparing.kernels.attend import ROWS, packed_sinks, probabilities

if TYPE_CHECKING:
    from sparing.adapters.cache import EvictingCache
    from sparing.adapters.holding import HoldingLayer

SLACK = 64


class Reading:
    """All tokens of a layer, pads included, in buffers that grow in place.

    Attributes:
        length: tokens held. state: what the reader knows.
        weights: (B, H) the budget of every head at the prompt's end, relative to the other heads of all layers.
        read, seen: tokens read by decoded tokens, and tokens that were there to read, summed over rows and KV heads.
    """

    def __init__(self, keys: Tensor, values: Tensor, reader: Reader) -> None:
        self._keys, self._values, self._reader = keys, values, reader
        self.length = keys.shape[2]
        self.state: Any = None
        self.weights = torch.zeros(0)
        self.read = self.seen = 0

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, N, D) as views."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add (B, H, q, D) tokens; buffers are copied once in many tokens only."""
        end = self.length + keys.shape[2]
        if end > self._keys.shape[2]:
            room = max(SLACK, end // 64) + keys.shape[2]
            self._keys, self._values = (F.pad(t, (0, 0, 0, room)) for t in self.tokens())
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end

    def drop_newest(self, count: int) -> None:
        """Forget the last tokens."""
        self.length -= count
        self.state = None if self.state is None else self._reader.crop(self.state, self.length)

    def select_rows(self, rows: Tensor) -> None:
        """Take the given sequences."""

        def taken(t: Any) -> Any:
            return t.index_select(0, rows.to(t.device)) if isinstance(t, Tensor) else t

        self._keys, self._values, self.weights = taken(self._keys), taken(self._values), taken(self.weights)
        self.state = pytree.tree_map(taken, self.state)

    def clone(self) -> Reading:
        """An independent copy."""
        twin = Reading(self._keys.clone(), self._values.clone(), self._reader)
        twin.state = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self.state)
        twin.length, twin.weights, twin.read, twin.seen = self.length, self.weights, self.read, self.seen
        return twin

    def attend(self, query: Tensor, stored: KeyValues, softmax: Softmax, counts: Tensor) -> Tensor:
        """Attention (B, Hq, 1, Dv) of the newest of the stored tokens, over what the reader chooses.

        Args:
            query: (B, Hq, 1, D). counts: (B, H) tokens that each KV head may read.
        """
        self.state, choice = self._reader.choose(self.state, Step(query[:, :, 0], stored, softmax, counts))
        batch, heads, tokens = stored.keys.shape[:3]
        there = (batch * tokens - int(stored.pads.sum())) * heads
        self.seen += there
        if choice.slots is None:
            self.read += there
            return attend_all(query, stored, softmax)
        return self._attend_choice(query, softmax, choice, choice.slots)

    def _attend_choice(self, query: Tensor, softmax: Softmax, choice: Choice, slots: Tensor) -> Tensor:
        """Lane by lane: what one lane reads fits a processor's cache, and lanes may read different numbers."""
        batch, heads = self._keys.shape[:2]
        states = query[:, :, 0] if choice.query is None else choice.query
        grouped = states.to(self._keys.dtype).reshape(batch, heads, -1, states.shape[-1])
        sinks, lanes = packed_sinks(softmax, heads, 1), []
        for row in range(batch):
            for head in range(heads):
                chosen, real = slots[row, head], None if choice.valid is None else choice.valid[row, head]
                chosen = chosen if real is None else chosen[real]
                values = self._values[row, head].index_select(0, chosen)
                if choice.keys is None:
                    keys = self._keys[row, head].index_select(0, chosen)
                else:
                    keys = choice.keys[row, head] if real is None else choice.keys[row, head, real]
                lanes.append(_lane(grouped[row, head], keys.to(values.dtype), values, softmax, sinks[head]))
                self.read += chosen.shape[0]
        return torch.stack(lanes).view(batch, query.shape[1], 1, -1)


def attend_and_read(layer: HoldingLayer, query: Tensor, softmax: Softmax) -> Tensor:
    """Attention (B, Hq, q, Dv) of a layer that reads: a prompt reads everything; tokens after it a part, one by one."""
    stored, cache = layer.stored_tokens(), layer.cache
    if cache.is_reading:
        return attend_all(query, stored, softmax)
    assert layer.reading is not None
    parts, tokens = [], stored.keys.shape[2]
    for number, state in enumerate(query.split(1, dim=2)):
        after = query.shape[2] - 1 - number
        counts = _tokens_to_read(cache, layer.seen - after)[layer.number].to(query.device)
        parts.append(layer.reading.attend(state, until(stored, tokens - after), softmax, counts))
    return torch.cat(parts, dim=2)


def _tokens_to_read(cache: EvictingCache, seen: int) -> list[Tensor]:
    """[layer] (B, H) tokens that each head reads once `seen` are there, in the proportions of the prompt's end."""
    if cache.to_read[0] != seen:
        weights = [layer.reading.weights for layer in cache.evicting if layer.reading is not None]
        rows = []
        for row, pad in enumerate(cache.pads(cache.evicting[0].rows).tolist()):
            flat = torch.cat([layer[row] for layer in weights])
            total = cache._tokens_per_head(seen - pad) * len(flat)
            rows.append(round_to_total(flat, total, high=torch.full_like(flat, seen - pad)))
        cache.to_read = (seen, list(torch.stack(rows).split([layer.shape[1] for layer in weights], dim=1)))
    return cache.to_read[1]


def attend_all(query: Tensor, stored: KeyValues, softmax: Softmax) -> Tensor:
    """Causal attention (B, Hq, q, Dv) of the newest tokens over everything that is stored."""
    tiles, tokens = [], stored.keys.shape[2]
    for start in range(0, query.shape[2], ROWS):
        stop = min(start + ROWS, query.shape[2])
        tiles.append(_attend_tile(query[:, :, start:stop], until(stored, tokens - query.shape[2] + stop), softmax))
    return torch.cat(tiles, dim=2)


def _attend_tile(query: Tensor, stored: KeyValues, softmax: Softmax) -> Tensor:
    batch, query_heads, count, dim = query.shape
    heads, tokens = stored.keys.shape[1:3]
    groups = query_heads // heads
    mask = None
    if count > 1 or bool(stored.pads.any()):
        causal = torch.ones(count, tokens, dtype=torch.bool, device=query.device).tril(tokens - count)
        mask = (causal & stored.valid[:, :1]).repeat(1, groups, 1)
    grouped = query.reshape(batch, heads, -1, dim)
    if softmax.softcap is None and softmax.sinks is None:
        seen = None if mask is None else mask[:, None]
        out = F.scaled_dot_product_attention(grouped, stored.keys, stored.values, attn_mask=seen, scale=softmax.scaling)
    else:
        sinks, lanes = packed_sinks(softmax, heads, count), []
        for row in range(batch):
            visible = None if mask is None else mask[row]
            for head, part in enumerate(grouped[row]):
                keys, values = stored.keys[row, head], stored.values[row, head]
                lanes.append(_lane(part, keys, values, softmax, sinks[head], visible))
        out = torch.stack(lanes)
    return out.reshape(batch, query_heads, count, -1)


def _lane(
    queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, sinks: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Attention (rows, Dv) of the packed queries (rows, D) of a KV head's group over some of its tokens."""
    if softmax.softcap is None and sinks is None:
        one = (queries[None, None], keys[None, None], values[None, None])
        return F.scaled_dot_product_attention(*one, attn_mask=mask, scale=softmax.scaling)[0, 0]
    return probabilities(queries, keys, softmax, mask, sinks, None).to(values.dtype) @ values
