"""Dropping tokens between layers: who is in the residual stream of a prompt, and who matters least.

Layers that get fewer rows hold short tensors with positions, as those do that evict whole tokens, so that everything
later (decoding, beams, crops) is as it is for them. The hooks that take rows out are in `cascade_hooks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparing.adapters.prefilling import Prefilling
from sparing.adapters.prompt_attention import PromptAttention, left_pads
from sparing.core.cascade import Cascade, whole_layers
from sparing.core.method import Method
from sparing.core.pattern import causal_pairs
from sparing.core.plan import LayerPlan, Plan
from sparing.core.prefill import SparsePrefill
from sparing.core.scorer import KeyValues, Queries, Softmax
from sparing.errors import CacheStateError, MethodRefusedError, UnsupportedModelError

if TYPE_CHECKING:
    from sparing.adapters.cache import EvictingCache
    from sparing.adapters.layers import EvictingLayer
    from sparing.adapters.structure import Structure

FIX = "use a method that drops tokens after the prompt"


@dataclass(frozen=True)
class Rows:
    """Who is in the residual stream; sequences with fewer tokens than others are filled up on the left.

    Attributes:
        positions: (B, k) int64, pads counted. valid: (B, k) bool.
        importance: (B, k) float32 so far. tokens: of the forward, those that have left included.
    """

    positions: Tensor
    valid: Tensor
    importance: Tensor
    tokens: int

    def take(self, index: Tensor, valid: Tensor) -> Rows:
        """Some of the rows, by (B, k) indices; False in `valid` fills up."""
        return Rows(self.positions.gather(1, index), valid, self.importance.gather(1, index), self.tokens)


@dataclass
class Stream:
    """One forward that reads a prompt.

    Attributes:
        start, stop: positions of its first token, and behind its last one. end: where the prompt ends; drafts follow.
        rows: who is there now. block: the decoder block that is running.
        pads: (B,) left pads. spared: (B,) bool, prompts that are too short to lose anything.
        counts: [full layer] → (B,) how many tokens each sequence may have; empty before the first attention, as are
            the two before.
        states: (B, stop - start + 1, hidden) the last hidden state of every token; the last entry is of fillers.
        heads: (B, Hq) importance of heads so far. alive: (B, Hq) bool, those in use.
    """

    start: int
    stop: int
    end: int
    rows: Rows
    block: int = 0
    pads: Tensor = field(default_factory=lambda: torch.zeros(0))
    spared: Tensor = field(default_factory=lambda: torch.zeros(0))
    counts: list[Tensor] = field(default_factory=list)
    states: Tensor | None = None
    heads: Tensor | None = None
    alive: Tensor | None = None

    @property
    def is_cut(self) -> bool:
        """True once rows are missing."""
        return self.states is not None

    @property
    def counted(self) -> Tensor:
        """(B, k) bool: the rows that are tokens of the prompt."""
        return self.rows.valid & (self.rows.positions < self.end)

    def store_states(self, hidden: Tensor) -> Tensor:
        """Note the hidden states of who is there; returns those of all."""
        tokens = self.stop - self.start
        if self.states is None:
            self.states = hidden.new_zeros(hidden.shape[0], tokens + 1, hidden.shape[-1])
        slots = torch.where(self.rows.valid, self.rows.positions - self.start, tokens)
        self.states[torch.arange(len(slots), device=slots.device)[:, None], slots] = hidden
        return self.states[:, :tokens]


@dataclass
class Cascading(PromptAttention[Cascade]):
    """How one cache reads its prompts: what `Prefilling` is to a `SparsePrefill`.

    Attributes:
        stream: the forward in progress, if it reads a prompt. is_awaited: True if a forward has begun in a session.
    """

    stream: Stream | None = field(default=None, init=False)
    is_awaited: bool = field(default=False, init=False)

    # -- the course of a forward --------------------------------------------------------------------------------

    def begin(self, cache: EvictingCache, hidden: Tensor) -> None:
        """The first block is about to run.

        Raises:
            MethodRefusedError: a chunk of a prompt.
        """
        start, count = cache.evicting[0].seen, hidden.shape[1]
        stop = start + count
        first, end = (0, stop) if self.turn is None else self.turn
        self.stream, self.is_awaited = None, True
        if start >= end or start < first or (self.turn is None and start > 0):
            return
        if start > first or stop < end:
            problem = "ranks a prompt's tokens by all of its rows, so it cannot be read in chunks"
            raise MethodRefusedError(self.method.label, problem, "read the prompt at once")
        positions = torch.arange(start, stop, device=hidden.device).expand(hidden.shape[0], -1)
        self.stream = Stream(
            start, stop, end, Rows(positions, positions >= 0, torch.zeros_like(positions).float(), count)
        )

    def cut(self, cache: EvictingCache, block: int, hidden: Tensor) -> Tensor:
        """The hidden states (B, k, hidden) that go on into a block.

        Raises:
            UnsupportedModelError: something between the blocks has changed the rows.
        """
        stream = self.stream
        if stream is None or not stream.counts:
            return hidden
        stream.block, rows = block, stream.rows
        if hidden.shape[1] != rows.valid.shape[1]:
            problem = f"{hidden.shape[1]} rows enter block {block} where {rows.valid.shape[1]} were left"
            raise UnsupportedModelError(cache.structure.name, problem, FIX)
        if block not in cache.structure.full_layers:  # in front, see `_check_layers`
            return hidden
        counts = stream.counts[cache.structure.full_layers.index(block)]
        if bool((counts >= stream.counted.sum(1)).all()):
            return hidden
        index, valid = _best(stream, counts)
        stream.store_states(hidden)
        stream.rows = rows.take(index, valid)
        return rows_of(hidden, index)

    def rows_for(self, layer: EvictingLayer) -> Rows | None:
        """Whose keys a layer is about to store; None where nobody is missing.

        Raises:
            CacheStateError: the forward did not begin in a session. UnsupportedModelError: blocks and layers differ.
        """
        if layer.number == 0 and not self.is_awaited:
            problem = "tokens are dropped by hooks on the model, which are not there"
            raise CacheStateError(problem, "use the cache inside `with sparing.use(model, ...)`")
        self.is_awaited = False
        stream = self.stream
        if stream is None or not stream.is_cut:
            return None
        structure = layer.cache.structure
        if structure.full_layers[layer.number] != stream.block:
            problem = f"block {stream.block} fills another layer of the cache, {structure.full_layers[layer.number]}"
            raise UnsupportedModelError(structure.name, problem, FIX)
        return stream.rows

    def attend(
        self, layer: EvictingLayer, states: tuple[Tensor, Tensor, Tensor], softmax: Softmax, mask: Any
    ) -> Tensor | None:
        """Watch an attention call; its output (B, Hq, k, Dv) if the method computes another one.

        Raises:
            See `left_pads`.
        """
        stream = self.stream
        if stream is None:
            return None
        query, keys, values = states
        layers, held = len(layer.cache.evicting), keys.shape[2]
        if not stream.counts:
            self._start(stream, layer, left_pads(mask, query.shape[0], layer))
        slots = torch.arange(held, device=query.device)
        valid = slots >= stream.pads[:, None] if layer.short_valid is None else layer.short_valid
        self._count_rows(stream, layer, query.shape[1], valid)
        queries = Queries(query, slots[held - query.shape[2] :], stream.counted, softmax)
        shape = keys.shape[:3]
        known = KeyValues(
            keys, values, valid[:, None].expand(shape), slots.expand(shape),
            torch.zeros_like(stream.pads), layer.number, layers, None,
        )  # fmt: skip
        if layer.number < layers - 1:
            new = self.method.importance(queries, known)[:, -query.shape[2] :]
            stream.rows = replace(stream.rows, importance=stream.rows.importance + new)
        return self.method.attend(queries, known, stream.spared)

    def gate(self, layer: EvictingLayer, out: Tensor) -> Tensor:
        """The heads' outputs (B, k, Hq, Dv), those that are not in use at 0."""
        if self.stream is not None and layer.gate is None:
            counts = self.method.heads(out.shape[2], len(layer.cache.evicting))
            if counts is not None:
                layer.gate = self._alive(self.stream, out, counts[layer.number])
        return out if layer.gate is None else out * layer.gate[:, None, :, None]

    def finish(self, cache: EvictingCache, hidden: Tensor) -> Tensor | None:
        """After the last block: what is left is the plan. Returns the states of all tokens, None if all are there."""
        stream, self.stream = self.stream, None
        if stream is None or not stream.counts:
            return None
        pads = stream.pads.tolist()
        seen = tuple(stream.end - int(pad) for pad in pads)
        plans = [
            LayerPlan(index, seen, [[kept] * layer.kv_heads for kept in _held(layer, pads, stream.end)])
            for index, layer in zip(cache.structure.full_layers, cache.evicting, strict=True)
        ]
        cache.plan = Plan(self.method.label, plans)
        spared = f"nothing dropped: the prompt is shorter than min_prompt={self.method.min_prompt}"
        cache._notes = (spared,) if bool(stream.spared.all()) else ()
        return stream.store_states(hidden) if stream.is_cut else None

    # -- inside -------------------------------------------------------------------------------------------------

    def _start(self, stream: Stream, layer: EvictingLayer, pads: list[int]) -> None:
        """The first attention of a prompt: now its pads are known, and what a token takes."""
        rows, layers = stream.rows, len(layer.cache.evicting)
        device, bytes_per_token = rows.positions.device, layer.bytes_per_token * layers
        stream.pads = torch.tensor(pads, device=device)
        stream.rows = replace(rows, valid=rows.positions >= stream.pads[:, None])
        prompts = [stream.end - max(stream.start, pad) for pad in pads]
        stream.spared = torch.tensor([self.method.spares(tokens) for tokens in prompts], device=device)
        counts = torch.tensor([self.method.tokens(tokens, layers, bytes_per_token) for tokens in prompts])
        stream.counts = list(counts.to(device).unbind(1))

    def _alive(self, stream: Stream, out: Tensor, count: int) -> Tensor:
        """(B, Hq) bool: the `count` heads that a layer uses; what they put out counts for those of later layers."""
        if stream.heads is None or stream.alive is None:
            stream.heads = out.new_zeros(out.shape[0], out.shape[2], dtype=torch.float32)
            stream.alive = torch.ones_like(stream.heads, dtype=torch.bool)
        values = stream.heads.masked_fill(~stream.alive, -torch.inf)
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        best = torch.zeros_like(stream.alive).scatter(1, order, True)
        stream.alive = stream.alive & (best | stream.spared[:, None])
        stream.heads = stream.heads + self.method.head_importance(out, stream.counted)
        return stream.alive

    def _count_rows(self, stream: Stream, layer: EvictingLayer, heads: int, valid: Tensor) -> None:
        """Note the (query, key) pairs of a call, and those of dense attention."""
        mine, all_rows = stream.rows.valid.sum(1), stream.stop - stream.pads.clamp_min(stream.start)
        pairs = int(causal_pairs(mine, valid.sum(1)).sum())
        there = int(causal_pairs(all_rows, stream.stop - stream.pads).sum())
        self._count(layer, torch.full((heads,), pairs, dtype=torch.float64), there)


def prefilling_for(
    reading: SparsePrefill | Cascade | None, method: Method | None, structure: Structure, layers: int
) -> Prefilling | Cascading | None:
    """What reads the prompts of a cache with so many layers.

    Raises:
        MethodRefusedError: the model, or the method that is to rank what is left, does not go with it.
    """
    if not isinstance(reading, Cascade):
        return None if reading is None else Prefilling(reading)
    if method is not None and method.prefill is not None:
        problem = f"cannot rank what {reading.label} has left: its layers hold different tokens"
        raise MethodRefusedError(method.label, problem, f"use {reading.label} alone")
    _check_layers(reading, structure, layers)
    return Cascading(reading)


def _check_layers(method: Cascade, structure: Structure, layers: int) -> None:
    """Refuse a model whose later layers cannot do with fewer tokens.

    Raises:
        MethodRefusedError: they are no plain full-attention layers, or there is only one.
    """
    full = structure.full_layers
    whole = whole_layers(method.front, len(full))
    if whole == len(full):
        problem = f"drops tokens for layers behind the first; {structure.name} has {len(full)} with full attention"
        raise MethodRefusedError(method.label, problem, FIX)
    others = [index for index in range(full[whole], layers) if index not in full]
    if others:
        problem = f"layer {others[0]} of {structure.name} has a sliding window or a state, which needs every token"
        raise MethodRefusedError(method.label, problem, FIX)


def _best(stream: Stream, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(B, k') the rows of the `counts` most important tokens of every sequence, in order, and which of them are real.

    The prompt's last token and everything behind it always go on, and are the last of the rows.
    """
    rows = stream.rows
    behind = stream.stop - stream.end
    values = rows.importance.masked_fill(rows.positions >= stream.end - 1, torch.inf)
    values = values.masked_fill(~rows.valid, -torch.inf)
    order = values.sort(dim=-1, descending=True, stable=True).indices
    slots = torch.arange(values.shape[1], device=values.device)
    wanted = torch.minimum(counts + behind, rows.valid.sum(1))
    chosen = torch.zeros_like(rows.valid).scatter(1, order, slots < wanted[:, None])
    index = torch.where(chosen, slots, -1).sort(-1).values[:, -int(wanted.max()) :]
    return index.clamp_min(0), index >= 0


def rows_of(value: Tensor, index: Tensor) -> Tensor:
    """(..., B, k, D): of (..., B or 1, N, D), the rows of (B, k) indices."""
    every = torch.arange(len(index), device=index.device)[:, None]
    return value.expand(*value.shape[:-3], len(index), *value.shape[-2:])[..., every, index, :]


def _held(layer: EvictingLayer, pads: list[int], end: int) -> list[Tensor]:
    """[row] → positions that a layer holds, up to `end`."""
    if layer.short_positions is None or layer.short_valid is None:
        return [torch.arange(pad, end) for pad in pads]
    pairs = zip(layer.short_positions.cpu(), layer.short_valid.cpu(), strict=True)
    return [positions[valid & (positions < end)] for positions, valid in pairs]
