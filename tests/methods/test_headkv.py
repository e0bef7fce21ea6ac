"""HeadKV's capacities against the authors' formula, and a budget that is spent to the last token."""

import pytest
import torch

import sparing
from methods.roles import kept, measured
from sparing.core.token_scores import TokenScores
from sparing.errors import InvalidInputError

UNEVEN = measured("retrieval", [[0.1, 0.3, 0.0, 0.0], [0.2, 0.2, 0.8, 0.4]])


def capacities(importance, tokens, window, beta):
    """p_h M + m0 + W per query head with M = C / β · heads, m0 = C - C / β, C = tokens - W; mean over pairs."""
    heads, total, rest = sum(map(len, importance)), sum(map(sum, importance)), tokens - window
    each = [[i / total * rest / beta * heads + rest - rest / beta + window for i in row] for row in importance]
    return [[(row[2 * h] + row[2 * h + 1]) / 2 for h in range(len(row) // 2)] for row in each]


def counts(method, tokens, present=4000):
    valid = torch.ones(1, 2, present, dtype=torch.bool)
    layers = [TokenScores(torch.zeros(valid.shape), valid, torch.zeros(valid.shape, dtype=torch.int64))] * 2
    return [layer[0].tolist() for layer in method.parts().allocator.allocate(layers, [tokens])]


@pytest.mark.parametrize("beta", [1.01, 1.2, 2.0])
@pytest.mark.parametrize("tokens", [9, 100, 777])
def test_capacities_are_the_authors_up_to_rounding(beta, tokens):
    found = counts(sparing.HeadKV(tokens, UNEVEN, beta=beta), tokens)
    wanted = capacities(UNEVEN.values.double().tolist(), tokens, 8, beta)
    assert sum(map(sum, found)) == 4 * tokens
    assert all(abs(found[layer][head] - wanted[layer][head]) < 1 for layer in (0, 1) for head in (0, 1))


def test_equal_importances_are_equal_budgets():
    assert counts(sparing.HeadKV(0.5, measured("retrieval", [[0.3] * 4] * 2)), 50) == [[50, 50], [50, 50]]


def test_one_head_with_all_the_mass_gets_what_there_is_and_the_rest_is_not_lost():
    """4 · 30 tokens, 8 each first; β = 1 gives the other 88 to head (1, 0), which has 40 in all. 56 go on evenly."""
    one = measured("retrieval", [[0.0] * 4, [0.5, 0.5, 0.0, 0.0]])
    found = counts(sparing.HeadKV(30, one, beta=1.0), 30, present=40)
    assert found[1][0] == 40
    assert sorted([*found[0], found[1][1]]) == [26, 27, 27]


def test_a_budget_below_the_window_is_spent_evenly():
    assert counts(sparing.HeadKV(5, UNEVEN), 5) == [[5, 5], [5, 5]]


def test_votes_are_snapkvs_of_a_short_window_with_max_pooling():
    scorer = sparing.HeadKV(0.5, UNEVEN).parts().scorer
    assert (scorer.window, scorer.kernel_size, scorer.pool) == (8, 7, "max")


def test_every_head_keeps_its_window():
    found = kept(sparing.HeadKV(0.3, UNEVEN))
    assert all(head[-8:] == list(range(56, 64)) for heads in found.values() for head in heads)
    assert sum(len(head) for heads in found.values() for head in heads) == 4 * 19
    assert len(found[1][1]) > len(found[1][0]) > len(found[0][1]) >= 8


@pytest.mark.parametrize("bad", [{"beta": 0.5}, {"beta": float("nan")}, {"window": 0}, {"kernel_size": 2}])
def test_refuses(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        sparing.HeadKV(0.5, UNEVEN, **bad)
