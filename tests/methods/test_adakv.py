"""AdaKV: heads compete for the layer's pool, with a floor."""

import math

import pytest
import torch
from oracles import random_case

from sparing.core.allocate import AdaptiveHeads, Pyramid
from sparing.core.scorer import standardised
from sparing.core.token_scores import TokenScores, guard_ends, select
from sparing.errors import InvalidInputError
from sparing.methods.kv.adakv import AdaKV
from sparing.methods.kv.knorm import KeyNorm


def layer(values: list[list[float]], guarded: set[int] = frozenset()) -> TokenScores:
    """One row; values[head][token]."""
    scores = torch.tensor(values)[None]
    guard = torch.zeros(scores.shape, dtype=torch.int64)
    guard[..., list(guarded)] = 1
    return TokenScores(scores, torch.ones_like(scores, dtype=torch.bool), guard)


def oracle(values: list[list[float]], tokens: int, floor: float, guarded: set[int] = frozenset()) -> list[set[int]]:
    """Protected tokens, then each head's free ones, then the best of all heads, one at a time."""
    kept = [set(guarded) for _ in values]
    free = math.floor(floor * (tokens - len(guarded)) + 1e-9)
    for head, row in enumerate(values):
        rest = sorted(set(range(len(row))) - kept[head], key=lambda j: -row[j])
        kept[head] |= set(rest[:free])
    while sum(map(len, kept)) < tokens * len(values):
        left = [(value, h, j) for h, row in enumerate(values) for j, value in enumerate(row) if j not in kept[h]]
        _, head, token = max(left)
        kept[head].add(token)
    return kept


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("guarded", [frozenset(), frozenset({17, 18, 19})], ids=["free", "window"])
def test_equals_the_loop(floor, guarded):
    values = torch.rand(4, 20, generator=torch.Generator().manual_seed(16)) ** torch.tensor([[1], [2], [4], [8]])
    scores = layer(values.tolist(), guarded)
    counts = AdaptiveHeads(floor).allocate([scores], [8])[0]
    assert int(counts.sum()) == 32
    kept = select(scores, counts)[0]
    assert [set(head.tolist()) for head in kept] == oracle(values.tolist(), 8, floor, guarded)


def test_a_diffuse_head_takes_all_but_the_floor_of_a_one_token_head():
    """Pool 10: at floor 0.2 the one-token head keeps 1, at 0.4 it keeps 2."""
    values = [[1.0] + [0.0] * 9, [0.1] * 10]
    assert AdaptiveHeads(0.2).allocate([layer(values)], [5])[0].tolist() == [[1, 9]]
    assert AdaptiveHeads(0.4).allocate([layer(values)], [5])[0].tolist() == [[2, 8]]


def test_floor_one_is_uniform_and_floor_zero_is_pure_competition():
    values = [[9.0, 8.0, 7.0, 6.0], [5.0, 4.0, 3.0, 2.0]]
    assert AdaptiveHeads(1.0).allocate([layer(values)], [2])[0].tolist() == [[2, 2]]
    assert AdaptiveHeads(0.0).allocate([layer(values)], [2])[0].tolist() == [[4, 0]]


def test_the_window_comes_on_top_of_the_floor():
    """12 per head, 4 of them protected: the floor is a quarter of the other 8, so the empty head keeps 4 + 2."""
    values = [[0.0] * 24, [1.0] * 24]
    counts = AdaptiveHeads(0.25).allocate([layer(values, {20, 21, 22, 23})], [12])[0]
    assert counts.tolist() == [[6, 18]]


def test_protection_above_the_budget_is_shared_evenly():
    counts = AdaptiveHeads(0.2).allocate([layer([[0.0] * 9, [1.0] * 9], set(range(6)))], [4])[0]
    assert counts.tolist() == [[4, 4]]


def test_rows_do_not_compete_and_pads_are_never_counted():
    case = random_case(seed=17)
    scorer = AdaKV().parts().scorer
    stored = case.stored
    guard = guard_ends(stored.valid, stored.positions, stored.pads, 0, 2)
    counts = AdaptiveHeads().allocate([TokenScores(case.score(scorer), stored.valid, guard)], [6, 5, 3])[0]
    assert counts.sum(-1).tolist() == [12, 10, 6]
    for row, budget in enumerate([6, 5, 3]):
        alone = case.alone(row).stored
        scores = TokenScores(
            case.alone(row).score(scorer), alone.valid, guard_ends(alone.valid, alone.positions, alone.pads, 0, 2)
        )
        assert AdaptiveHeads().allocate([scores], [budget])[0].tolist() == [counts[row].tolist()]


def test_a_score_in_other_units_competes_after_standardising():
    """Keys of one head ten times as long: raw norms would empty it, standardised ones change nothing."""
    keys = torch.rand(1, 2, 30, 4, generator=torch.Generator().manual_seed(18)) + 0.1
    scaled = keys.clone()
    scaled[:, 1] *= 10
    counts = []
    for k in (keys, scaled):
        values, valid = -k.norm(dim=-1), torch.ones(1, 2, 30, dtype=torch.bool)
        scores = TokenScores(standardised(values, valid), valid, torch.zeros(1, 2, 30, dtype=torch.int64))
        counts.append(AdaptiveHeads(0.0).allocate([scores], [10])[0].tolist())
    assert counts[0] == counts[1]
    assert not KeyNorm.comparable_across_heads


def test_on_top_of_a_pyramid_the_layers_keep_their_totals():
    scores = [layer([[1.0] * 40, [0.0] * 40]) for _ in range(3)]
    even = Pyramid(5, 0).allocate(scores, [10])
    adaptive = AdaptiveHeads(0.2, Pyramid(5, 0)).allocate(scores, [10])
    assert [int(c.sum()) for c in adaptive] == [int(c.sum()) for c in even]
    assert all(int(c[0, 0]) > int(c[0, 1]) for c in adaptive)


def test_defaults_and_refusal():
    parts = AdaKV().parts()
    assert (parts.scorer.window, parts.scorer.kernel_size, parts.scorer.pool) == (32, 7, "max")
    assert parts.allocator == AdaptiveHeads(0.2)
    for floor in (-0.1, 1.1, math.nan):
        with pytest.raises(InvalidInputError, match="floor"):
            AdaKV(floor=floor)
