"""Decoding with a cache that stays at its size: attend, score, and drop what exceeds the limits.

A scorer that follows decoding updates its scores with every token. Any other whose state is of queries is shown the new
queries, and scores what is stored again, each time that a cache is full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparing.core.budget import share_of
from sparing.core.scorer import KeyValues, Queries, Softmax
from sparing.core.token_scores import TokenScores, guard_ends, select
from sparing.errors import CacheStateError
from sparing.kernels.attend import attend, attend_with_rows

if TYPE_CHECKING:
    from sparing.adapters.holding import HoldingLayer

# Queries that wait to be shown to a scorer: few, since they are held beside the cache.
PENDING = 32


def attend_and_follow(layer: HoldingLayer, query: Tensor, softmax: Softmax) -> Tensor:
    """Attention (B, Hq, q, Dv) over the ragged heads of a layer, which is then brought back to its limits."""
    store = layer.store
    assert store is not None
    parts = layer.cache.parts
    assert parts is not None
    by_step, scorer = parts.follows_by_step, parts.scorer
    rows = None
    if by_step and scorer.step_needs_attention:
        out, rows = attend_with_rows(query, store, softmax)
    else:
        out = attend(query, store, softmax)
    if by_step:
        _step(layer, rows)
    else:
        layer.pending.append(query)
        if int((store.lengths - _limits(layer)).max()) > 0:
            _score_again(layer, softmax)
        elif sum(states.shape[2] for states in layer.pending) >= PENDING:
            show_pending(layer, softmax, layer.seen)
    layer.tail = 0
    return out


def _limits(layer: HoldingLayer) -> Tensor:
    if layer.limits is None:
        raise CacheStateError("this layer has no limits yet", "let the prompt end before decoding")
    return layer.limits


def _targets(layer: HoldingLayer) -> Tensor:
    """(lanes,) tokens that a full lane is brought down to: room for `period` tokens, the new one included."""
    parts = layer.cache.parts
    assert parts is not None
    period, limits = parts.period, _limits(layer)
    if isinstance(period, float):
        dropped = torch.tensor([max(share_of(period, limit), 1) for limit in limits.tolist()], device=limits.device)
    else:
        dropped = torch.full_like(limits, period)
    return (limits - dropped + 1).clamp_min(1)


def _step(layer: HoldingLayer, rows: Tensor | None) -> None:
    """Let the scorer follow the new tokens, and drop what exceeds the limits."""
    store, scorer = layer.store, layer.cache.scorers[0]
    assert store is not None
    # Lanes may differ in length (padded batches), so this works on a padded copy, without keys and values.
    known = store.bookkeeping()
    assert known.scores is not None
    valid, positions = known.valid, known.positions
    values = scorer.step(known.scores, rows, positions)
    store.write_scores(values)
    excess = store.lengths - _limits(layer)
    if int(excess.max()) <= 0:
        return
    scores = _guarded(layer, values, valid, positions)
    targets = _targets(layer)
    if int(excess.max()) == 1 and bool((targets == _limits(layer)).all()):
        # A decoded token: one slot per lane changes, nothing is copied.
        store.drop_one(_worst(scores).flatten(), excess == 1)
        return
    kept = select(scores, torch.where(excess > 0, targets, store.lengths).view(store.rows, -1))
    layer.store = store.select(kept, values)


def show_pending(layer: HoldingLayer, softmax: Softmax, end: int) -> KeyValues:
    """Show the scorer the queries since the last time, up to position `end`; returns what is stored."""
    scorer, stored = layer.cache.scorers[0], layer.stored_tokens()
    states = torch.cat(layer.pending, dim=2)
    layer.pending = []
    count = states.shape[2]
    positions = torch.arange(end - count, end, device=states.device)
    valid = torch.ones(states.shape[0], count, dtype=torch.bool, device=states.device)
    queries = Queries(states, positions, valid, softmax)
    layer.states[scorer] = scorer.observe(layer.states.get(scorer), queries, stored)
    return stored


def _score_again(layer: HoldingLayer, softmax: Softmax) -> None:
    """Score what is stored, with the queries since the last time, and drop down to the targets."""
    store, scorer, cache = layer.store, layer.cache.scorers[0], layer.cache
    assert store is not None
    assert cache.parts is not None
    stored = show_pending(layer, softmax, layer.seen)
    values = scorer.score(layer.states[scorer], stored).float()
    scores = _guarded(layer, values, stored.valid, stored.positions)
    action, full = cache.parts.action, store.lengths > _limits(layer)
    counts = torch.where(full, (_targets(layer) - action.reserve).clamp_min(0), store.lengths)
    folded = layer.fold(action, layer.select(scorer, scores, counts.view(store.rows, -1)), stored, values)
    layer.store = layer.packed(folded.kept, folded, values if cache.remembers_scores else None, action)
    if scorer.accumulates:
        layer.states[scorer] = layer.store.bookkeeping().scores


def _guarded(layer: HoldingLayer, values: Tensor, valid: Tensor, positions: Tensor) -> TokenScores:
    """Scores with the ends protected that the scorer asks for, given what a row's first head may hold."""
    rows = values.shape[0]
    pads = layer.cache.pads(rows).to(values.device)
    per_row = _limits(layer).view(rows, -1)[:, 0].tolist()
    first, recent = torch.tensor([layer.cache.scorers[0].protects(limit) for limit in per_row]).unbind(-1)
    return TokenScores(values, valid, guard_ends(valid, positions, pads, first, recent))


def _worst(scores: TokenScores) -> Tensor:
    """(B, H) slot of the token to drop: the lowest score among the least protected."""
    guard = scores.guard.masked_fill(~scores.valid, torch.iinfo(torch.int64).max)
    weakest = (guard == guard.amin(-1, keepdim=True)) & scores.valid
    return scores.values.masked_fill(~weakest, torch.inf).argmin(-1)
