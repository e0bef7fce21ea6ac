"""The cache: transformers' own layers, with every plain full-attention layer replaced by one that evicts."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from sparing.adapters.accounting import CacheReport, bytes_alive
from sparing.adapters.cascading import Cascading, prefilling_for
from sparing.adapters.layers import EvictingLayer
from sparing.adapters.masks import check_left_pads
from sparing.adapters.replaying import Tape, replay
from sparing.adapters.shortening import Shortening
from sparing.adapters.structure import Structure
from sparing.core.cascade import Cascade
from sparing.core.method import Method, Parts
from sparing.core.plan import LayerPlan, Plan
from sparing.core.prefill import SparsePrefill
from sparing.core.prompt import PromptDropper
from sparing.core.scorer import Replay, Scorer, standardised
from sparing.core.token_scores import TokenScores
from sparing.errors import CacheStateError, UnsupportedModelError


class EvictingCache(Cache):
    """A KV cache that keeps what matters.

    Args:
        structure: the model's structure.
        method: what to keep; None for a cache that only watches, to be forked (see `fork`).
        watch: scorers that observe the prompt, in addition to the method's.
        reading: how prompts are read, of a cache that only watches; None for dense attention.
        dropper: what drops tokens of prompts before they are read, of a cache that only watches.
    """

    def __init__(
        self,
        structure: Structure,
        method: Method | None,
        watch: Sequence[Scorer] = (),
        reading: SparsePrefill | Cascade | None = None,
        dropper: PromptDropper | None = None,
    ) -> None:
        layers: list[Any] = list(DynamicCache(config=structure.config).layers)
        self.structure, self.method = structure, method
        self.evicting: list[EvictingLayer] = []
        for number, index in enumerate(structure.full_layers):
            layers[index] = EvictingLayer(self, number)
            self.evicting.append(layers[index])
        self.parts: Parts | None = None if method is None else method.parts()  # asked for at every token of every layer
        own = () if self.parts is None else (self.parts.scorer,)
        self.scorers: tuple[Scorer, ...] = tuple(dict.fromkeys([*own, *watch]))
        self.observing_seconds: dict[Scorer, float] = defaultdict(float)
        self.plan: Plan | None = None
        self.prompt_length: int | None = None
        self.is_reading = False
        self.replaying: tuple[Scorer, Replay] | None = None
        self.tape = Tape()
        self.to_read: tuple[int, list[Tensor]] = (0, [])  # tokens seen, and what each head of each layer then reads
        self.prefilling = prefilling_for(reading if method is None else method.reading, method, structure, len(layers))
        self.dropper = dropper if method is None else method.shortening
        self.shortening: Shortening | None = None
        self._padding: Tensor | None = None
        self._notes: tuple[str, ...] = ()
        super().__init__(layers=layers)

    # -- the course of events -----------------------------------------------------------------------------------

    def expect_prompt(self, length: int) -> None:
        """Announce that the prompt (all turns so far) ends at `length` tokens, pads included.

        Everything up to there is read before anything is dropped, in however many chunks; tokens beyond it are
        never dropped with the prompt. Without this the prompt ends at the first forward of a single token.
        """
        if self.prefilling is not None:
            self.prefilling.begin_turn(self.evicting[0].seen, length)
        if self.method is not None and self.method.keeps_all:
            return
        if self.is_due:  # an earlier turn ended with its prompt: it must not wait for this one
            self.evict()
        self.prompt_length, self.is_reading = length, bool(self.scorers)
        scores_again = self.parts is not None and self.parts.scores_again
        for layer in self.evicting:
            if scores_again and layer.states:
                continue  # what was observed since the cache was last full counts for this turn
            if layer.store is not None and layer.store.scores is not None and self.scorers[0].accumulates:
                layer.states = {self.scorers[0]: layer.store.bookkeeping().scores}
            elif layer.reading is not None:
                layer.states = {self.scorers[0]: layer.reading.state}

    def begin_observing(self, query_length: int, padding: Tensor | None) -> None:
        """The first layer is being attended, densely."""
        if padding is not None and not bool(padding.all()):
            self._padding = padding
        first_prompt = self.plan is None and self.prompt_length is None and query_length > 1
        if first_prompt and not (self.method is not None and self.method.keeps_all):
            self.is_reading = bool(self.scorers)

    def before_update(self, query_length: int) -> None:
        """New tokens are about to be stored: evict first, if the prompt, or a chunk that counts, has been read."""
        if self.replaying is not None or self.parts is None:
            return
        has_more = self.evicting[0].seen > 0 and self.is_reading
        if self.is_due or (has_more and self.prompt_length is None and query_length == 1):
            self.evict()
        elif has_more and self.parts.moment == "chunk_end":
            self.evict(is_end=False)

    def before_row_change(self, rows: Tensor) -> None:
        """Rows are about to be exchanged: what was observed belongs to the old ones, so use it now."""
        if self.is_reading and self.method is not None and self.evicting[0].states:
            self.evict()
        if self._padding is not None:
            self._padding = self._padding[rows.to(self._padding.device)]
        if self.shortening is not None:
            self.shortening = self.shortening.of_rows(rows.tolist(), self.evicting[0].rows)
        self.to_read = (0, [])

    def after_crop(self, seen: int) -> None:
        """Tokens were removed: observations of them must not be used."""
        self.tape.cut(seen)
        if self.prefilling is not None and self.prefilling.turn is not None and seen < self.prefilling.turn[1]:
            self.prefilling.turn = None  # what is read in its place was not announced
        if self.replaying is not None:
            return
        if self.is_reading and self.prompt_length is None:
            raise CacheStateError(
                "tokens were cropped before the prompt had ended, so what was observed of them is wrong",
                "announce the prompt with cache.expect_prompt(length) before the first forward",
            )

    def after_reset(self) -> None:
        """The cache is empty again."""
        self.plan, self.prompt_length, self.is_reading, self._padding = None, None, False, None
        self.prefilling = None if self.prefilling is None else self.prefilling.fresh()
        self.shortening = None
        self.tape.cut(0)
        self.to_read = (0, [])

    @property
    def is_due(self) -> bool:
        """True if an announced prompt has been read and nothing has been dropped for it yet."""
        read = self.prompt_length is not None and self.evicting[0].seen >= self.prompt_length > 0
        return self.method is not None and self.is_reading and read

    @property
    def follows_decoding(self) -> bool:
        """True if tokens are dropped at every step."""
        if self.method is None or self.parts is None:
            return False
        return self.parts.moment == "every_step" and not self.method.budget.keeps_all

    @property
    def remembers_scores(self) -> bool:
        """True if the scores of stored tokens are needed later."""
        return self.parts is not None and (self.parts.scorer.accumulates or self.parts.follows_by_step)

    def pads(self, rows: int) -> Tensor:
        """(rows,) left pads of every row."""
        if self._padding is None:
            return torch.zeros(rows, dtype=torch.int64)
        return (~self._padding).sum(-1)

    # -- evicting -----------------------------------------------------------------------------------------------

    def evict(self, *, is_end: bool = True) -> None:
        """Score, spread the budget, and drop, in all layers. Called when it is due.

        Args:
            is_end: of the prompt; False after a chunk that others follow.

        Raises:
            UnsupportedModelError: a layer's attention never came by. MethodRefusedError: see the scorer.
            CacheStateError: nothing was read, or pads are not on the left.
        """
        if self.method is None or self.parts is None or not self.is_reading:
            raise CacheStateError("there is nothing to evict", "run the prompt through the model first")
        if not all(layer.attended for layer in self.evicting):
            problem = "the attention of a full-attention layer did not go through AttentionInterface"
            raise UnsupportedModelError(self.structure.name, problem)
        end = self.evicting[0].seen
        if self.prompt_length is not None:
            end = min(end, self.prompt_length)
        pads = self._checked_pads(end)
        if is_end:
            replay(self, self.scorers[0], end)
        parts = self.parts
        seen = [end - pad for pad in pads]
        whole = self._with_dropped(seen)
        per_head = [min(self._tokens_per_head(n), read) for n, read in zip(whole, seen, strict=True)]
        if parts.reader is None:
            self.plan = Plan(self.method.label, self._drop(parts, end, seen, per_head))
        else:
            counts = parts.allocator.allocate(self._scores(parts, end, per_head)[1], per_head)
            for layer, weights in zip(self.evicting, counts, strict=True):
                layer.start_reading(parts.reader, parts.scorer, weights)
            self.to_read = (0, [])
        self._notes = self._remarks(parts, max(whole, default=0))
        if is_end:
            self.is_reading, self.prompt_length = False, None

    def _remarks(self, parts: Parts, seen: int) -> tuple[str, ...]:
        assert self.method is not None
        notes = []
        if self.method.budget.kind == "ratio" and seen < self.method.min_prompt:
            notes.append(f"nothing dropped: the prompt is shorter than min_prompt={self.method.min_prompt}")
        zeros, numbers = (sum(counts) for counts in zip(*(layer.zeros for layer in self.evicting), strict=True))
        if numbers:
            notes.append(f"nothing freed: of the differences that stand for its keys, {zeros / numbers:.1%} are zero")
        return tuple(notes)

    def _scores(self, parts: Parts, end: int, per_head: list[int]) -> tuple[list[TokenScores], list[TokenScores]]:
        """Of every layer: the scores as the scorer gives them, and as heads compete by them."""
        raw = [layer.scores(parts.scorer, end, per_head) for layer in self.evicting]
        return raw, raw if parts.scorer.comparable_across_heads else [_standardised(s) for s in raw]

    def _drop(self, parts: Parts, end: int, seen: list[int], per_head: list[int]) -> list[LayerPlan]:
        """Carry out an eviction; returns what is kept."""
        method = self.method
        assert method is not None
        raw, scores = self._scores(parts, end, per_head)
        counts = parts.allocator.allocate(scores, per_head)
        plans = []
        for layer, layer_scores, layer_raw, layer_counts in zip(self.evicting, scores, raw, counts, strict=True):
            present = layer_scores.valid.sum(-1).cpu()
            loses = layer_counts < present
            wanted = torch.where(loses, (layer_counts - parts.action.reserve).clamp_min(0), present)
            kept = layer.select(parts.scorer, layer_scores, wanted)
            if bool(loses.any()) or self.follows_decoding or method.is_compact:
                planned = layer.keep(kept, layer_raw.values, end, self._limits(layer_counts, seen), parts.action)
            else:
                positions = layer.stored_tokens().positions.cpu()
                planned = [[positions[r, h][slots.cpu()] for h, slots in enumerate(row)] for r, row in enumerate(kept)]
            plans.append(LayerPlan(self.structure.full_layers[layer.number], tuple(seen), planned))
            layer.transformed, layer.pending = None, []
            layer.states = self._states_after(layer, parts.scorer, layer_raw.values)
        return plans

    def _states_after(self, layer: EvictingLayer, scorer: Scorer, values: Tensor) -> dict[Scorer, Any]:
        """What a scorer still knows of a layer once tokens have been dropped."""
        if scorer.accumulates:  # sums over all rows go on; the store remembers them where there is one
            held = None if layer.store is None else layer.store.bookkeeping().scores
            return {scorer: values if layer.store is None else held}
        is_asked_again = self.parts is not None and self.parts.moment != "prefill_end"
        if is_asked_again and scorer.state_outlives_eviction and scorer in layer.states:
            return {scorer: layer.states[scorer]}
        return {}

    def _tokens_per_head(self, seen: int) -> int:
        assert self.method is not None
        if self.method.budget.kind == "ratio" and seen < self.method.min_prompt:
            return seen
        return self.method.budget.tokens_per_head(seen, self._bytes_per_token())

    def _with_dropped(self, seen: list[int]) -> list[int]:
        """Per row, the tokens so far as the caller counts them: those read, and those dropped from the prompt."""
        dropped = (0,) if self.shortening is None else self.shortening.dropped
        return [n + dropped[row * len(dropped) // len(seen)] for row, n in enumerate(seen)]

    def _limits(self, counts: Tensor, seen: list[int]) -> Tensor:
        """(rows, kv_heads) tokens that may be held while decoding: a ratio fixes them at the prompt's end."""
        assert self.method is not None
        if self.method.budget.kind == "ratio":
            whole = self._with_dropped(seen)
            is_short = counts.new_tensor([n < self.method.min_prompt for n in whole]).bool()[:, None]
            return torch.where(is_short, self.method.min_prompt, counts)
        most = self.method.budget.tokens_per_head(torch.iinfo(torch.int64).max, self._bytes_per_token())
        is_full = counts.new_tensor([n >= most for n in seen]).bool()[:, None]
        return torch.where(is_full, counts, most)  # what the allocator has given; before that, the same for all

    def _checked_pads(self, end: int) -> list[int]:
        if self._padding is not None:
            check_left_pads(self._padding[:, :end])
        return [int(pad) for pad in self.pads(self.evicting[0].rows)]

    def _bytes_per_token(self) -> int:
        """Bytes of one token's key and value in all evicting layers together."""
        return sum(layer.bytes_per_token for layer in self.evicting)

    # -- copies and accounting ----------------------------------------------------------------------------------

    def fork(self, method: Method) -> EvictingCache:
        """A cache compressed by `method`, from this one that has read the prompt and dropped nothing.

        The scorer must be among those watched (not needed if the method keeps everything). Dense tensors are
        shared, since they are never written in place, so many methods can be compared on one prefill.
        """
        if any(layer.is_compressed for layer in self.evicting) and not isinstance(self.prefilling, Cascading):
            raise CacheStateError("only a cache that has dropped nothing can be forked")
        if method.reading != (None if self.prefilling is None else self.prefilling.method):
            problem = f"the prompt was not read as {method.label} reads it"
            raise CacheStateError(problem, "name the methods when making the cache: session.watching_cache([...])")
        if method.shortening != self.dropper:
            problem = f"the prompt was not shortened as {method.label} shortens it"
            raise CacheStateError(problem, "name the methods when making the cache: session.watching_cache([...])")
        if not method.keeps_all and method.parts().scorer not in self.scorers:
            problem = f"the scorer of {method.label} did not watch the prompt"
            raise CacheStateError(problem, "name the method when making the cache: session.watching_cache([...])")
        if not method.keeps_all:
            seen = self.evicting[0].seen
            replay(self, method.parts().scorer, seen if self.prompt_length is None else min(seen, self.prompt_length))
        child = self._copy(method)
        if method.keeps_all or not method.parts().scorer.replays:
            child.tape.cut(0)  # written for another's scorer: not among the bytes of this method
        child.is_reading = not method.keeps_all
        child.prompt_length = self.prompt_length
        if child.is_reading:
            child.evict()
        else:
            for layer in child.evicting:
                layer.states = {}
        return child

    def clone(self) -> EvictingCache:
        """An independent copy in the same state, e.g. to ask several questions on one compressed context."""
        return self._copy(self.method)

    def _copy(self, method: Method | None) -> EvictingCache:
        child = EvictingCache(self.structure, method, watch=self.scorers if method is self.method else ())
        child.plan, child._padding = self.plan, self._padding
        child.prompt_length, child.is_reading = self.prompt_length, self.is_reading
        child.tape, child._notes = self.tape.copy(), self._notes
        child.prefilling = None if self.prefilling is None else self.prefilling.copy()
        child.dropper, child.shortening = self.dropper, self.shortening
        mine: Any
        new: Any
        for index, (mine, new) in enumerate(zip(self.layers, child.layers, strict=True)):
            if not isinstance(mine, EvictingLayer):
                child.layers[index] = copy.deepcopy(mine)
                continue
            state = {
                k: v for k, v in mine.__dict__.items() if k not in ("_cache", "number", "store", "reading", "states")
            }
            new.__dict__.update(state)
            new.store = mine.store.clone() if mine.store is not None else None
            new.reading = mine.reading.clone() if mine.reading is not None else None
            new.pending = list(mine.pending)
            new.states = {scorer: state for scorer, state in mine.states.items() if scorer in child.scorers}
        return child

    @property
    def bytes_kept(self) -> int:
        """Bytes that this cache holds: every tensor of every layer, slack, bookkeeping and observations included."""
        columns = None if self.shortening is None else self.shortening.columns
        return bytes_alive(self.layers, self._padding, self.tape.ids, self.to_read, columns)

    @property
    def bytes_full(self) -> int:
        """Bytes that transformers' dynamic cache would hold for these tokens and those dropped from the prompt."""
        total, cut = 0, 0 if self.shortening is None else self.shortening.width - self.shortening.length
        layer: Any
        for layer in self.layers:
            if not isinstance(layer, EvictingLayer):
                total += bytes_alive(layer)
            elif layer.is_initialized:
                total += layer.rows * (layer.seen + cut) * layer.bytes_per_token
        return total

    @property
    def density(self) -> float | None:
        """The share of the whole prompt's dense attention that was computed; None where all of it was."""
        read = None if self.prefilling is None else self.prefilling.report.density
        if self.shortening is None:
            return read
        return self.shortening.density * (1.0 if read is None else read)

    def report(self) -> CacheReport:
        """What is held now; carries out an eviction that is due."""
        if self.is_reading and self.method is not None and self.evicting[0].states:
            self.evict()
        label = self.method.label if self.method is not None else "full"
        reading = [layer.reading for layer in self.evicting if layer.reading is not None]
        there = sum(part.seen for part in reading)
        share = sum(part.read for part in reading) / there if there else None
        sizes = self.bytes_full, self.bytes_kept
        prefill = None if self.prefilling is None else self.prefilling.report
        notes = self._notes
        if self.dropper is not None and self.shortening is None and self.evicting[0].seen:
            notes += (
                "the prompt was read whole: generate and session.prefill shorten prompts, single forwards do not",
            )
        return CacheReport(label, self.evicting[0].seen, *sizes, self.plan, share, notes, prefill, self.shortening)


def _standardised(scores: TokenScores) -> TokenScores:
    return replace(scores, values=standardised(scores.values, scores.valid))
