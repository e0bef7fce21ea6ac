"""Allocators of head roles: answers worked out by hand. (That totals are exact is in test_allocate.py.)"""

import math
import random

import pytest
import torch

from sparing.core.allocate_heads import FullHeads, FullHeadsByLayer, WeightedHeads, WeightedLayers
from sparing.core.token_scores import TokenScores
from sparing.errors import InvalidInputError, ScoresMismatchError

INF = math.inf


def layer(lengths, guarded=0, number=None, heads=None) -> TokenScores:
    """One row; so many tokens per head, the first `guarded` of each protected."""
    counts = torch.tensor([lengths])
    valid = torch.arange(max(lengths)) < counts[..., None]
    guard = ((torch.arange(max(lengths)) < guarded) & valid).long()
    ranks = None if heads is None else torch.tensor([heads])
    return TokenScores(torch.zeros(valid.shape), valid, guard, number, ranks)


def counts(allocator, layers, tokens):
    return [each[0].tolist() for each in allocator.allocate(layers, [tokens])]


TWO = [layer([10, 10]), layer([10, 10])]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (10, [[10, 10], [10, 10]]),
        (9, [[6, 10], [10, 10]]),  # 36 = 3 · 10 + 6
        (5, [[4, 10], [3, 3]]),  # 20 = 10 + 4 + 3 + 3: two full ones leave 0 < 2 + 2
        (3, [[3, 3], [3, 3]]),  # 12 = 10 + 2: one full leaves 2 < 6
        (1, [[1, 1], [1, 1]]),
    ],
)
def test_full_heads_by_hand(tokens, expected):
    """Order (0, 1), (1, 1), (1, 0), (0, 0); the others get at least 2 each."""
    found = counts(FullHeads(((0.1, 0.9), (0.2, 0.5)), least=2), TWO, tokens)
    assert found == expected


def test_as_many_heads_are_full_as_the_budget_allows_and_never_another_one():
    """Any number of layers, heads and tokens: the full ones are the first in the order, and one more does not fit."""
    rng = random.Random(0)
    for _ in range(200):
        heads = [rng.randint(2, 5) for _ in range(rng.randint(1, 4))]
        n, least = rng.randint(2, 40), rng.randint(0, 8)
        table = tuple(tuple(rng.random() for _ in range(h)) for h in heads)
        tokens = rng.randint(1, n - 1)
        by_layer = counts(FullHeads(table, least), [layer([n] * h) for h in heads], tokens)
        found, flat = ([number for row in rows for number in row] for rows in (by_layer, table))
        order = sorted(range(len(flat)), key=lambda unit: -flat[unit])
        fits = [k for k in range(len(flat) + 1) if k * n + (len(flat) - k) * min(least, n) <= tokens * len(flat)]
        full = order[: max(fits, default=0)]
        assert all(found[unit] == n for unit in full)
        rest = [found[unit] for unit in range(len(flat)) if unit not in full]
        assert max(rest) - min(rest) <= 1
        assert sum(found) == tokens * len(flat)


def test_no_more_heads_are_full_than_asked_for():
    table = ((0.1, 0.9), (0.2, 0.5))
    assert counts(FullHeads(table, 0, most=1), TWO, 7) == [[6, 10], [6, 6]]
    assert counts(FullHeads(table, 0, most=0), TWO, 7) == [[7, 7], [7, 7]]


def test_ties_go_to_the_lower_index_and_what_was_not_measured_comes_last():
    assert counts(FullHeads(((0.5, 0.5), (0.5, -INF)), 0), TWO, 5) == [[10, 10], [0, 0]]
    assert counts(FullHeads(((-INF, 0.0), (math.nan, -1.0)), 0), TWO, 5) == [[0, 10], [0, 10]]


def test_importances_are_found_by_the_layer_of_the_model():
    """A model of three attention layers, the first of which slides and is not compressed."""
    table = ((9.0, 9.0), (0.0, 1.0), (0.0, 0.0))
    layers = [layer([10, 10], number=1), layer([10, 10], number=2)]
    assert counts(FullHeads(table, 0), layers, 3) == [[1, 10], [1, 0]]


def test_a_layer_that_evicts_whole_tokens_matters_as_its_best_head():
    assert counts(FullHeads(((0.1, 0.2), (0.0, 0.9)), 0), [layer([10]), layer([10])], 5) == [[0], [10]]


def test_importances_of_another_model_are_refused():
    with pytest.raises(ScoresMismatchError, match="1 layers were given for a model with a layer 1"):
        counts(FullHeads(((0.1, 0.9),)), TWO, 5)
    with pytest.raises(ScoresMismatchError, match="3 KV heads were given for a layer of 2"):
        counts(FullHeads(((0.1, 0.9, 0.3),) * 2), TWO, 5)


def test_heads_by_layer_fall_linearly_and_follow_the_prompts_order():
    """8 heads, 0.5 → 0.125 over 4 layers: 4, 3, 2, 1 full heads of 16 tokens; 8 · 10 = 80 tokens per layer."""
    ranks = [0.0, 3.0, 2.0, 0.0, 5.0, 1.0, 0.0, 0.0]
    layers = [layer([16] * 8, guarded=2, heads=ranks) for _ in range(4)]
    found = counts(FullHeadsByLayer(0.5, 0.125), layers, 10)
    assert [[h for h in range(8) if row[h] == 16] for row in found] == [[1, 2, 4, 5], [1, 2, 4], [1, 4], [4]]
    assert found[0] == [4, 16, 16, 4, 16, 16, 4, 4]
    assert [sum(row) for row in found] == [80] * 4


def test_fewer_heads_are_full_where_the_others_would_lose_what_is_protected():
    """4 heads of 16, 20 tokens: one full leaves 4 for three; that is enough for 1 protected token each, not for 2."""
    for guarded, full in ((1, 1), (2, 0)):
        found = counts(FullHeadsByLayer(0.5, 0.5), [layer([16] * 4, guarded, heads=[0.0, 0.0, 1.0, 0.0])], 5)[0]
        assert found.count(16) == full
        assert sum(found) == 20


def test_weighted_heads_by_hand():
    """4 heads · 11 tokens, 1 each first; of the other 40, 20 evenly and 20 as 1 : 3 : 0 : 0. -2 counts as 0."""
    wide = [layer([60, 60]), layer([60, 60])]
    allocator = WeightedHeads(((1.0, 3.0), (0.0, -2.0)), base=1, even=0.5)
    assert counts(allocator, wide, 11) == [[1 + 5 + 5, 1 + 5 + 15], [1 + 5, 1 + 5]]
    assert counts(WeightedHeads(((0.0, 0.0), (0.0, 0.0)), base=1), wide, 11) == [[11, 11], [11, 11]]


def test_what_a_short_head_cannot_use_goes_to_the_others_in_proportion():
    """44 tokens; head (0, 1) wants 30 and has 20: the 10 go on as 1 : 1 : 2."""
    layers = [layer([60, 20]), layer([60, 60])]
    found = counts(WeightedHeads(((1.0, 12.0), (1.0, 2.0)), base=0), layers, 16)
    assert found == [[11, 20], [11, 22]]


def test_weighted_layers_by_hand():
    """3 layers of 2 heads, 10 tokens: base 4, the other 18 per head row as 0 : 1 : 2, capped at 1.5 · 10."""
    layers = [layer([40, 40]) for _ in range(3)]
    assert counts(WeightedLayers((0.0, 1.0, 2.0), 4, 3.0), layers, 10) == [[4, 4], [10, 10], [16, 16]]
    assert counts(WeightedLayers((0.0, 1.0, 2.0), 4, 1.4), layers, 10) == [[4, 4], [12, 12], [14, 14]]
    assert counts(WeightedLayers((0.0, 0.0, 0.0), 4, 3.0), layers, 10) == [[10, 10]] * 3


def test_every_head_of_a_layer_keeps_the_same_number():
    rng = random.Random(1)
    for _ in range(200):
        count, heads, n = rng.randint(1, 5), rng.randint(1, 4), rng.randint(2, 90)
        tokens, base, cap = rng.randint(1, n), rng.randint(0, 20), rng.choice([1.0, 1.5, 3.0])
        errors = tuple(rng.random() ** 3 for _ in range(count))
        found = counts(WeightedLayers(errors, base, cap), [layer([n] * heads) for _ in range(count)], tokens)
        assert all(len(set(row)) == 1 for row in found)
        assert sum(map(sum, found)) == tokens * heads * count
        assert all(min(base, tokens) <= row[0] <= max(cap * tokens, 0) + 1e-9 for row in found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullHeads((), -1), "FullHeads.least"),
        (lambda: FullHeads((), 0, -1), "FullHeads.most"),
        (lambda: FullHeadsByLayer(1.5), "FullHeadsByLayer.first"),
        (lambda: FullHeadsByLayer(0.5, -0.1), "FullHeadsByLayer.last"),
        (lambda: WeightedHeads((), -1), "WeightedHeads.base"),
        (lambda: WeightedHeads((), 0, 2.0), "WeightedHeads.even"),
        (lambda: WeightedLayers((), -1), "WeightedLayers.base"),
        (lambda: WeightedLayers((), 0, 0.5), "WeightedLayers.cap"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()
