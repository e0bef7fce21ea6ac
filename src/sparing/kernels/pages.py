"""Pages of tokens whose keys and values are coded: how they are made and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sparing.kernels.coding import decode, encode


@dataclass
class Pages:
    """Coded tokens, P pages of T slots each, in the order of their lanes.

    Attributes:
        lanes: (P,) int64, whose they are. counts: (P,) int64, tokens that they hold, in their first slots.
        keys: (P, T, ...) codes, or numbers as the model made them. key_scales, key_zeros: (P, channels).
        values: (P, T, ...) likewise. value_scales, value_zeros: (P, T).
        positions: (P, T) int32. scores, bias: (P, T) float32 or None; see `RaggedStore`.
    """

    lanes: Tensor
    counts: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    value_scales: Tensor | None
    value_zeros: Tensor | None
    key_scales: Tensor | None
    key_zeros: Tensor | None
    scores: Tensor | None
    bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Pages:
        """The same function of every tensor."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(tensor) for name, tensor in found.items() if tensor is not None})

    def where(self, pages: Tensor | slice) -> Pages:
        """Some of the pages; views for a slice."""
        return self.map(lambda tensor: tensor[pages])

    def per_slot(self) -> dict[str, Tensor]:
        """Everything that has one entry per slot."""
        names = ("keys", "values", "positions", "value_scales", "value_zeros", "scores", "bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def filled(self) -> Tensor:
        """(P, T) bool: slots that hold a token."""
        return torch.arange(self.positions.shape[1], device=self.counts.device) < self.counts[:, None]


@dataclass(frozen=True)
class Coding:
    """How pages hold numbers.

    Attributes:
        bits: 8 or 4; None to hold numbers as the model made them.
        channels: (lanes, C) int64, key channels that are held, sorted; None for all. The others count as 0.
        dims: channels of keys and values. dtype: what the model computes in.
    """

    bits: int | None
    channels: Tensor | None
    dims: tuple[int, int]
    dtype: torch.dtype

    def of_lanes(self, lanes: Tensor) -> Coding:
        """The same for other lanes."""
        return self if self.channels is None else replace(self, channels=self.channels[lanes])

    def encode(
        self,
        lane: int,
        page: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        scores: Tensor | None,
        bias: Tensor | None,
    ) -> Pages:
        """Tokens (n, ...) of a lane in pages of `page` slots, the last of them perhaps not full."""
        count = keys.shape[0]
        # The last token fills up a page: it changes no minimum and no maximum.
        index = torch.arange(-(-count // page) * page, device=keys.device).clamp_max(count - 1)
        keys, values, positions = (t[index].unflatten(0, (-1, page)) for t in (keys, values, positions))
        scores, bias = (None if t is None else t[index].view(-1, page) for t in (scores, bias))
        if self.channels is not None:
            keys = keys[..., self.channels[lane]]
        counts = torch.full((keys.shape[0],), page, device=keys.device)
        counts[-1] -= len(index) - count
        key_scales = key_zeros = value_scales = value_zeros = None
        if self.bits is not None:
            keys, key_scales, key_zeros = encode(keys, 1, self.bits)
            values, value_scales, value_zeros = encode(values, 2, self.bits)
        scales = (value_scales, value_zeros, key_scales, key_zeros)
        return Pages(torch.full_like(counts, lane), counts, keys, values, positions, *scales, scores, bias)

    def decode(self, pages: Pages) -> tuple[Tensor, Tensor]:
        """Keys (P, T, D) and values (P, T, Dv)."""
        keys, values = pages.keys, pages.values
        if self.bits is not None:
            assert pages.key_scales is not None
            assert pages.key_zeros is not None
            assert pages.value_scales is not None
            assert pages.value_zeros is not None
            width = self.dims[0] if self.channels is None else self.channels.shape[1]
            keys = decode(keys, pages.key_scales, pages.key_zeros, 1, self.bits, width)
            values = decode(values, pages.value_scales, pages.value_zeros, 2, self.bits, self.dims[1])
        if self.channels is not None:
            index = self.channels[pages.lanes][:, None].expand(-1, keys.shape[1], -1)
            keys = keys.new_zeros(*keys.shape[:2], self.dims[0]).scatter_(2, index, keys)
        return keys.to(self.dtype), values.to(self.dtype)
