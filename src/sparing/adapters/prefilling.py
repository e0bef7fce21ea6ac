"""Reading a prompt sparsely: which attention calls it is about, row by row without pads, and what was computed.

Only calls of a prompt are sparse: those of an announced one (`EvictingCache.expect_prompt`, which `generate` calls), or
the first call. Decoded tokens, drafts and questions that are asked of a cache read everything that is stored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparing.adapters.prompt_attention import PrefillReport, PromptAttention, left_pads
from sparing.core.pattern import causal_pairs
from sparing.core.prefill import Attended, PromptCall, SparsePrefill
from sparing.core.scorer import Softmax
from sparing.errors import MethodRefusedError
from sparing.kernels.sparse import attend_call, dispatch
from sparing.kernels.sparse.partial import with_sinks

if TYPE_CHECKING:
    from sparing.adapters.layers import EvictingLayer

ATTEND_ALONE = partial(attend_call, needs_lse=False)


@dataclass
class Prefilling(PromptAttention[SparsePrefill]):
    """How one cache reads its prompts by patterns.

    Attributes:
        dense_calls, zeros: see `PrefillReport`.
    """

    dense_calls: int = 0
    zeros: tuple[int, int] = (0, 0)

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
        if self.method.dispatch == "auto" and not dispatch.is_worth(self.method, query, keys, values):
            self.dense_calls += 1
            tokens = [layer.seen - pad for pad in pads]
            pairs = sum(causal_pairs(min(query.shape[2], n), n) for n in tokens)
            self._count(layer, torch.full((query.shape[1],), pairs, dtype=torch.float64), pairs)
            return None
        out = query.new_zeros(*query.shape[:3], values.shape[-1])
        for row, pad in enumerate(pads):
            self._attend_row(out[row], layer, [x[row] for x in states], softmax, pad, rows)
        return out

    def _attend_row(
        self, out: Tensor, layer: EvictingLayer, states: list[Tensor], softmax: Softmax, pad: int, rows: int
    ) -> None:
        """Fill in the outputs (Hq, Q, Dv) of one sequence; those of its pads stay 0."""
        query, keys, values = states
        count, seen = query.shape[1], keys.shape[1]
        begin, end = max(pad - (seen - count), 0), rows  # rows of the call that are tokens of the prompt
        if end > begin:
            last = seen - count + end
            structure = layer.cache.structure
            call = PromptCall(
                query[:, begin:end], keys[:, pad:last], values[:, pad:last], softmax, attend_call, layer.number,
                len(structure.full_layers), structure.rotary if layer.can_unrotate else None, ATTEND_ALONE,
                structure.attention_layers[layer.number],
            )  # fmt: skip
            attended = self._timed(call)
            out[:, begin:end] = with_sinks(attended.part, softmax)
            self.zeros = (self.zeros[0] + attended.zeros[0], self.zeros[1] + attended.zeros[1])
            self._count(layer, attended.pattern.pairs().double().cpu(), attended.pattern.all_pairs())
        if count > rows:  # drafts behind the prompt
            rest = PromptCall(query[:, rows:], keys[:, pad:], values[:, pad:], softmax, attend_call)
            out[:, rows:] = with_sinks(rest.attend(rest.grid(self.method.block).dense()), softmax)

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

    @property
    def report(self) -> PrefillReport:
        """What has been computed so far."""
        return replace(super().report, dense_calls=self.dense_calls, zeros=self.zeros)
