"""Reading a prompt sparsely: which attention calls it is about, row by row without pads, and what was computed.

Only calls of a prompt are sparse: those of an announced one (`EvictingCache.expect_prompt`, which `generate` calls), or
the first call. Decoded tokens, drafts and questions that are asked of a cache read everything that is stored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from sparing.adapters.masks import LazyMask
from sparing.core.pattern import Partial, Pattern
from sparing.core.prefill import Attended, PromptCall, SparsePrefill
from sparing.core.scorer import Softmax
from sparing.errors import CacheStateError, MethodRefusedError, UnsupportedModelError
from sparing.kernels.sparse import attend_sparse, dispatch
from sparing.kernels.sparse.partial import with_sinks

if TYPE_CHECKING:
    from sparing.adapters.layers import EvictingLayer


@dataclass(frozen=True)
class PrefillReport:
    """What of a prompt's attention was computed.

    Attributes:
        method: the method's name.
        densities: [layer] → (Hq,) float64, the share of its (query, key) pairs that each head has computed, over all
            rows and calls so far; by the layers' numbers in the cache. Calls that were read densely because that was
            faster count as 1; later turns over a cache that has dropped tokens, which are always, do not count.
        dense_calls: (layer, call)s that dense attention was faster for.
        zeros: of the numbers that stand for keys, how many are zero, and how many there are; (0, 0) without them.
    """

    method: str
    densities: dict[int, Tensor]
    dense_calls: int
    zeros: tuple[int, int] = (0, 0)

    @property
    def density(self) -> float:
        """The mean over layers and heads."""
        return float(torch.stack(list(self.densities.values())).mean()) if self.densities else 1.0

    def __str__(self) -> str:
        dense = f", {self.dense_calls} of the calls densely, which was faster" if self.dense_calls else ""
        zeros, numbers = self.zeros
        saved = f"; of the differences that stand for its keys, {zeros / numbers:.1%} are zero" if numbers else ""
        return f"prompt read by {self.method} at {self.density:.1%} of dense attention{dense}{saved}"


@dataclass
class Prefilling:
    """How one cache reads its prompts.

    Attributes:
        method: how. computed, there: [layer] → (Hq,) pairs computed, and pairs of dense attention.
        turn: (first, end) positions of the announced prompt that is being read, pads counted; None if there is none.
    """

    method: SparsePrefill
    computed: dict[int, Tensor] = field(default_factory=dict)
    there: dict[int, int] = field(default_factory=dict)
    turn: tuple[int, int] | None = None
    dense_calls: int = 0
    zeros: tuple[int, int] = (0, 0)

    def begin_turn(self, first: int, end: int) -> None:
        """A prompt was announced."""
        self.turn = (first, end)

    def fresh(self) -> Prefilling:
        """The same, before anything was read."""
        return Prefilling(self.method)

    def copy(self) -> Prefilling:
        """An independent copy, for a fork of the cache."""
        return Prefilling(self.method, dict(self.computed), dict(self.there), self.turn, self.dense_calls, self.zeros)

    def rows_of(self, layer: EvictingLayer, count: int, mask: Any) -> int:
        """How many of the `count` new rows of a call are of a prompt, and so read sparsely."""
        start, end = layer.seen - count, layer.seen
        if count == 1 or layer.cache.replaying is not None:
            return 0
        if self.turn is None:
            return count if start == 0 else 0
        first, last = self.turn
        rows = min(end, last) - start
        if rows <= 0:
            return 0
        is_chunk = start > first or end < last
        if is_chunk and not self._reads_chunks(start, left_pads(mask, 1, layer)):
            fix = "read the prompt at once"
            if self.method.chunks == "blocks":
                fix += f", or in chunks of a multiple of {self.method.block} tokens, without pads"
            problem = "a chunk of the prompt would be read otherwise than all of it"
            raise MethodRefusedError(self.method.label, problem, fix)
        return rows

    def _reads_chunks(self, start: int, pads: list[int]) -> bool:
        """Whether a chunk that begins at `start` is read as the whole prompt is."""
        if self.method.chunks == "blocks":
            return all((start - pad) % self.method.block == 0 or start <= pad for pad in pads)
        return self.method.chunks == "any"

    def attend(
        self, layer: EvictingLayer, states: tuple[Tensor, Tensor, Tensor], softmax: Softmax, mask: Any
    ) -> Tensor | None:
        """Attention (B, Hq, Q, Dv) of a call of a prompt; None if dense attention is to do it.

        Args:
            states: query (B, Hq, Q, D), keys and values (B, H, N, D).
            mask: what the model was given for this call.
        """
        query, keys, values = states
        rows = 0 if layer.short_valid is not None else self.rows_of(layer, query.shape[2], mask)
        if rows == 0:
            return None
        pads = left_pads(mask, query.shape[0], layer)
        number = layer.cache.structure.full_layers[layer.number]
        if self.method.dispatch == "auto" and not dispatch.is_worth(self.method, query, keys, values):
            self.dense_calls += 1
            pairs = sum(_causal_pairs(layer.seen - query.shape[2] - pad, layer.seen - pad) for pad in pads)
            self._count(number, torch.full((query.shape[1],), pairs, dtype=torch.float64), pairs)
            return None
        out = query.new_zeros(*query.shape[:3], values.shape[-1])
        for row, pad in enumerate(pads):
            self._attend_row(out[row], layer, [x[row] for x in states], softmax, pad, rows, number)
        return out

    def _attend_row(
        self,
        out: Tensor,
        layer: EvictingLayer,
        states: list[Tensor],
        softmax: Softmax,
        pad: int,
        rows: int,
        number: int,
    ) -> None:
        """Fill in the outputs (Hq, Q, Dv) of one sequence; those of its pads stay 0."""
        query, keys, values = states
        count, seen = query.shape[1], keys.shape[1]
        begin, end = max(pad - (seen - count), 0), rows  # rows of the call that are tokens of the prompt
        if end > begin:
            last = seen - count + end
            structure = layer.cache.structure
            call = PromptCall(
                query[:, begin:end], keys[:, pad:last], values[:, pad:last], softmax, _run, layer.number,
                len(structure.full_layers), structure.rotary if layer.can_unrotate else None, _run_alone,
                structure.attention_layers[layer.number],
            )  # fmt: skip
            attended = self._timed(call)
            out[:, begin:end] = with_sinks(attended.part, softmax)
            self.zeros = (self.zeros[0] + attended.zeros[0], self.zeros[1] + attended.zeros[1])
            self._count(number, attended.pattern.pairs().double().cpu(), attended.pattern.all_pairs())
        if count > rows:  # drafts behind the prompt
            rest = PromptCall(query[:, rows:], keys[:, pad:], values[:, pad:], softmax, _run)
            blank = rest.grid(self.method.block)
            everything = Pattern(rest.tokens, rest.start, self.method.block, torch.ones_like(blank.blocks))
            out[:, rows:] = with_sinks(rest.attend(everything), softmax)

    def _timed(self, call: PromptCall) -> Attended:
        """The method's answer; how long it took is noted for calls to come."""
        if self.method.dispatch != "auto":
            return self.method.attend(call)
        device = str(call.query.device)
        dispatch.wait(device)
        began = time.perf_counter()
        attended = self.method.attend(call)
        dispatch.wait(device)
        dispatch.note(self.method, call.query, call.keys, call.values, time.perf_counter() - began)
        return attended

    def _count(self, number: int, computed: Tensor, there: int) -> None:
        self.computed[number] = self.computed.get(number, torch.zeros_like(computed)) + computed
        self.there[number] = self.there.get(number, 0) + there

    @property
    def report(self) -> PrefillReport:
        """What has been computed so far."""
        densities = {number: pairs / self.there[number] for number, pairs in self.computed.items()}
        return PrefillReport(self.method.label, densities, self.dense_calls, self.zeros)


def _causal_pairs(start: int, tokens: int) -> int:
    """(query, key) pairs of dense attention, of the rows from `start` (or from 0, if that is less) on."""
    first = max(start, 0)
    return (tokens - first) * (tokens + first + 1) // 2 if tokens > first else 0


def _run(call: PromptCall, pattern: Pattern) -> Partial:
    return attend_sparse(call.query, call.keys, call.values, pattern, call.softmax)


def _run_alone(call: PromptCall, pattern: Pattern) -> Partial:
    return attend_sparse(call.query, call.keys, call.values, pattern, call.softmax, needs_lse=False)


def left_pads(mask: Any, rows: int, layer: EvictingLayer) -> list[int]:
    """Left pads of every row.

    Raises:
        UnsupportedModelError: the mask is not causal. CacheStateError: pads are not on the left.
    """
    if mask is None:
        return [0] * rows
    if (
        not isinstance(mask, LazyMask)
        or mask.request.get("mask_function", causal_mask_function) is not causal_mask_function
    ):
        problem = "its mask is more than causal, which sparse prefill would not honour"
        raise UnsupportedModelError(layer.cache.structure.name, problem, "use a method that reads prompts densely")
    if mask.padding is None:
        return [0] * rows
    padding = mask.padding[:, : layer.seen].long()
    if bool((padding.diff(dim=-1) < 0).any()):
        raise CacheStateError("pads must be on the left of each row", "set tokenizer.padding_side='left'")
    return [int(pad) for pad in (padding == 0).sum(-1)]
