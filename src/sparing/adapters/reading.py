"""A layer that drops nothing and reads a part: dense storage with slack, and attention over what the reader chose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sparing.core.reader import Choice, Reader, Step
from sparing.core.scorer import KeyValues, Softmax
from sparing.kernels.attend import probabilities

SLACK = 64


class Reading:
    """All tokens of a layer, pads included, in buffers that grow in place.

    Attributes:
        length: tokens held. read, seen: tokens read by decoded tokens, and tokens that were there to read, summed over
            rows and KV heads.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.length = keys.shape[2]
        self.state: Any = None
        self.begun = False
        self.number = 0
        self.last_query: Tensor | None = None
        self.read = self.seen = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, slack and the reader's own knowledge included."""
        return self._keys.nbytes + self._values.nbytes + _bytes_of(self.state)

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
        """Forget the last tokens; the reader begins anew."""
        self.length -= count
        self.begun = False

    def select_rows(self, rows: Tensor) -> None:
        """Take the given sequences; the reader begins anew."""
        rows = rows.to(self._keys.device)
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
        self.last_query = None if self.last_query is None else self.last_query.index_select(0, rows)
        self.begun = False

    def clone(self) -> Reading:
        """An independent copy; the reader begins anew."""
        twin = Reading(self._keys.clone(), self._values.clone())
        twin.length, twin.last_query = self.length, self.last_query
        twin.read, twin.seen = self.read, self.seen
        return twin

    def attend(self, query: Tensor, stored: KeyValues, softmax: Softmax, reader: Reader, counts: Tensor) -> Tensor:
        """Attention (B, Hq, q, Dv) of the newest tokens: of one over the reader's choice, of several over everything.

        Args:
            query: (B, Hq, q, D). counts: (B,) tokens that each KV head may read.
        """
        if query.shape[2] > 1:
            self.begun, self.last_query = False, query[:, :, -1]
            return _attend_all(query, stored, softmax)
        step = Step(query[:, :, 0], stored, softmax, counts, self.number)
        if not self.begun:
            before = step.query if self.last_query is None else self.last_query
            self.state = reader.begin(replace(step, query=before, stored=_without_newest(stored), number=0))
            self.begun, self.number = True, 0
            step = replace(step, number=0)
        self.state, choice = reader.choose(self.state, step)
        self.number += 1
        self.seen += int(stored.valid.sum())
        self.last_query = step.query
        return self._attend_choice(query, stored, softmax, choice)

    def _attend_choice(self, query: Tensor, stored: KeyValues, softmax: Softmax, choice: Choice) -> Tensor:
        batch, heads, _, dim = stored.keys.shape
        keys, values, valid = stored.keys, stored.values, stored.valid
        if choice.slots is not None:
            index = choice.slots[..., None]
            keys = choice.keys if choice.keys is not None else keys.gather(2, index.expand(-1, -1, -1, dim))
            values = values.gather(2, index.expand(-1, -1, -1, values.shape[-1]))
            valid = torch.ones_like(choice.slots, dtype=torch.bool) if choice.valid is None else choice.valid
        self.read += int(valid.sum())
        states = query[:, :, 0] if choice.query is None else choice.query
        grouped = states.reshape(batch, heads, -1, dim)
        if softmax.softcap is None and softmax.sinks is None:
            out = F.scaled_dot_product_attention(
                grouped, keys.to(grouped.dtype), values, attn_mask=valid[:, :, None], scale=softmax.scaling
            )
        else:
            out = _explicit(grouped, keys, values, valid[:, :, None], softmax, 1)
        return out.reshape(batch, query.shape[1], 1, -1)


def _attend_all(query: Tensor, stored: KeyValues, softmax: Softmax) -> Tensor:
    """Causal attention of the newest tokens over everything."""
    batch, query_heads, count, dim = query.shape
    heads, tokens = stored.keys.shape[1:3]
    groups = query_heads // heads
    causal = torch.ones(count, tokens, dtype=torch.bool, device=query.device).tril(tokens - count)
    mask = (causal & stored.valid[:, :, None]).repeat(1, 1, groups, 1)
    grouped = query.reshape(batch, heads, -1, dim)
    if softmax.softcap is None and softmax.sinks is None:
        out = F.scaled_dot_product_attention(grouped, stored.keys, stored.values, attn_mask=mask, scale=softmax.scaling)
    else:
        out = _explicit(grouped, stored.keys, stored.values, mask, softmax, count)
    return out.reshape(batch, query_heads, count, -1)


def _explicit(grouped: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softmax: Softmax, count: int) -> Tensor:
    """With a softcap or learned sinks, which the fused attention does not offer."""
    batch, heads, rows = grouped.shape[:3]
    sinks = None
    if softmax.sinks is not None:
        sinks = softmax.sinks.float().view(heads, -1).repeat_interleave(count, dim=1)
    lanes = []
    for row in range(batch):
        for head in range(heads):
            visible = mask[row, head].expand(rows, -1)
            own = None if sinks is None else sinks[head]
            weights = probabilities(grouped[row, head], keys[row, head], softmax, visible, own, None)
            lanes.append(weights.to(values.dtype) @ values[row, head])
    return torch.stack(lanes).view(batch, heads, rows, -1)


def _without_newest(stored: KeyValues) -> KeyValues:
    cut = slice(None, -1)
    return replace(
        stored, keys=stored.keys[:, :, cut], values=stored.values[:, :, cut], valid=stored.valid[:, :, cut],
        positions=stored.positions[:, :, cut],
    )  # fmt: skip


def _bytes_of(state: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))
