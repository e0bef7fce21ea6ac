"""Allocators: exact totals for every row, whatever the layers, heads, lengths and protection."""

import random

import pytest
import torch

from sparing.core.allocate import AdaptiveHeads, GlobalTopK, Proportional, Pyramid, Uniform
from sparing.core.allocate_heads import FullHeads, FullHeadsByLayer, WeightedHeads, WeightedLayers
from sparing.core.token_scores import TokenScores, select
from sparing.errors import InvalidInputError


def layer(lengths: list[list[int]], seed: int = 0, guarded: int = 0) -> TokenScores:
    """lengths[row][head]; random scores; the first `guarded` tokens of every head are protected."""
    counts = torch.tensor(lengths)
    width = int(counts.max()) + 1  # one slot that nobody uses
    valid = torch.arange(width) < counts[..., None]
    values = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed))
    guard = (torch.arange(width) < guarded).long().expand(valid.shape)
    return TokenScores(values.masked_fill(~valid, float("nan")), valid, guard.masked_fill(~valid, 0))


HEADS = [4, 1, 2]  # layers may differ in KV heads
IMPORTANCES = ((0.1, 0.9, -1.0, 0.0), (0.5,), (0.9, 0.2))
ALLOCATORS = {
    "uniform": Uniform(),
    "pyramid": Pyramid(20, 3),
    "per_layer": Proportional((3.0, 1.0, 0.0)),
    "per_head": Proportional(tuple(float(i) for i in range(7)), floor=0.2, cap=2.0),
    "adaptive": AdaptiveHeads(0.2),
    "adaptive_pyramid": AdaptiveHeads(0.2, Pyramid(5, 2)),
    "competition": AdaptiveHeads(0.0),
    "global": GlobalTopK(),
    "global_floor": GlobalTopK(0.3),
    "full_heads": FullHeads(IMPORTANCES, 3),
    "two_full_heads": FullHeads(IMPORTANCES, 0, 2),
    "full_by_layer": FullHeadsByLayer(0.75, 0.25),
    "weighted_heads": WeightedHeads(IMPORTANCES, 2, 0.1),
    "weighted_layers": WeightedLayers((0.1, 2.0, 0.0), 3, 2.0),
}


@pytest.fixture(params=ALLOCATORS, name="allocator")
def each_allocator(request):
    return ALLOCATORS[request.param]


@pytest.mark.parametrize("seed", range(8))
def test_totals_are_exact_and_no_head_keeps_more_than_it_has(allocator, seed):
    """Two rows of different lengths, some heads shorter than the budget, protection up to all of it."""
    rng = random.Random(seed)
    rows = [rng.randint(5, 30) for _ in range(2)]
    lengths = [[[rng.choice([n, n, rng.randint(1, n)]) for _ in range(h)] for n in rows] for h in HEADS]
    scores = [layer(per_row, seed, guarded=rng.choice([0, 2, 40])) for per_row in lengths]
    tokens = [rng.randint(1, n) for n in rows]
    counts = allocator.allocate(scores, tokens)
    for row, average in enumerate(tokens):
        exist = sum(sum(per_layer[row]) for per_layer in lengths)
        assert sum(int(c[row].sum()) for c in counts) == min(average * sum(HEADS), exist)
    for c, per_layer in zip(counts, lengths, strict=True):
        assert c.dtype == torch.int64
        assert bool(((c >= 0) & (c <= torch.tensor(per_layer))).all())


def test_a_row_gets_what_it_gets_alone(allocator):
    together = allocator.allocate([layer([[20] * h, [9] * h], 1) for h in HEADS], [8, 4])
    whole = [layer([[20] * h, [9] * h], 1) for h in HEADS]
    for row, tokens in enumerate([8, 4]):
        part = slice(row, row + 1)
        alone = allocator.allocate([TokenScores(s.values[part], s.valid[part], s.guard[part]) for s in whole], [tokens])
        assert [c[row].tolist() for c in together] == [c[0].tolist() for c in alone]


def test_keeping_everything_keeps_everything(allocator):
    counts = allocator.allocate([layer([[12] * h]) for h in HEADS], [12])
    assert [c.tolist() for c in counts] == [[[12] * h] for h in HEADS]


def test_nothing_seen_keeps_nothing(allocator):
    counts = allocator.allocate([layer([[0] * h, [3] * h]) for h in HEADS], [0, 2])
    assert all(int(c[0].sum()) == 0 for c in counts)


def test_uniform_hands_on_what_short_heads_cannot_hold():
    counts = Uniform().allocate([layer([[2, 20, 20]]), layer([[20]])], [6])
    assert [c.tolist() for c in counts] == [[[2, 8, 8]], [[6]]]
    counts = Uniform().allocate([layer([[2, 2]]), layer([[20, 20]])], [6])
    assert [c.tolist() for c in counts] == [[[2, 2]], [[10, 10]]]


def test_proportional_by_hand():
    """24 tokens 1 : 2 : 3 are 4, 8, 12; a floor of 0.75 x 8 lifts the first, a cap of 1.25 x 8 cuts the last."""
    scores = [layer([[50, 50, 50]])]
    weights = (1.0, 2.0, 3.0)
    assert Proportional(weights, 0.0, 3.0).allocate(scores, [8])[0].tolist() == [[4, 8, 12]]
    assert Proportional(weights, 0.75, 3.0).allocate(scores, [8])[0].tolist() == [[6, 7, 11]]
    assert Proportional(weights, 0.0, 1.25).allocate(scores, [8])[0].tolist() == [[5, 9, 10]]
    assert Proportional(weights, 1.0, 3.0).allocate(scores, [8])[0].tolist() == [[8, 8, 8]]
    assert Proportional(weights, 0.0, float("inf")).allocate(scores, [8])[0].tolist() == [[4, 8, 12]]


def test_proportional_gives_back_what_the_cap_would_waste():
    """One head of 2 tokens: two heads at the cap of 10 cannot hold the other 28."""
    counts = Proportional((1.0, 1.0, 1.0), 0.0, 1.0).allocate([layer([[2, 50, 50]])], [10])[0]
    assert counts.tolist() == [[2, 14, 14]]


def test_global_competition_crosses_layers():
    high, low = layer([[10]]), layer([[10]])
    scores = [TokenScores(high.values + 5, high.valid, high.guard), low]
    assert [int(c) for c in GlobalTopK().allocate(scores, [5])] == [10, 0]
    assert [int(c) for c in GlobalTopK(0.4).allocate(scores, [5])] == [8, 2]
    assert [int(c) for c in GlobalTopK(1.0).allocate(scores, [5])] == [5, 5]


def test_global_takes_the_best_of_all():
    scores = [layer([[9] * h], seed=h) for h in HEADS]
    counts = GlobalTopK().allocate(scores, [3])
    kept = torch.cat(
        [s.values[0, h, i] for s, c in zip(scores, counts, strict=True) for h, i in enumerate(select(s, c)[0])]
    )
    everything = torch.cat([s.values[s.valid] for s in scores])
    assert sorted(kept.tolist()) == sorted(everything.topk(21).values.tolist())


def test_equal_scores_go_to_the_lower_head():
    scores = layer([[4, 4]])
    even = TokenScores(torch.zeros_like(scores.values), scores.valid, scores.guard)
    assert AdaptiveHeads(0.0).allocate([even], [2])[0].tolist() == [[4, 0]]


def test_raising_a_score_never_loses_a_token():
    """Whatever the allocator: what was kept stays kept when its score rises."""
    for seed, allocator in enumerate(ALLOCATORS.values()):
        scores = [layer([[11] * h], seed=seed + h) for h in HEADS]
        kept = [select(s, c)[0] for s, c in zip(scores, allocator.allocate(scores, [4]), strict=True)]
        for number, heads in enumerate(kept):
            for head, tokens in enumerate(heads):
                if len(tokens):
                    raised = [TokenScores(s.values.clone(), s.valid, s.guard) for s in scores]
                    raised[number].values[0, head, tokens[0]] += 0.3
                    again = select(raised[number], allocator.allocate(raised, [4])[number])[0]
                    assert int(tokens[0]) in again[head].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Proportional((1.0, -1.0)), "Proportional.weights"),
        (lambda: Proportional((1.0, float("nan"))), "Proportional.weights"),
        (lambda: Proportional(()), "Proportional.weights"),
        (lambda: Proportional((1.0,), floor=1.5), "Proportional.floor"),
        (lambda: Proportional((1.0,), cap=0.9), "Proportional.cap"),
        (lambda: Pyramid(window=-1), "Pyramid.window"),
        (lambda: GlobalTopK(2.0), "GlobalTopK.floor"),
        (
            lambda: Proportional((1.0, 1.0)).allocate([layer([[5] * 4])], [2]),
            "2 weights.*1 .one per layer. or 4 .one per",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()
