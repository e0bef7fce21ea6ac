"""Keys and values whose length differs per sequence and KV head, packed without padding.

A *lane* is one (sequence, KV head) pair: lane = sequence * kv_heads + head. All lanes lie one after another in
flat buffers, each with some slack to grow into, so that appending a token writes one row per lane and copies
nothing; when they are full, all are laid out again with new slack (amortised: once in `slack` tokens). Lanes of any
length grow by the same tokens, so all get the same slack and are full together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MIN_SLACK = 16
# Slack is this share of the mean lane: 1.6 % more bytes, for one re-layout every length/64 tokens.
SLACK_SHARE = 1 / 64


@dataclass(frozen=True)
class Padded:
    """Copies of all lanes, padded to the longest: keys (B, H, N, D), values (B, H, N, Dv), the others (B, H, N)."""

    keys: Tensor
    values: Tensor
    valid: Tensor
    positions: Tensor
    scores: Tensor | None
    bias: Tensor | None


@dataclass
class RaggedStore:
    """The tokens of one layer.

    Attributes:
        rows, kv_heads: sequences and KV heads; `rows * kv_heads` lanes.
        keys: (capacity, D). values: (capacity, Dv). positions: (capacity,) int32 positions in the sequence.
        scores: (capacity,) float32, only for methods that follow decoding.
        bias: (capacity,) float32, added to a token's attention logits: log c for a token that stands for c; None for 0.
        starts: (lanes,) int64, where each lane begins. lengths: (lanes,) int64, tokens it holds.
        capacities: (lanes,) int64, tokens it has room for.
    """

    rows: int
    kv_heads: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None
    bias: Tensor | None
    starts: Tensor
    lengths: Tensor
    capacities: Tensor
    _length_list: list[int] = field(default_factory=list)
    _start_list: list[int] = field(default_factory=list)
    _room: int = 0

    @classmethod
    def pack(
        cls,
        kept: list[list[Tensor]],
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        scores: Tensor | None,
        bias: Tensor | None = None,
    ) -> RaggedStore:
        """Copy the kept tokens of padded tensors into new storage.

        Args:
            kept: [row][kv_head] → slots to keep, in order.
            keys, values: (B, H, N, D). positions, scores, bias: (B, H, N); the last two may be None.
        """
        rows, heads = keys.shape[:2]
        lanes = [lane for row in kept for lane in row]
        lengths = torch.tensor([len(lane) for lane in lanes])
        store = cls._empty(rows, heads, lengths, keys, values, scores is not None, bias is not None)
        sources = [s.flatten(0, 1) for s in (keys, values, positions, scores, bias) if s is not None]
        for lane, (slots, (start, length)) in enumerate(zip(lanes, store.spans, strict=True)):
            for source, buffer in zip(sources, store._buffers(), strict=True):
                # Lane by lane: one indexed copy of everything takes twice as long.
                buffer[start : start + length] = source[lane].index_select(0, slots.to(source.device))
        return store

    @classmethod
    def _empty(
        cls,
        rows: int,
        heads: int,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        is_scored: bool,
        is_biased: bool,
        room: int = 0,
    ) -> RaggedStore:
        slack = max(MIN_SLACK, room, int(lengths.double().mean() * SLACK_SHARE))
        capacities = lengths + slack
        total, device = int(capacities.sum()), keys.device
        store = cls(
            rows,
            heads,
            keys.new_empty(total, keys.shape[-1]),
            values.new_empty(total, values.shape[-1]),
            torch.empty(total, dtype=torch.int32, device=device),
            torch.zeros(total, device=device) if is_scored else None,
            torch.zeros(total, device=device) if is_biased else None,
            (capacities.cumsum(0) - capacities).to(device),
            lengths.to(device),
            capacities.to(device),
        )
        store._refresh_lists()
        return store

    def _refresh_lists(self) -> None:
        """Copy to plain Python what every decoded token asks for: reading tensors would cost more than attention."""
        self._length_list, self._start_list = self.lengths.tolist(), self.starts.tolist()
        self._room = int((self.capacities - self.lengths).min())

    def _lengthen(self, count: int) -> None:
        """Note that every lane holds `count` more tokens (or fewer)."""
        self.lengths += count
        self._length_list = [length + count for length in self._length_list]
        self._room -= count

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.keys.device

    @property
    def dims(self) -> tuple[int, int]:
        """Channels of keys and of values."""
        return self.keys.shape[-1], self.values.shape[-1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one head."""
        return sum(self.dims) * self.keys.element_size()

    @property
    def croppable(self) -> int:
        """How many of the newest tokens can be taken back."""
        return min(self._length_list)

    @property
    def nbytes(self) -> int:
        """Bytes held, slack and bookkeeping included."""
        tensors = [self.keys, self.values, self.positions, self.starts, self.lengths, self.capacities]
        return sum(t.nbytes for t in (*tensors, self.scores, self.bias) if t is not None)

    @property
    def even(self) -> int | None:
        """The common length if all lanes are equally long and have equal room, else None."""
        lengths, starts = self._length_list, self._start_list
        if lengths.count(lengths[0]) != len(lengths):
            return None
        stride = starts[1] - starts[0] if len(starts) > 1 else self.keys.shape[0]
        evenly = starts == [i * stride for i in range(len(starts))] and self.keys.shape[0] == stride * len(starts)
        return lengths[0] if evenly else None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first index, length) of every lane in the flat buffers."""
        return list(zip(self._start_list, self._length_list, strict=True))

    def lane(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys (n, D) and values (n, Dv) of a lane, as views."""
        part = slice(self._start_list[index], self._start_list[index] + self._length_list[index])
        return self.keys[part], self.values[part]

    def lane_of(self, name: str, index: int) -> Tensor | None:
        """A lane's part of a buffer, as a view; None if there is no such buffer."""
        buffer, start = getattr(self, name), self._start_list[index]
        return None if buffer is None else buffer[start : start + self._length_list[index]]

    def lane_bias(self, index: int) -> Tensor | None:
        """(n,) bias of a lane's tokens."""
        return self.lane_of("bias", index)

    def lane_positions(self, index: int) -> Tensor:
        """(n,) positions of a lane's tokens."""
        positions = self.lane_of("positions", index)
        assert positions is not None
        return positions

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, n, D) as views; only when `even`."""
        length = self.even
        assert length is not None
        shape = (self.rows, self.kv_heads, -1)
        keys = self.keys.view(*shape, self.keys.shape[-1])
        return keys[:, :, :length], self.values.view(*shape, self.values.shape[-1])[:, :, :length]

    def _index(self) -> tuple[Tensor, Tensor]:
        """(B, H, N) flat index of every slot of lanes that are padded to the longest, and which slots are real."""
        slots = torch.arange(max(self._length_list), device=self.keys.device)
        valid = slots < self.lengths[:, None]
        index = (self.starts[:, None] + slots).masked_fill(~valid, 0)
        return index.view(self.rows, self.kv_heads, -1), valid.view(self.rows, self.kv_heads, -1)

    def padded(self) -> Padded:
        """Copies of all lanes, padded to the longest."""
        index, _ = self._index()
        return replace(self.bookkeeping(), keys=self.keys[index], values=self.values[index])

    def bookkeeping(self) -> Padded:
        """As `padded`, with empty keys and values."""
        index, valid = self._index()
        scores, bias = (
            None if buffer is None else buffer[index].masked_fill(~valid, 0.0) for buffer in (self.scores, self.bias)
        )
        nothing = self.keys.new_empty(0)
        return Padded(nothing, nothing, valid, self.positions[index].long(), scores, bias)

    def _buffers(self) -> list[Tensor]:
        """Everything that has one entry per stored token."""
        buffers = (self.keys, self.values, self.positions, self.scores, self.bias)
        return [buffer for buffer in buffers if buffer is not None]

    # -- changing -----------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Add (B, H, q, D) tokens to the end of every lane; the first of them has the given position."""
        count = keys.shape[2]
        if self._room < count:
            self._lay_out(torch.arange(self.rows * self.kv_heads, device=self.keys.device), room=count)
        index = self.starts + self.lengths
        if count == 1:  # every decoded token and layer: as few operations as possible
            self.positions.index_fill_(0, index, position)
        else:
            steps = torch.arange(count, device=self.keys.device)
            index = (index[:, None] + steps).flatten()
            self.positions[index] = (position + steps).int().repeat(self.rows * self.kv_heads)
        self.keys.index_copy_(0, index, keys.reshape(-1, keys.shape[-1]))
        self.values.index_copy_(0, index, values.reshape(-1, values.shape[-1]))
        for buffer in (self.scores, self.bias):
            if buffer is not None:
                buffer.index_fill_(0, index, 0.0)
        self._lengthen(count)

    def drop_newest(self, count: int) -> None:
        """Forget the last `count` tokens of every lane."""
        self._lengthen(-count)

    def drop_one(self, victims: Tensor, lanes: Tensor) -> None:
        """Remove one slot of some lanes; the lane's last token takes its place (order does not matter to attention).

        Args:
            victims: (lanes,) slots within the lane. lanes: (lanes,) bool, which lanes lose one.
        """
        hole, last = (self.starts + victims)[lanes], (self.starts + self.lengths - 1)[lanes]
        for buffer in self._buffers():
            buffer[hole] = buffer[last]
        self.lengths -= lanes.long()
        self._refresh_lists()

    def take(self, slots: list[Tensor]) -> RaggedStore:
        """A store with the given slots of every lane, in the given order."""
        lengths = torch.tensor([len(chosen) for chosen in slots])
        has = (self.scores is not None, self.bias is not None)
        new = self._empty(self.rows, self.kv_heads, lengths, self.keys, self.values, *has)
        for lane, (chosen, (target, length)) in enumerate(zip(slots, new.spans, strict=True)):
            begin = self._start_list[lane]
            for mine, fresh in zip(self._buffers(), new._buffers(), strict=True):
                fresh[target : target + length] = mine[begin : begin + self._length_list[lane]].index_select(0, chosen)
        return new

    def select(self, kept: list[list[Tensor]], scores: Tensor | None) -> RaggedStore:
        """A store with the given slots only.

        Args:
            kept: [row][kv_head] → slots in the order of `padded`. scores: (B, H, N) to remember, or None.
        """
        slots = [chosen.to(self.keys.device) for row in kept for chosen in row]
        new = self.take(slots)
        new.scores = None if scores is None else torch.zeros(new.keys.shape[0], device=self.keys.device)
        if scores is not None and new.scores is not None:
            for lane, (chosen, (start, length)) in enumerate(zip(slots, new.spans, strict=True)):
                new.scores[start : start + length] = scores.flatten(0, 1)[lane, chosen]
        return new

    def write_scores(self, scores: Tensor) -> None:
        """Remember (B, H, N) scores, in the order of `padded`."""
        assert self.scores is not None
        index, valid = self._index()
        self.scores[index[valid]] = scores[valid]

    def select_rows(self, rows: Tensor) -> None:
        """Take the given sequences, in order, repeats allowed (beam search, batch selection)."""
        rows = rows.to(self.starts.device)
        heads = torch.arange(self.kv_heads, device=rows.device)
        self.rows = len(rows)
        self._lay_out((rows[:, None] * self.kv_heads + heads).flatten())

    def _lay_out(self, lanes: Tensor, room: int = 0) -> None:
        """Copy the given lanes into fresh storage with slack for at least `room` more tokens."""
        begins = self.starts[lanes].tolist()
        lengths = self.lengths[lanes].cpu()
        has = (self.scores is not None, self.bias is not None)
        new = self._empty(self.rows, self.kv_heads, lengths, self.keys, self.values, *has, room)
        for begin, target, length in zip(begins, new._start_list, new._length_list, strict=True):
            for mine, fresh in zip(self._buffers(), new._buffers(), strict=True):
                # Slices, not one indexed copy of everything: three times as fast, and decoding waits for it.
                fresh[target : target + length] = mine[begin : begin + length]
        self.__dict__.update(new.__dict__)

    def clone(self) -> RaggedStore:
        """An independent copy."""
        twin = copy.copy(self)
        twin.__dict__.update({name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)})
        twin._refresh_lists()
        return twin
