"""The cache: transformers' own layers, with every plain full-attention layer replaced by one that evicts."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicCache

from sparing.adapters.layers import EvictingLayer
from sparing.adapters.structure import Structure
from sparing.core.method import Method
from sparing.core.plan import LayerPlan, Plan
from sparing.core.scorer import Scorer, standardised
from sparing.core.token_scores import TokenScores, select
from sparing.errors import CacheStateError, UnsupportedModelError


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        method: the method's name.
        tokens_seen: tokens of the longest sequence, pads included.
        bytes_full: what transformers' dynamic cache would hold for the same tokens.
        bytes_kept: what this cache holds, with slack and bookkeeping.
        plan: what the last eviction kept; None if none has happened.
    """

    method: str
    tokens_seen: int
    bytes_full: int
    bytes_kept: int
    plan: Plan | None

    @property
    def share(self) -> float:
        """bytes_kept / bytes_full."""
        return self.bytes_kept / self.bytes_full if self.bytes_full else 1.0

    def __str__(self) -> str:
        sizes = f"{self.bytes_kept:,} of {self.bytes_full:,} bytes ({self.share:.1%})"
        return f"{self.method}: {self.tokens_seen} tokens seen, {sizes} held"


class EvictingCache(Cache):
    """A KV cache that keeps what matters.

    Args:
        structure: the model's structure.
        method: what to keep; None for a cache that only watches, to be forked (see `fork`).
        watch: scorers that observe the prompt, in addition to the method's.
    """

    def __init__(self, structure: Structure, method: Method | None, watch: Sequence[Scorer] = ()) -> None:
        layers: list[Any] = list(DynamicCache(config=structure.config).layers)
        self.structure, self.method = structure, method
        self.evicting: list[EvictingLayer] = []
        for number, index in enumerate(structure.full_layers):
            layers[index] = EvictingLayer(self, number)
            self.evicting.append(layers[index])
        own = () if method is None else (method.parts().scorer,)
        self.scorers: tuple[Scorer, ...] = tuple(dict.fromkeys([*own, *watch]))
        self.observing_seconds: dict[Scorer, float] = defaultdict(float)
        self.plan: Plan | None = None
        self.prompt_length: int | None = None
        self.is_reading = False
        self._padding: Tensor | None = None
        super().__init__(layers=layers)

    # -- the course of events -----------------------------------------------------------------------------------

    def expect_prompt(self, length: int) -> None:
        """Announce that the prompt (all turns so far) ends at `length` tokens, pads included.

        Everything up to there is read before anything is dropped, in however many chunks; tokens beyond it are
        never dropped with the prompt. Without this the prompt ends at the first forward of a single token.
        """
        if self.method is not None and self.method.budget.keeps_all:
            return
        if self.is_due:  # an earlier turn ended with its prompt: it must not wait for this one
            self.evict()
        self.prompt_length, self.is_reading = length, bool(self.scorers)
        for layer in self.evicting:
            if layer.store is not None and layer.store.scores is not None and self.scorers[0].accumulates:
                layer.states = {self.scorers[0]: layer.store.padded()[4]}

    def begin_observing(self, query_length: int, padding: Tensor | None) -> None:
        """The first layer is being attended, densely."""
        if padding is not None and not bool(padding.all()):
            self._padding = padding
        first_prompt = self.plan is None and self.prompt_length is None and query_length > 1
        if first_prompt and not (self.method is not None and self.method.budget.keeps_all):
            self.is_reading = bool(self.scorers)

    def before_update(self, query_length: int) -> None:
        """New tokens are about to be stored: evict first, if the prompt has been read."""
        ends_here = self.prompt_length is None and query_length == 1 and self.evicting[0].seen > 0
        if self.is_due or (ends_here and self.is_reading and self.method is not None):
            self.evict()

    def before_row_change(self, rows: Tensor) -> None:
        """Rows are about to be exchanged: what was observed belongs to the old ones, so use it now."""
        if self.is_reading and self.method is not None and self.evicting[0].states:
            self.evict()
        if self._padding is not None:
            self._padding = self._padding[rows.to(self._padding.device)]

    def after_crop(self, seen: int) -> None:
        """Tokens were removed: observations of them must not be used."""
        if self.is_reading and self.prompt_length is None:
            raise CacheStateError(
                "tokens were cropped before the prompt had ended, so what was observed of them is wrong",
                "announce the prompt with cache.expect_prompt(length) before the first forward",
            )

    def after_reset(self) -> None:
        """The cache is empty again."""
        self.plan, self.prompt_length, self.is_reading, self._padding = None, None, False, None

    @property
    def is_due(self) -> bool:
        """True if an announced prompt has been read and nothing has been dropped for it yet."""
        read = self.prompt_length is not None and self.evicting[0].seen >= self.prompt_length > 0
        return self.method is not None and self.is_reading and read

    @property
    def follows_decoding(self) -> bool:
        """True if tokens are dropped at every step."""
        return self.method is not None and self.method.parts().moment == "every_step"

    @property
    def remembers_scores(self) -> bool:
        """True if the scores of stored tokens are needed later."""
        return bool(self.scorers) and self.method is not None and self.scorers[0].follows_decoding

    def pads(self, rows: int) -> Tensor:
        """(rows,) left pads of every row."""
        if self._padding is None:
            return torch.zeros(rows, dtype=torch.int64)
        return (~self._padding).sum(-1)

    # -- evicting -----------------------------------------------------------------------------------------------

    def evict(self) -> None:
        """Score, spread the budget, and drop, in all layers: the end of the prompt. Called when it is due.

        Raises:
            UnsupportedModelError: a layer's attention never came by. MethodRefusedError: see the scorer.
            CacheStateError: nothing was read, or pads are not on the left.
        """
        if self.method is None or not self.is_reading:
            raise CacheStateError("there is nothing to evict", "run the prompt through the model first")
        if not all(layer.attended for layer in self.evicting):
            problem = "the attention of a full-attention layer did not go through AttentionInterface"
            raise UnsupportedModelError(self.structure.name, problem)
        end = self.evicting[0].seen
        if self.prompt_length is not None:
            end = min(end, self.prompt_length)
        pads = self._checked_pads(end)
        parts = self.method.parts()
        seen = [end - pad for pad in pads]
        per_head = [self.method.budget.tokens_per_head(n, self._bytes_per_token()) for n in seen]
        raw = [layer.scores(parts.scorer, end, per_head) for layer in self.evicting]
        scores = raw if parts.scorer.comparable_across_heads else [_standardised(s) for s in raw]
        counts = parts.allocator.allocate(scores, per_head)
        plans = []
        for layer, layer_scores, layer_raw, layer_counts in zip(self.evicting, scores, raw, counts, strict=True):
            kept = select(layer_scores, layer_counts)
            positions = layer.stored_tokens().positions
            plans.append(
                LayerPlan(
                    self.structure.full_layers[layer.number],
                    tuple(seen),
                    [
                        [positions[row, head][slots].sort().values.cpu() for head, slots in enumerate(heads)]
                        for row, heads in enumerate(kept)
                    ],
                )
            )
            drops = bool((layer_counts.to(layer_scores.valid.device) < layer_scores.valid.sum(-1)).any())
            if drops or self.follows_decoding:
                layer.keep(kept, layer_raw.values, end, self._limits(layer_counts))
        self.plan = Plan(self.method.label, plans)
        self.is_reading, self.prompt_length = False, None
        for layer, layer_raw in zip(self.evicting, raw, strict=True):
            # Sums over all rows go on in the next turn; the store remembers them where there is one.
            layer.transformed = None
            layer.states = {parts.scorer: layer_raw.values} if parts.scorer.accumulates and layer.store is None else {}

    def _limits(self, counts: Tensor) -> Tensor:
        """(rows, kv_heads) tokens that may be held while decoding: a ratio fixes them at the prompt's end."""
        assert self.method is not None
        if self.method.budget.kind == "ratio":
            return counts
        endless = torch.iinfo(torch.int64).max
        return torch.full_like(counts, self.method.budget.tokens_per_head(endless, self._bytes_per_token()))

    def _checked_pads(self, end: int) -> list[int]:
        rows = self.evicting[0]
        count = rows.store.rows if rows.store is not None else int(rows.keys.shape[0])
        if self._padding is not None:
            prompt = self._padding[:, :end].long()
            if bool((prompt.diff(dim=-1) < 0).any()):
                raise CacheStateError("pads must be on the left of each row", "set tokenizer.padding_side='left'")
        return [int(pad) for pad in self.pads(count)]

    def _bytes_per_token(self) -> int:
        """Bytes of one token's key and value in all evicting layers together."""
        total = 0
        for layer in self.evicting:
            tensors = (layer.store.keys, layer.store.values) if layer.store is not None else (layer.keys, layer.values)
            heads = layer.store.kv_heads if layer.store is not None else layer.keys.shape[1]
            total += sum(heads * t.shape[-1] * t.element_size() for t in tensors)
        return total

    # -- copies and accounting ----------------------------------------------------------------------------------

    def fork(self, method: Method) -> EvictingCache:
        """A cache compressed by `method`, from this one that has read the prompt and dropped nothing.

        The scorer must be among those watched (not needed if the method keeps everything). Dense tensors are
        shared, since they are never written in place, so many methods can be compared on one prefill.
        """
        if any(layer.is_compressed for layer in self.evicting):
            raise CacheStateError("only a cache that has dropped nothing can be forked")
        if not method.budget.keeps_all and method.parts().scorer not in self.scorers:
            problem = f"the scorer of {method.label} did not watch the prompt"
            raise CacheStateError(problem, "name the method when making the cache: session.watching_cache([...])")
        child = self._copy(method)
        child.is_reading = not method.budget.keeps_all
        child.prompt_length = self.prompt_length
        if child.is_reading:
            child.evict()
        return child

    def clone(self) -> EvictingCache:
        """An independent copy in the same state, e.g. to ask several questions on one compressed context."""
        return self._copy(self.method)

    def _copy(self, method: Method | None) -> EvictingCache:
        child = EvictingCache(self.structure, method, watch=self.scorers if method is self.method else ())
        child.plan, child._padding = self.plan, self._padding
        child.prompt_length, child.is_reading = self.prompt_length, self.is_reading
        mine: Any
        new: Any
        for index, (mine, new) in enumerate(zip(self.layers, child.layers, strict=True)):
            if not isinstance(mine, EvictingLayer):
                child.layers[index] = copy.deepcopy(mine)
                continue
            state = {k: v for k, v in mine.__dict__.items() if k not in ("_cache", "number", "store", "states")}
            new.__dict__.update(state)
            new.store = mine.store.clone() if mine.store is not None else None
            new.states = {scorer: state for scorer, state in mine.states.items() if scorer in child.scorers}
        return child

    @property
    def bytes_kept(self) -> int:
        """Bytes that this cache holds: every tensor of every layer, slack and bookkeeping included."""
        total = 0 if self._padding is None else self._padding.nbytes
        for layer in self.layers:
            total += _bytes_alive(layer)
            if isinstance(layer, EvictingLayer) and layer.store is not None:
                total += layer.store.nbytes
        return total

    @property
    def bytes_full(self) -> int:
        """Bytes that transformers' dynamic cache would hold for the same tokens."""
        total = 0
        layer: Any
        for layer in self.layers:
            if not isinstance(layer, EvictingLayer):
                total += _bytes_alive(layer)
            elif layer.store is not None:
                per_slot = layer.store.keys.shape[-1] + layer.store.values.shape[-1]
                lanes = layer.store.rows * layer.store.kv_heads
                total += lanes * layer.seen * per_slot * layer.store.keys.element_size()
            elif layer.keys is not None and layer.keys.numel():
                per_token = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
                total += per_token * layer.seen
        return total

    def report(self) -> CacheReport:
        """What is held now; carries out an eviction that is due."""
        if self.is_reading and self.method is not None and self.evicting[0].states:
            self.evict()
        label = self.method.label if self.method is not None else "full"
        return CacheReport(label, self.evicting[0].seen, self.bytes_full, self.bytes_kept, self.plan)


def _bytes_alive(layer: Any) -> int:
    """Bytes of the storages behind a layer's tensors: a sliding window may be a view of more than the window."""
    tensors = [leaf for leaf in pytree.tree_leaves(list(vars(layer).values())) if isinstance(leaf, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _standardised(scores: TokenScores) -> TokenScores:
    return TokenScores(standardised(scores.values, scores.valid), scores.valid, scores.guard)
