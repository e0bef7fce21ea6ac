"""What a layer holds, how it is scored, and how it is dropped.

A layer begins dense, exactly as transformers' own. Once compressed it holds a `RaggedStore`; or, where the model
transforms keys between cache and attention (latent attention, MLA) so that heads cannot be ragged, fewer whole tokens,
chosen by the transformed keys; or, for methods that drop nothing and read a part, everything in a `Reading`.

`seen` counts tokens of the sequence, pads included, and is what transformers asks for (`get_seq_length`); what is
stored is counted by the store.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from sparing.adapters.projection import ModuleProjection
from sparing.adapters.reading import Reading
from sparing.adapters.turning import Originals
from sparing.core.actions import Action, Drop, Folded, Rerotate
from sparing.core.reader import Reader
from sparing.core.scorer import KeyValues, Scorer
from sparing.core.token_scores import TokenScores, guard_ends, select
from sparing.errors import CacheStateError, MethodRefusedError
from sparing.kernels.compact import CompactStore, Store
from sparing.kernels.ragged import RaggedStore

if TYPE_CHECKING:
    from sparing.adapters.cache import EvictingCache


class HoldingLayer(DynamicLayer):
    """The tokens of one full-attention layer of an `EvictingCache`.

    Attributes:
        number: which of the cache's evicting layers this is.
        seen: tokens of the sequence so far, pads included.
        store: the ragged heads once compressed, else None. reading: see `Reading`; else None.
        tail: newest tokens that lie without a gap at the end of every lane, and can be cropped.
        states: what each scorer has observed of the prompt in progress.
        transformed: keys and values as the attention sees them, (B, Hq, N, D), if the model transforms them.
        projection: the attention module's output projection, once its attention has come by.
        originals: see `Originals`; of half-precision keys that are turned again and again.
        pending: query rows since the last eviction, of methods that score again while decoding goes on.
    """

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
        self.store: Store | None = None
        self.reading: Reading | None = None
        self.zeros = (0, 0)  # see `Folded.zeros`
        self.states: dict[Scorer, Any] = {}
        self.pending: list[Tensor] = []
        self.attended = False
        self.transformed: tuple[Tensor, Tensor] | None = None
        self.is_transformed = False
        self.projection: ModuleProjection | None = None
        self.originals: Originals | None = None
        self.limits: Tensor | None = None  # (lanes,) tokens that a method which follows decoding may hold
        self.short_positions: Tensor | None = None  # (B, n) of a layer that evicts whole tokens
        self.short_valid: Tensor | None = None
        self.gate: Tensor | None = None  # (B, Hq) bool, the heads in use, of methods that do without some

    @property
    def cache(self) -> EvictingCache:
        """The cache that the layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise CacheStateError("the cache that this layer belongs to is gone", "keep a reference to the cache")
        return cache

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.store.rows if self.store is not None else int(self._dense()[0].shape[0])

    @property
    def is_compressed(self) -> bool:
        """True once tokens have been dropped."""
        return self.store is not None or self.short_valid is not None

    @property
    def kv_heads(self) -> int:
        """KV heads that choose for themselves; 1 where whole tokens are evicted."""
        if self.store is not None:
            return self.store.kv_heads
        return 1 if self.is_transformed else int(self._dense()[0].shape[1])

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value, in all heads."""
        if self.store is not None:
            return self.store.kv_heads * self.store.bytes_per_token
        return sum(t.shape[1] * t.shape[-1] * t.element_size() for t in self._dense())

    @property
    def can_unrotate(self) -> bool:
        """True if keys were cached unrotated, or rotated as a whole by an embedding that can be inverted."""
        structure = self.cache.structure
        if not structure.rotates:
            return True
        dim = self._dense()[0].shape[-1] if self.store is None else self.store.dims[0]
        return structure.rotary is not None and not self.is_transformed and dim == structure.rotary.head_dim

    def _dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values, of a layer that has dropped nothing."""
        return (self.keys, self.values) if self.reading is None else self.reading.tokens()

    def note_module(self, module: nn.Module, num_heads: int) -> None:
        """Remember where the output projection is."""
        if self.projection is None:
            self.projection = ModuleProjection(module, num_heads)

    def stored_tokens(self) -> KeyValues:
        """What is stored, as scorers see it."""
        cache, bias = self.cache, None
        if self.store is not None:
            held = self.store.padded()
            keys, values, valid, positions, bias = held.keys, held.values, held.valid, held.positions, held.bias
        else:
            keys, values = self.transformed if self.transformed is not None else self._dense()
            rows, heads, tokens = keys.shape[:3]
            if self.short_positions is not None and self.short_valid is not None:
                positions, valid = self.short_positions, self.short_valid
            else:
                positions = torch.arange(tokens, device=keys.device).expand(rows, -1)
                valid = positions >= cache.pads(rows).to(keys.device)[:, None]
            positions, valid = (t[:, None].expand(rows, heads, tokens) for t in (positions, valid))
        pads = cache.pads(keys.shape[0]).to(keys.device)
        rotary, layers = cache.structure.rotary, len(cache.evicting)
        number = cache.structure.attention_layers[self.number]
        return KeyValues(
            keys, values, valid, positions, pads, self.number, layers, rotary, bias, self.projection, number
        )

    # -- scoring and dropping -----------------------------------------------------------------------------------

    def check(self, scorer: Scorer) -> None:
        """Refuse a scorer that this layer cannot serve."""
        structure, name = self.cache.structure, type(scorer).__name__
        method = self.cache.method
        parts = self.cache.parts
        if parts is not None and parts.action.needs_rotary:
            self._check_turning(type(parts.action).__name__)
        if parts is not None and parts.reader is not None and parts.reader.needs_rotary and structure.rotates:
            self._check_turning(type(parts.reader).__name__)
        if scorer.needs_rotary and not self.can_unrotate:
            problem = f"needs queries or keys before rotation, which {structure.name} does not give"
            raise MethodRefusedError(name, problem, "use a method without them, e.g. snapkv")
        if not self.is_transformed or parts is None or method is None:
            return
        if method.is_compact:
            problem = f"cannot code what {structure.name} caches, which its attention transforms"
            raise MethodRefusedError(name, problem, "leave `bits` out, and hold all channels")
        fix = 'use moment="prefill_end" and no other action than dropping'
        if parts.moment != "prefill_end" or parts.reader is not None:
            problem = f"cannot follow decoding on {structure.name}, whose attention transforms the cached keys"
            raise MethodRefusedError(name, problem, fix)
        if type(parts.action) is not Drop:
            problem = f"cannot merge tokens on {structure.name}, whose attention transforms the cached keys"
            raise MethodRefusedError(name, problem, fix)

    def _check_turning(self, action: str) -> None:
        """Refuse what turns keys to other positions, where that is not one rotation for all lengths."""
        structure = self.cache.structure
        if structure.rotary is None or not structure.rotary.is_fixed or not self.can_unrotate:
            problem = f"turns keys to other positions, which {structure.name} does not allow"
            raise MethodRefusedError(action, problem, "leave keys at their own positions")

    def scores(self, scorer: Scorer, end: int, tokens_per_head: list[int]) -> TokenScores:
        """Score what is stored, up to position `end`; what comes after is neither scored nor dropped."""
        self.check(scorer)
        stored = self.stored_tokens()
        values = scorer.score(self.states.get(scorer), stored).float()
        valid, positions = stored.valid, stored.positions
        heads = scorer.rank_heads(self.states.get(scorer), stored)
        if self.is_transformed:  # one choice for the whole layer
            values, valid, positions = values.mean(1, keepdim=True), valid[:, :1], positions[:, :1]
            heads = None
        valid = valid & (positions < end)
        first, recent = torch.tensor([scorer.protects(tokens) for tokens in tokens_per_head]).unbind(-1)
        guard = guard_ends(valid, positions, stored.pads, first, recent)
        return TokenScores(values, valid, guard, stored.attention_layer, heads)

    def select(self, scorer: Scorer, scores: TokenScores, counts: Tensor) -> list[list[Tensor]]:
        """The best `counts[row, head]` slots of every row and head, by what the scorer says now that it knows them."""
        if scorer.refines:
            protected = scores.valid & (scores.guard > 0)
            room = (counts.to(protected.device) - protected.sum(-1)).clamp_min(0)
            values = scorer.refine(scores.values, scores.valid & ~protected, room, self.stored_tokens())
            scores = TokenScores(values, scores.valid, scores.guard)
        return select(scores, counts)

    def keep(
        self, kept: list[list[Tensor]], scores: Tensor, end: int, limits: Tensor, action: Action
    ) -> list[list[Tensor]]:
        """Drop everything that is not kept and was seen before position `end`.

        Args:
            kept: [row][kv_head] → slots; `scores` (B, H, N): what to remember for methods that follow decoding.
            limits: (B, H) tokens that methods which follow decoding may hold from now on.
            action: what becomes of the others.

        Returns:
            [row][kv_head] → sorted positions of what is stored, up to `end`.
        """
        self.limits = limits.flatten().to(self.device)
        stored, tail = self.stored_tokens(), self.seen - end
        if self.is_transformed:
            planned = _positions(kept, stored.positions)
            self._keep_tokens([row[0] for row in kept], stored, tail)
        else:
            before = replace(stored, valid=stored.valid & (stored.positions < end)) if tail else stored
            folded = self.fold(action, kept, before, scores)
            self.zeros = folded.zeros
            planned, slots = _positions(folded.kept, folded.positions), folded.kept
            if tail:  # tokens after the prompt stay; they are the last of every lane
                slots = [
                    [torch.cat([chosen, _after(stored, row, head, end)]) for head, chosen in enumerate(heads)]
                    for row, heads in enumerate(slots)
                ]
            follows = scores if self.cache.remembers_scores else None
            self.store = self.packed(slots, folded, follows, action)
            self.keys = self.values = None
        self.tail = self.newest_run()
        self.transformed = None
        return planned

    def fold(self, action: Action, kept: list[list[Tensor]], stored: KeyValues, scores: Tensor) -> Folded:
        """Carry out an action; keys of half precision that will be turned again are turned from their originals."""
        is_asked_again = self.cache.parts is not None and self.cache.parts.moment != "prefill_end"
        if not isinstance(action, Rerotate) or not is_asked_again or stored.keys.element_size() > 2:
            return action.apply(kept, stored, scores)
        lanes = stored.keys.shape[0] * stored.keys.shape[1]
        before = self.originals or Originals((stored.keys[0, 0, :0],) * lanes)
        folded, self.originals = before.turned(action, kept, stored)
        return folded

    def packed(self, slots: list[list[Tensor]], folded: Folded, scores: Tensor | None, action: Action) -> Store:
        """A store of the given slots of what an action has left."""
        if self.store is not None and action.is_exact:  # what is held stays as it is
            return self.store.select(slots, scores)
        store = RaggedStore.pack(slots, folded.keys, folded.values, folded.positions, scores, folded.bias)
        method, parts = self.cache.method, self.cache.parts
        if method is None or parts is None or not method.is_compact:
            return store
        channels, scorer = None, parts.scorer
        if scorer.prunes_channels:
            stored = replace(self.stored_tokens(), keys=folded.keys, values=folded.values)
            stays = torch.zeros_like(stored.valid)
            for row, heads in enumerate(slots):
                for head, chosen in enumerate(heads):
                    stays[row, head, chosen] = True
            channels = scorer.choose_channels(self.states.get(scorer), stored, stays)
        return CompactStore.pack(store, method.code_bits, channels)

    def start_reading(self, reader: Reader, scorer: Scorer, weights: Tensor) -> None:
        """Keep everything, and let every decoded token read a part.

        Args:
            scorer: what has watched the prompt. weights: (B, H) how much each head may read, relative to all others.
        """
        if self.reading is None:
            self.reading = Reading(self.keys, self.values, reader)
            self.keys = self.values = None
        self.reading.state = reader.begin(self.states.get(scorer), self.stored_tokens())
        self.reading.weights = weights
        self.states = {}

    def newest_run(self) -> int:
        """How many of the newest tokens every lane still holds without a gap: those can be cropped again."""
        if self.store is not None:
            lanes = [self.store.lane_positions(lane) for lane in range(self.store.rows * self.store.kv_heads)]
        else:
            lanes = list(self.short_positions) if self.short_positions is not None else []
        runs = []
        for positions in lanes:
            count = positions.shape[0]
            unbroken = positions == torch.arange(self.seen - count, self.seen, device=positions.device)
            runs.append(int(unbroken.flip(0).long().cumprod(0).sum()))
        return min(runs)

    def _keep_tokens(self, kept: list[Tensor], stored: KeyValues, tail: int) -> None:
        """Evict whole tokens; rows that keep fewer are filled up with a slot that nobody may see."""
        tokens = stored.positions.shape[-1]
        newest = torch.arange(tokens - tail, tokens, device=self.keys.device)
        chosen = [torch.cat([slots.to(newest.device), newest]) for slots in kept]
        longest = max(len(slots) for slots in chosen)
        index = torch.stack([nn.functional.pad(slots, (longest - len(slots), 0)) for slots in chosen])
        counts = torch.tensor([len(slots) for slots in chosen], device=index.device)
        self.short_valid = torch.arange(longest, device=index.device) >= (longest - counts)[:, None]
        self.short_positions = stored.positions[:, 0].gather(1, index)
        self.keys, self.values = (
            t.gather(2, index[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
            for t in (self.keys, self.values)
        )


def _positions(slots: list[list[Tensor]], positions: Tensor) -> list[list[Tensor]]:
    return [
        [positions[row, head][chosen.to(positions.device)].sort().values.cpu() for head, chosen in enumerate(heads)]
        for row, heads in enumerate(slots)
    ]


def _after(stored: KeyValues, row: int, head: int, end: int) -> Tensor:
    """The slots of tokens that came after position `end`."""
    return (stored.valid[row, head] & (stored.positions[row, head] >= end)).nonzero().squeeze(-1)
