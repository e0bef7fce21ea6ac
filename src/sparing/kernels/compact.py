"""Keys and values of which only the newest are held as the model made them; older ones are held in less memory.

Each lane (see `ragged`) is a list of *pages* of `PAGE` tokens and, after them, a *window*: a `RaggedStore` with the
newest `RECENT` to `RECENT + PAGE - 1` tokens. When new tokens come and a window holds more, its oldest `PAGE` tokens
become a page. While decoding there are empty pages to write into, so this costs next to nothing. Tokens that came with
the same call always meet each other unchanged.

A page holds codes of 8 or 4 bits (KIVI, arXiv:2402.02750): keys share a scale and a zero per channel of the page,
values per token. Keys may hold a part of their channels only (ThinK, arXiv:2407.21018); the others count as 0.

A token that is dropped leaves its page; the codes of the others stay as they are, so that no error adds up. Once the
pages of a lane are half empty, their tokens are coded anew into full ones.

Deviations from KIVI: values share one scale over all channels of a token, not over 32 of them. A window never holds
fewer than `RECENT` tokens; KIVI's can be empty. Pages have 64 tokens, not 32, since scales are float32 here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from sparing.kernels.pages import Coding, Pages
from sparing.kernels.ragged import Padded, RaggedStore

PAGE = 64
RECENT = 32


@dataclass
class CompactStore:
    """The tokens of one layer, with the interface of `RaggedStore`.

    Attributes:
        coding: how pages hold numbers.
        window: the newest tokens. pages: the others; None if there are none.
    """

    coding: Coding
    window: RaggedStore
    pages: Pages | None = None
    _held: list[int] = field(default_factory=list)  # tokens in the pages of each lane
    _used: list[int] = field(default_factory=list)  # pages of each lane up to the last that holds any
    _first: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (lanes + 1,) first pages

    @classmethod
    def pack(cls, window: RaggedStore, bits: int | None, channels: Tensor | None = None) -> CompactStore:
        """Take over a store.

        Args:
            bits: 8 or 4; None to hold numbers as the model made them.
            channels: (rows, kv_heads, C) int64, key channels that are held, sorted; None for all.
        """
        flat = None if channels is None else channels.flatten(0, 1)
        store = cls(Coding(bits, flat, window.dims, window.keys.dtype), window)
        store._refresh()
        store.fill_pages()
        return store

    def _refresh(self) -> None:
        lanes = self.rows * self.kv_heads
        if self.pages is None or not len(self.pages.lanes):
            self.pages, self._held, self._used = None, [0] * lanes, [0] * lanes
            self._first = torch.zeros(lanes + 1, dtype=torch.int64, device=self.device)
            return
        held = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        self._held = held.index_add(0, self.pages.lanes, self.pages.counts).tolist()
        self._first = torch.searchsorted(self.pages.lanes, torch.arange(lanes + 1, device=self.device))
        place = torch.arange(len(self.pages.lanes), device=self.device) - self._first[self.pages.lanes] + 1
        used = torch.zeros_like(held).scatter_reduce(0, self.pages.lanes, place * (self.pages.counts > 0), "amax")
        self._used = used.tolist()

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.window.rows

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.window.kv_heads

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.window.device

    @property
    def dims(self) -> tuple[int, int]:
        """Channels of keys and of values, as the model has them."""
        return self.window.dims

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one head, as the model makes them."""
        return self.window.bytes_per_token

    @property
    def lengths(self) -> Tensor:
        """(lanes,) int64, tokens held."""
        return self.window.lengths + torch.tensor(self._held, device=self.device)

    @property
    def scores(self) -> Tensor | None:
        """Scores of the window's tokens; None for methods that do not follow decoding."""
        return self.window.scores

    @property
    def nbytes(self) -> int:
        """Bytes held, scales, slack and bookkeeping included."""
        own = [] if self.pages is None else [getattr(self.pages, f.name) for f in fields(Pages)]
        return self.window.nbytes + sum(t.nbytes for t in (*own, self.coding.channels, self._first) if t is not None)

    @property
    def croppable(self) -> int:
        """How many of the newest tokens can be taken back."""
        lengths = zip(self.window.lengths.tolist(), self._held, strict=True)
        return min((length for length, held in lengths if held), default=self.window.croppable)

    @property
    def first_pages(self) -> Tensor:
        """(lanes + 1,) int64: lane i has the pages from the i-th entry up to the next."""
        return self._first

    def lane(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys (n, D) and values (n, Dv) of a lane, decoded."""
        keys, values = self.window.lane(index)
        if self.pages is None or not self._held[index]:
            return keys, values
        part = self.lane_pages(index)
        old_keys, old_values = self.coding.decode(part)
        filled = part.filled
        return torch.cat([old_keys[filled], keys]), torch.cat([old_values[filled], values])

    def lane_pages(self, index: int) -> Pages:
        """A lane's pages, as views."""
        assert self.pages is not None
        return self.pages.where(slice(*self._first[index : index + 2].tolist()))

    def lane_bias(self, index: int) -> Tensor | None:
        """(n,) bias of a lane's tokens."""
        return self._of_lane("bias", index)

    def lane_positions(self, index: int) -> Tensor:
        """(n,) positions of a lane's tokens."""
        positions = self._of_lane("positions", index)
        assert positions is not None
        return positions

    def _of_lane(self, name: str, index: int) -> Tensor | None:
        own = self.window.lane_of(name, index)
        if own is None or self.pages is None:
            return own
        part = slice(*self._first[index : index + 2].tolist())
        return torch.cat([getattr(self.pages, name)[part][self.pages.filled[part]], own])

    def padded(self) -> Padded:
        """Copies of all lanes, decoded and padded to the longest."""
        known = self.bookkeeping()
        lanes = [self.lane(i) for i in range(self.rows * self.kv_heads)]
        longest = known.valid.shape[-1]

        def stack(parts: list[Tensor]) -> Tensor:
            padded = [torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[0])) for part in parts]
            return torch.stack(padded).view(*known.valid.shape, -1)

        keys, values = stack([keys for keys, _ in lanes]), stack([values for _, values in lanes])
        return Padded(keys, values, known.valid, known.positions, known.scores, known.bias)

    def bookkeeping(self) -> Padded:
        """As `padded`, with empty keys and values."""
        known = self.window.bookkeeping()
        if self.pages is None:
            return known
        shape = (self.rows * self.kv_heads, int(self.lengths.max()))
        held = torch.tensor(self._held, device=self.device)
        slots = torch.arange(shape[1], device=self.device)
        valid = slots < self.lengths[:, None]
        old, new = slots < held[:, None], valid & (slots >= held[:, None])

        def merge(name: str, empty: Tensor) -> Tensor:
            assert self.pages is not None
            empty[old] = getattr(self.pages, name)[self.pages.filled].to(empty.dtype)
            empty[new] = getattr(known, name)[known.valid]
            return empty.view(self.rows, self.kv_heads, -1)

        scores, bias = (
            None if getattr(known, name) is None else merge(name, torch.zeros(shape, device=self.device))
            for name in ("scores", "bias")
        )
        positions = merge("positions", torch.zeros(shape, dtype=torch.int64, device=self.device))
        nothing = known.keys.new_empty(0)
        return Padded(nothing, nothing, valid.view_as(positions), positions, scores, bias)

    # -- changing -----------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Add (B, H, q, D) tokens to the end of every lane; the first of them has the given position."""
        self.fill_pages()
        self.window.append(keys, values, position)

    def fill_pages(self) -> None:
        """Code the oldest tokens of every window that has grown beyond its size."""
        whole = [max(length - RECENT, 0) // PAGE * PAGE for _, length in self.window.spans]
        if not any(whole):
            return
        coded, rest = [], []
        for lane, count in enumerate(whole):
            # A step scorer's window may have lost its order: the oldest go first.
            order = self.window.lane_positions(lane).argsort(stable=True)
            rest.append(order[count:])
            if count:
                coded.append(self._coded(lane, self.window, order[:count]))
        self.window = self.window.take(rest)
        if not self._write(coded):
            old = [] if self.pages is None else [self.pages.where(self.pages.counts > 0)]
            self._replace_pages([*old, *coded, *([self._empty_like(coded[0])] if old else [])])
        self._close_gaps()

    def _coded(self, lane: int, source: RaggedStore, slots: Tensor) -> Pages:
        """Some tokens of a lane as pages, the last of them perhaps not full."""
        parts = {name: source.lane_of(name, lane) for name in ("keys", "values", "positions", "scores", "bias")}
        taken = {name: None if part is None else part[slots] for name, part in parts.items()}
        return self.coding.encode(lane, PAGE, **taken)  # type: ignore[arg-type]

    def _write(self, coded: Sequence[Pages]) -> bool:
        """Put new pages into empty ones of their lanes; False, and nothing is done, if there are not enough."""
        first = self._first.tolist()
        for part in coded:
            lane, count = int(part.lanes[0]), len(part.lanes)
            if self.pages is None or first[lane] + self._used[lane] + count > first[lane + 1]:
                return False
        assert self.pages is not None
        for part in coded:
            lane, count = int(part.lanes[0]), len(part.lanes)
            begin = first[lane] + self._used[lane]
            for f in fields(Pages):
                mine, new = getattr(self.pages, f.name), getattr(part, f.name)
                if mine is not None:
                    mine[begin : begin + count] = new
            self._used[lane] += count
            self._held[lane] += int(part.counts.sum())
        return True

    def _empty_like(self, pages: Pages) -> Pages:
        """Empty pages for every lane: 1.6 % of what there is, but at least one, so that copies of all are rare."""
        lanes, there = self.rows * self.kv_heads, 0 if self.pages is None else len(self.pages.lanes)
        spare = max(there // lanes // 64, 1)
        empty = pages.map(lambda tensor: tensor.new_zeros(lanes * spare, *tensor.shape[1:]))
        empty.lanes = torch.arange(lanes, device=self.device).repeat_interleave(spare)
        return empty

    def _replace_pages(self, parts: Sequence[Pages]) -> None:
        """Hold these, in the order of their lanes."""
        order = torch.cat([part.lanes for part in parts]).argsort(stable=True)

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)[order]

        self.pages = Pages(**{f.name: joined(f.name) for f in fields(Pages)})  # type: ignore[arg-type]
        self._refresh()

    def _close_gaps(self) -> None:
        """Code anew what lies in pages that are half empty, lane by lane; forget empty ones."""
        assert self.pages is not None
        pages, sizes = self.pages, zip(self._used, self._held, strict=True)
        thin = [lane for lane, (used, held) in enumerate(sizes) if used > 1 and held * 2 <= used * PAGE]
        if not thin:
            return
        stays = (pages.counts > 0) & ~torch.isin(pages.lanes, torch.tensor(thin, device=self.device))
        parts = [pages.where(stays)]
        for lane in thin:
            if self._held[lane]:
                mine = pages.where(pages.lanes == lane)
                filled, (keys, values) = mine.filled, self.coding.decode(mine)
                scores, bias = (None if t is None else t[filled] for t in (mine.scores, mine.bias))
                old = (keys[filled], values[filled], mine.positions[filled])
                parts.append(self.coding.encode(lane, PAGE, *old, scores, bias))
        self._replace_pages(parts)

    def drop_newest(self, count: int) -> None:
        """Forget the last `count` tokens of every lane, at most `croppable`."""
        assert count <= self.croppable
        self.window.drop_newest(count)

    def drop_one(self, victims: Tensor, lanes: Tensor) -> None:
        """Remove one slot of some lanes; see `RaggedStore.drop_one`."""
        held = torch.tensor(self._held, device=self.device)
        in_window = lanes & (victims >= held)
        self.window.drop_one(victims - held, in_window)
        in_pages = (lanes & ~in_window).nonzero().squeeze(-1)
        if self.pages is None or not len(in_pages):
            return
        ends = self.pages.counts.cumsum(0)
        before = held.cumsum(0) - held
        token = (before + victims)[in_pages]
        page = torch.searchsorted(ends, token, right=True)
        hole, last = token - (ends - self.pages.counts)[page], self.pages.counts[page] - 1
        for buffer in self.pages.per_slot().values():
            buffer[page, hole] = buffer[page, last]
        self.pages.counts[page] -= 1
        for lane in in_pages.tolist():
            self._held[lane] -= 1

    def select(self, kept: list[list[Tensor]], scores: Tensor | None) -> CompactStore:
        """A store with the given slots only; coded tokens keep their codes.

        Args:
            kept: [row][kv_head] → slots in the order of `padded`. scores: (B, H, N) to remember, or None.
        """
        twin = copy.copy(self)
        held, lanes = self._held, [slots.to(self.device) for row in kept for slots in row]
        flat = None if scores is None else scores.flatten(0, 1)
        # The window's slots come after those of the pages.
        twin.window = self.window.take([s[s >= n] - n for s, n in zip(lanes, held, strict=True)])
        twin.window.scores = None if flat is None else self._window_scores(twin.window, lanes, flat)
        if self.pages is not None:
            twin.pages = self._selected_pages([s[s < n] for s, n in zip(lanes, held, strict=True)], flat)
            twin._refresh()
            if twin.pages is not None:
                twin._close_gaps()
        return twin

    def _window_scores(self, window: RaggedStore, lanes: list[Tensor], scores: Tensor) -> Tensor:
        remembered = torch.zeros(window.keys.shape[0], device=self.device)
        for lane, ((start, length), slots) in enumerate(zip(window.spans, lanes, strict=True)):
            remembered[start : start + length] = scores[lane, slots[slots >= self._held[lane]]]
        return remembered

    def _selected_pages(self, slots: list[Tensor], scores: Tensor | None) -> Pages:
        assert self.pages is not None
        pages, filled = self.pages, self.pages.filled
        offsets = torch.tensor([0, *self._held]).cumsum(0).tolist()
        chosen = torch.zeros(offsets[-1], dtype=torch.bool, device=self.device)
        for offset, mine in zip(offsets, slots, strict=False):
            chosen[offset + mine] = True
        keep = torch.zeros_like(filled).masked_scatter(filled, chosen)
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
        fresh = pages.map(lambda tensor: tensor)
        fresh.counts = keep.sum(1)
        if scores is not None:
            known = torch.cat([scores[lane, :count] for lane, count in enumerate(self._held)])
            fresh.scores = torch.zeros(filled.shape, device=self.device).masked_scatter(filled, known)
        else:
            fresh.scores = None
        for name, buffer in fresh.per_slot().items():
            index = order.view(*order.shape, *[1] * (buffer.dim() - 2)).expand_as(buffer)
            setattr(fresh, name, buffer.gather(1, index))
        return fresh.where(fresh.counts > 0)

    def write_scores(self, scores: Tensor) -> None:
        """Remember (B, H, N) scores, in the order of `padded`."""
        flat, held = scores.flatten(0, 1), torch.tensor(self._held, device=self.device)
        slots = torch.arange(flat.shape[1], device=self.device)
        valid = slots < self.lengths[:, None]
        if self.pages is not None and self.pages.scores is not None:
            self.pages.scores[self.pages.filled] = flat[valid & (slots < held[:, None])]
        index = (self.window.starts[:, None] + slots - held[:, None])[valid & (slots >= held[:, None])]
        assert self.window.scores is not None
        self.window.scores[index] = flat[valid & (slots >= held[:, None])]

    def select_rows(self, rows: Tensor) -> None:
        """Take the given sequences, in order, repeats allowed (beam search, batch selection)."""
        rows = rows.to(self.device)
        heads = torch.arange(self.kv_heads, device=self.device)
        lanes = (rows[:, None] * self.kv_heads + heads).flatten()
        first, pages = self._first.tolist(), self.pages
        self.window.select_rows(rows)
        self.coding = self.coding.of_lanes(lanes)
        if pages is not None:
            parts = [torch.arange(first[lane], first[lane + 1], device=self.device) for lane in lanes.tolist()]
            index = torch.cat(parts)
            self.pages = pages.where(index)
            numbers = torch.tensor([len(part) for part in parts], device=self.device)
            self.pages.lanes = torch.arange(len(lanes), device=self.device).repeat_interleave(numbers)
        self._refresh()

    def clone(self) -> CompactStore:
        """An independent copy."""
        twin = copy.copy(self)
        twin.window, twin._held, twin._used = self.window.clone(), list(self._held), list(self._used)
        twin.pages = None if self.pages is None else self.pages.map(torch.clone)
        twin._first = self._first.clone()
        return twin


Store = RaggedStore | CompactStore
