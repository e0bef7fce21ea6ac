"""The cache layer: what transformers calls, and what the attention function calls.

While the prompt is read it lets the scorers watch. Eviction is deferred to the next `update`, after any `crop`
(assisted decoding crops the first forward; a chunked prefill has many "prefills"). Once compressed it returns a handle
that only sparing's attention function understands, so that a model which would do something else with the keys fails
loudly.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from sparing.adapters.cascading import Cascading, Rows
from sparing.adapters.following import attend_and_follow, show_pending
from sparing.adapters.handles import UPDATED, RaggedHandle
from sparing.adapters.holding import HoldingLayer
from sparing.adapters.reading import attend_and_read
from sparing.core.scorer import Queries, Softmax
from sparing.errors import CacheStateError, UnsupportedModelError
from sparing.kernels.attend import attend


class EvictingLayer(HoldingLayer):
    """One full-attention layer of an `EvictingCache`."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    # -- what transformers calls --------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen: positions and prompt slicing come from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is asked for in terms of tokens seen; compressed layers do not read it."""
        return self.seen + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens; first carry out an eviction that is due."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.number == 0:
            self.cache.before_update(key_states.shape[-2])
        count = key_states.shape[-2]
        prefilling = self.cache.prefilling
        rows = prefilling.rows_for(self) if isinstance(prefilling, Cascading) else None
        UPDATED.note(self)
        if self.store is not None:
            self.store.append(key_states, value_states, self.seen)
        elif self.reading is not None:
            self.reading.append(key_states, value_states)
        else:
            self._append_dense(key_states, value_states, rows)
        self.seen += count if rows is None else rows.tokens
        self.tail = self.tail + count if rows is None else self.newest_run()
        if self.store is None and self.reading is None:
            return self.keys, self.values
        return RaggedHandle(self, key_states, self.seen), RaggedHandle(self, value_states, self.seen)

    def _append_dense(self, keys: Tensor, values: Tensor, rows: Rows | None) -> None:
        if rows is not None and self.short_valid is None:  # from now on tokens are missing
            self.short_positions = torch.arange(self.seen, device=keys.device).expand(keys.shape[0], -1)
            self.short_valid = self.short_positions >= self.cache.pads(keys.shape[0]).to(keys.device)[:, None]
        if self.short_positions is not None and self.short_valid is not None:
            new = torch.arange(self.seen, self.seen + keys.shape[-2], device=keys.device).expand(keys.shape[0], -1)
            new, valid = (new, torch.ones_like(new, dtype=torch.bool)) if rows is None else (rows.positions, rows.valid)
            self.short_positions = torch.cat([self.short_positions, new], dim=1)
            self.short_valid = torch.cat([self.short_valid, valid], dim=1)
        # Copied even when empty, as transformers does: the states may be views of one fused, larger projection.
        self.keys = torch.cat([self.keys, keys], dim=-2)
        self.values = torch.cat([self.values, values], dim=-2)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a negative number of them, or (transformers < 5.10) a positive new length."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if count <= 0 or not self.is_initialized:
            return
        if self.number == 0:  # all or none
            for layer in self.cache.evicting:
                layer.check_crop(count)
        if self.store is not None:
            self.store.drop_newest(count)
        elif self.reading is not None:
            self.reading.drop_newest(count)
        else:
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]
            if self.transformed is not None:
                keys, values = self.transformed
                self.transformed = (keys[..., :-count, :], values[..., :-count, :])
            if self.short_positions is not None and self.short_valid is not None:
                self.short_positions = self.short_positions[:, :-count]
                self.short_valid = self.short_valid[:, :-count]
        self.seen -= count
        self.tail -= count
        self.cache.after_crop(self.seen)

    def check_crop(self, count: int) -> None:
        """Refuse to take back tokens that were compressed, or that came before some that were.

        Raises:
            CacheStateError: more than the newest ones.
        """
        if self.is_compressed and count > self.tail:
            raise CacheStateError(
                f"cannot remove {count} tokens: only the {self.tail} newest lie behind what was compressed",
                'use a method with moment="prefill_end", or crop less',
            )
        if self.store is not None and count > self.store.croppable:
            problem = f"cannot remove {count} tokens: only the {self.store.croppable} newest are not coded yet"
            raise CacheStateError(problem, "crop less, or leave `bits` out")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: rows take the place of others."""
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self._take_rows(torch.arange(self.rows)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._take_rows(torch.arange(self.rows).repeat_interleave(repeats))

    def _take_rows(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        if self.number == 0:
            self.cache.before_row_change(rows)
        self.pending = [states.index_select(0, rows.to(states.device)) for states in self.pending]
        self.gate = None if self.gate is None else self.gate[rows.to(self.gate.device)]
        if self.store is not None:
            if self.limits is not None:
                self.limits = self.limits.view(self.store.rows, -1)[rows.to(self.limits.device)].flatten()
            self.store.select_rows(rows)
            if self.originals is not None:
                self.originals = self.originals.rows(rows.tolist(), self.store.kv_heads)
            # What was observed is of the rows as they were; scores that are stored have moved along.
            scorer = self.cache.scorers[0]
            self.states = {scorer: self.store.bookkeeping().scores} if scorer.accumulates else {}
            return
        if self.reading is not None:
            self.reading.select_rows(rows)
            return
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if self.short_positions is not None and self.short_valid is not None:
            self.short_positions, self.short_valid = self.short_positions[rows], self.short_valid[rows]

    def reset(self) -> None:
        """Empty the layer."""
        self.clear()
        if self.number == 0:
            self.cache.after_reset()

    def offload(self) -> None:
        """Not offered."""
        raise CacheStateError("offloading a compressing cache is not supported", "keep the cache on its device")

    # -- what the attention function calls ----------------------------------------------------------------------

    def receive(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        """Note that attention is about to run with these keys, and whether they are still the cached ones."""
        self.attended = True
        self.is_transformed = key is not self.keys
        self.note_module(module, query.shape[1])

    def attend_sparsely(
        self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, mask: Any, position_bias: Any
    ) -> Tensor | None:
        """Attention over the prompt as its method reads it, (B, Hq, q, Dv); None where it is to be dense.

        Raises:
            UnsupportedModelError: the model adds to its logits, or has a mask that is more than causal.
            MethodRefusedError: a chunk that the method cannot read. CacheStateError: pads that are not on the left.
        """
        prefilling = self.cache.prefilling
        if prefilling is None:
            return None
        if position_bias is not None:
            problem = "adds a position bias to its logits, which sparse prefill does not offer"
            raise UnsupportedModelError(self.cache.structure.name, problem)
        return prefilling.attend(self, (query, key, value), softmax, mask)

    def short_mask(self, query: Tensor, mask: Tensor | None, base: str) -> Tensor | None:
        """The mask over what is stored, for a layer that has evicted whole tokens; else the one given."""
        if self.short_valid is None:
            return mask
        count, length = query.shape[2], self.short_valid.shape[1]
        if base == "sdpa" and count == length and bool(self.short_valid.all()):
            return None  # plainly causal
        causal = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
        own = torch.eye(count, length, dtype=torch.bool, device=query.device).roll(length - count, dims=1)
        allowed = causal & self.short_valid[:, None, None, :] | own  # fillers see themselves, lest they be no numbers
        if base == "eager":
            return torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
        return allowed

    def attend(self, query: Tensor, softmax: Softmax, padding: Tensor | None) -> Tensor:
        """Attention over what is held, (B, Hq, q, Dv); follows decoding if the method does."""
        if padding is not None and not bool(padding[:, -query.shape[2] :].all()):
            problem = "pads in a later turn of a compressed cache are not supported"
            raise CacheStateError(problem, "give every row its own cache, or pad only on the left of the first turn")
        if self.cache.is_reading:
            self._watch(query, softmax)
        if self.reading is not None:
            return attend_and_read(self, query, softmax)
        assert self.store is not None
        if self.cache.follows_decoding and not self.cache.is_reading:
            return attend_and_follow(self, query, softmax)
        return attend(query, self.store, softmax)

    def observe(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, padding: Tensor | None) -> None:
        """Watch a dense attention call."""
        cache = self.cache
        if self.number == 0:
            cache.begin_observing(query.shape[2], padding)
        if self.is_transformed and cache.is_reading:  # held no longer than needed: it is larger than the cache
            self.transformed = (key, value)
        if cache.is_reading:
            self._watch(query, softmax)

    def gated(self, out: Tensor) -> Tensor:
        """The heads' outputs (B, q, Hq, Dv), those of heads that a method does without at 0."""
        prefilling = self.cache.prefilling
        return prefilling.gate(self, out) if isinstance(prefilling, Cascading) else out

    def _watch(self, query: Tensor, softmax: Softmax) -> None:
        """Show the rows of this call to every scorer that they are for, and time each."""
        cache = self.cache
        start = self.seen - query.shape[2]
        end = self.seen
        if cache.prompt_length is not None and cache.replaying is None:
            end = min(end, cache.prompt_length)
        if end <= start:
            return
        if self.pending:  # decoded before this turn
            show_pending(self, softmax, start)
        stored = self.stored_tokens()
        positions = torch.arange(start, end, device=query.device)
        valid = positions[None, :] >= cache.pads(query.shape[0]).to(query.device)[:, None]
        queries = Queries(query[:, :, : end - start], positions, valid, softmax)
        for scorer in cache.scorers if cache.replaying is None else (cache.replaying[0],):
            self.check(scorer)
            began = time.perf_counter()
            state = self.states.get(scorer)
            if cache.replaying is not None:  # the whole pass is timed, not only this part of it
                self.states[scorer] = scorer.observe_replay(state, queries, stored, cache.replaying[1])
                continue
            self.states[scorer] = scorer.observe(state, queries, stored)
            cache.observing_seconds[scorer] += time.perf_counter() - began
