"""The cache layer that observes, evicts, and then holds ragged heads.

A layer begins dense, exactly as transformers' own. While the prompt is read it lets the scorers watch. Eviction is
deferred to the next `update`, after any `crop` (assisted decoding crops the first forward; a chunked prefill has
many "prefills"). Afterwards the layer holds a `RaggedStore` and returns a handle that only sparing's attention
function understands, so that a model which would do something else with the keys fails loudly.

Layers whose model transforms keys between cache and attention (latent attention, MLA) cannot be ragged: they are
scored on the transformed keys and evict whole tokens, leaving real short tensors.

`seen` counts tokens of the sequence, pads included, and is what transformers asks for (`get_seq_length`); what is
stored is counted by the store.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from sparing.adapters.handles import RaggedHandle, note_updated_layer
from sparing.core.scorer import KeyValues, Queries, Scorer, Softmax
from sparing.core.token_scores import TokenScores, guard_ends, select
from sparing.errors import CacheStateError, MethodRefusedError
from sparing.kernels.attend import attend, attend_with_rows
from sparing.kernels.ragged import RaggedStore

if TYPE_CHECKING:
    from sparing.adapters.cache import EvictingCache


class EvictingLayer(DynamicLayer):
    """One full-attention layer of an `EvictingCache`.

    Attributes:
        number: which of the cache's evicting layers this is.
        seen: tokens of the sequence so far, pads included.
        store: the ragged heads once compressed, else None.
        tail: newest tokens that lie without a gap at the end of every lane, and can be cropped.
        states: what each scorer has observed of the prompt in progress.
        transformed: keys and values as the attention sees them, (B, Hq, N, D), if the model transforms them.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    # None until the first update and once ragged; transformers declares them so, which helps nobody here.
    keys: Any
    values: Any

    def __init__(self, cache: EvictingCache, number: int) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.number = number
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = self.tail = 0
        self.store: RaggedStore | None = None
        self.states: dict[Scorer, Any] = {}
        self.attended = False
        self.transformed: tuple[Tensor, Tensor] | None = None
        self.is_transformed = False
        self.limits: Tensor | None = None  # (lanes,) tokens that a method which follows decoding may hold
        self.short_positions: Tensor | None = None  # (B, n) of a layer that evicts whole tokens
        self.short_valid: Tensor | None = None

    @property
    def cache(self) -> EvictingCache:
        """The cache that the layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise CacheStateError("the cache that this layer belongs to is gone", "keep a reference to the cache")
        return cache

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
        note_updated_layer(self)
        if self.store is not None:
            self.store.append(key_states, value_states, self.seen)
            self.seen += count
            self.tail += count
            return RaggedHandle(self, key_states, self.seen), RaggedHandle(self, value_states, self.seen)
        if self.short_positions is not None and self.short_valid is not None:
            rows = key_states.shape[0]
            new = torch.arange(self.seen, self.seen + count, device=key_states.device).expand(rows, -1)
            self.short_positions = torch.cat([self.short_positions, new], dim=1)
            self.short_valid = torch.cat([self.short_valid, torch.ones_like(new, dtype=torch.bool)], dim=1)
        # Copied even when empty, as transformers does: the states may be views of one fused, larger projection.
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        self.seen += count
        self.tail += count
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a negative number of them, or (transformers < 5.10) a positive new length."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if count <= 0 or not self.is_initialized:
            return
        if self.is_compressed and count > self.tail:
            raise CacheStateError(
                f"cannot remove {count} tokens: only the {self.tail} newest lie behind what was compressed",
                'use a method with moment="prefill_end", or crop less',
            )
        if self.store is not None:
            self.store.drop_newest(count)
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: rows take the place of others."""
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        rows = torch.arange(self.keys.shape[0]) if self.store is None else torch.arange(self.store.rows)
        self._take_rows(rows[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = self.keys.shape[0] if self.store is None else self.store.rows
        self._take_rows(torch.arange(rows).repeat_interleave(repeats))

    def _take_rows(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        if self.number == 0:
            self.cache.before_row_change(rows)
        if self.store is not None:
            if self.limits is not None:
                self.limits = self.limits.view(self.store.rows, -1)[rows.to(self.limits.device)].flatten()
            self.store.select_rows(rows)
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

    def receive(self, key: Tensor) -> None:
        """Note that attention is about to run with these keys, and whether they are still the cached ones."""
        self.attended = True
        self.is_transformed = key is not self.keys

    def short_mask(self, query: Tensor, mask: Tensor | None, base: str) -> Tensor | None:
        """The mask over what is stored, for a layer that has evicted whole tokens; else the one given."""
        if self.short_valid is None:
            return mask
        count, length = query.shape[2], self.short_valid.shape[1]
        causal = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
        allowed = causal & self.short_valid[:, None, None, :]
        if base == "eager":
            return torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
        return allowed

    def attend(self, query: Tensor, softmax: Softmax, padding: Tensor | None) -> Tensor:
        """Attention over the ragged heads, (B, Hq, q, Dv); follows decoding if the method does."""
        assert self.store is not None
        if padding is not None and not bool(padding[:, -query.shape[2] :].all()):
            problem = "pads in a later turn of a compressed cache are not supported"
            raise CacheStateError(problem, "give every row its own cache, or pad only on the left of the first turn")
        if self.cache.is_reading:
            self._watch(query, softmax, self.stored_tokens())
        elif self.cache.follows_decoding:
            return self._attend_and_step(query, softmax)
        return attend(query, self.store, softmax)

    def observe(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, padding: Tensor | None) -> None:
        """Watch a dense attention call."""
        cache = self.cache
        if self.number == 0:
            cache.begin_observing(query.shape[2], padding)
        if self.is_transformed and cache.is_reading:  # held no longer than needed: it is larger than the cache
            self.transformed = (key, value)
        if cache.is_reading:
            self._watch(query, softmax, self.stored_tokens())

    def _watch(self, query: Tensor, softmax: Softmax, stored: KeyValues) -> None:
        """Show the prompt's rows of this call to every scorer, and time each."""
        cache = self.cache
        start = self.seen - query.shape[2]
        end = self.seen if cache.prompt_length is None else min(self.seen, cache.prompt_length)
        if end <= start:
            return
        positions = torch.arange(start, end, device=query.device)
        valid = positions[None, :] >= cache.pads(query.shape[0]).to(query.device)[:, None]
        queries = Queries(query[:, :, : end - start], positions, valid, softmax)
        for scorer in cache.scorers:
            self._check(scorer)
            began = time.perf_counter()
            self.states[scorer] = scorer.observe(self.states.get(scorer), queries, stored)
            cache.observing_seconds[scorer] += time.perf_counter() - began

    # -- scoring and evicting -----------------------------------------------------------------------------------

    @property
    def is_compressed(self) -> bool:
        """True once tokens have been dropped."""
        return self.store is not None or self.short_valid is not None

    @property
    def kv_heads(self) -> int:
        """KV heads that choose for themselves; 1 where whole tokens are evicted."""
        if self.store is not None:
            return self.store.kv_heads
        return 1 if self.is_transformed else int(self.keys.shape[1])

    @property
    def can_unrotate(self) -> bool:
        """True if keys were cached unrotated, or rotated as a whole by an embedding that can be inverted."""
        structure = self.cache.structure
        if not structure.rotates:
            return True
        keys = self.keys if self.store is None else self.store.keys
        return structure.rotary is not None and not self.is_transformed and keys.shape[-1] == structure.rotary.head_dim

    def stored_tokens(self) -> KeyValues:
        """What is stored, as scorers see it."""
        cache = self.cache
        if self.store is not None:
            keys, values, valid, positions, _ = self.store.padded()
        else:
            keys, values = self.transformed if self.transformed is not None else (self.keys, self.values)
            rows, heads, tokens = keys.shape[:3]
            if self.short_positions is not None and self.short_valid is not None:
                positions, valid = self.short_positions, self.short_valid
            else:
                positions = torch.arange(tokens, device=keys.device).expand(rows, -1)
                valid = positions >= cache.pads(rows).to(keys.device)[:, None]
            positions, valid = (t[:, None].expand(rows, heads, tokens) for t in (positions, valid))
        pads = cache.pads(keys.shape[0]).to(keys.device)
        rotary = cache.structure.rotary
        return KeyValues(keys, values, valid, positions, pads, self.number, len(cache.evicting), rotary)

    def _check(self, scorer: Scorer) -> None:
        """Refuse a scorer that this layer cannot serve."""
        structure, name = self.cache.structure, type(scorer).__name__
        if scorer.needs_rotary and not self.can_unrotate:
            problem = f"needs queries or keys before rotation, which {structure.name} does not give"
            raise MethodRefusedError(name, problem, "use a method without them, e.g. snapkv")
        if self.is_transformed and self.cache.follows_decoding:
            problem = f"cannot follow decoding on {structure.name}, whose attention transforms the cached keys"
            raise MethodRefusedError(name, problem, 'use moment="prefill_end"')

    def scores(self, scorer: Scorer, end: int, tokens_per_head: list[int]) -> TokenScores:
        """Score what is stored, up to position `end`; what comes after is neither scored nor dropped."""
        self._check(scorer)
        stored = self.stored_tokens()
        values = scorer.score(self.states.get(scorer), stored).float()
        valid, positions = stored.valid, stored.positions
        if self.is_transformed:  # one choice for the whole layer
            values, valid, positions = values.mean(1, keepdim=True), valid[:, :1], positions[:, :1]
        valid = valid & (positions < end)
        first, recent = torch.tensor([scorer.protects(tokens) for tokens in tokens_per_head]).unbind(-1)
        return TokenScores(values, valid, guard_ends(valid, positions, stored.pads, first, recent))

    def keep(self, kept: list[list[Tensor]], scores: Tensor, end: int, limits: Tensor) -> None:
        """Drop everything that is not kept and was seen before position `end`.

        Args:
            kept: [row][kv_head] → slots; `scores` (B, H, N): what to remember for methods that follow decoding.
            limits: (B, H) tokens that methods which follow decoding may hold from now on.
        """
        self.limits = limits.flatten().to(self.device)
        tail = self.seen - end
        if self.is_transformed:
            self._keep_tokens([row[0] for row in kept], tail)
        else:
            stored = self.stored_tokens()
            if tail:  # tokens after the prompt stay; they are the last of every lane
                kept = [
                    [torch.cat([slots, self._tail_slots(stored, row, head, end)]) for head, slots in enumerate(heads)]
                    for row, heads in enumerate(kept)
                ]
            follows = scores if self.cache.remembers_scores else None
            self.store = RaggedStore.pack(kept, stored.keys, stored.values, stored.positions, follows)
            self.keys = self.values = None
        self.tail = self._newest_run()
        self.transformed = None
        self.states = {}

    def _newest_run(self) -> int:
        """How many of the newest tokens every lane still holds without a gap: those can be cropped again."""
        if self.store is not None:
            lanes = [self.store.positions[start : start + length] for start, length in self.store.spans]
        else:
            lanes = list(self.short_positions) if self.short_positions is not None else []
        runs = []
        for positions in lanes:
            count = positions.shape[0]
            unbroken = positions == torch.arange(self.seen - count, self.seen, device=positions.device)
            runs.append(int(unbroken.flip(0).long().cumprod(0).sum()))
        return min(runs)

    @staticmethod
    def _tail_slots(stored: KeyValues, row: int, head: int, end: int) -> Tensor:
        after = stored.valid[row, head] & (stored.positions[row, head] >= end)
        return after.nonzero().squeeze(-1)

    def _keep_tokens(self, kept: list[Tensor], tail: int) -> None:
        """Evict whole tokens; rows that keep fewer are filled up with a slot that nobody may see."""
        stored = self.stored_tokens()
        tokens = stored.positions.shape[-1]
        newest = torch.arange(tokens - tail, tokens, device=self.keys.device)
        chosen = [torch.cat([slots.to(newest.device), newest]) for slots in kept]
        longest = max(len(slots) for slots in chosen)
        index = torch.stack([torch.nn.functional.pad(slots, (longest - len(slots), 0)) for slots in chosen])
        counts = torch.tensor([len(slots) for slots in chosen], device=index.device)
        self.short_valid = torch.arange(longest, device=index.device) >= (longest - counts)[:, None]
        self.short_positions = stored.positions[:, 0].gather(1, index)
        self.keys = self.keys.gather(2, index[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(
            2, index[:, None, :, None].expand(-1, self.values.shape[1], -1, self.values.shape[3])
        )

    def _attend_and_step(self, query: Tensor, softmax: Softmax) -> Tensor:
        """Attend, let the scorer follow, and evict what exceeds the limits."""
        store, scorer = self.store, self.cache.scorers[0]
        assert store is not None
        assert store.scores is not None
        assert self.limits is not None
        rows = None
        if scorer.step_needs_attention:
            out, rows = attend_with_rows(query, store, softmax)
        else:
            out = attend(query, store, softmax)
        slots = torch.arange(int(store.lengths.max()), device=query.device)
        # Lanes may differ in length (padded batches), so this works on a padded view of the bookkeeping only.
        valid = (slots < store.lengths[:, None]).view(store.rows, store.kv_heads, -1)
        index = (store.starts[:, None] + slots).view_as(valid).masked_fill(~valid, 0)
        positions = store.positions[index].long()
        values = scorer.step(store.scores[index], rows, positions)
        store.scores[index[valid]] = values[valid]
        pads = self.cache.pads(store.rows).to(query.device)
        per_row = self.limits.view(store.rows, -1)[:, 0].tolist()  # the same for all heads of a row
        first, recent = torch.tensor([scorer.protects(limit) for limit in per_row]).unbind(-1)
        scores = TokenScores(values, valid, guard_ends(valid, positions, pads, first, recent))
        excess = store.lengths - self.limits
        if int(excess.max()) == 1:  # a decoded token: one slot per lane changes, nothing is copied
            store.drop_one(_worst(scores).flatten(), excess == 1)
        elif int(excess.max()) > 1:
            keys, stored_values, _, _, _ = store.padded()
            kept = select(scores, torch.minimum(self.limits, store.lengths).view(store.rows, -1))
            self.store = RaggedStore.pack(kept, keys, stored_values, positions, values)
        self.tail = 0
        return out


def _worst(scores: TokenScores) -> Tensor:
    """(B, H) slot of the token to drop: the lowest score among the least protected."""
    guard = scores.guard.masked_fill(~scores.valid, torch.iinfo(torch.int64).max)
    weakest = (guard == guard.amin(-1, keepdim=True)) & scores.valid
    return scores.values.masked_fill(~weakest, torch.inf).argmin(-1)
