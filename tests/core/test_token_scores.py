"""Choosing by score: order, protection, pads, ties."""

import pytest
import torch

from sparing.core.token_scores import TokenScores, guard_ends, select


def one_head(values, valid=None, guard=None) -> TokenScores:
    values = torch.tensor([[values]], dtype=torch.float32)
    full = torch.ones_like(values, dtype=torch.bool)
    return TokenScores(
        values,
        full if valid is None else torch.tensor([[valid]]),
        torch.zeros(values.shape, dtype=torch.int64) if guard is None else torch.tensor([[guard]]),
    )


def test_best_first_ties_to_the_lower_index():
    assert one_head([1.0, 3.0, 3.0, 0.0, 1.0]).order.tolist() == [[[1, 2, 0, 4, 3]]]


def test_protected_first_the_larger_guard_before_the_smaller():
    order = one_head([9.0, 1.0, 2.0, 3.0], guard=[0, 1, 5, 0]).order
    assert order.tolist() == [[[2, 1, 0, 3]]]


def test_invalid_last_whatever_they_hold():
    order = one_head(
        [float("inf"), -float("inf"), 1.0, float("nan")], valid=[False, True, True, False], guard=[7, 0, 0, 7]
    )
    assert order.order[0, 0, :2].tolist() == [2, 1]


def test_select_sorts_and_follows_the_order():
    scores = one_head([1.0, 3.0, 2.0, 5.0])
    assert [select(scores, torch.tensor([[n]]))[0][0].tolist() for n in range(5)] == [
        [],
        [3],
        [1, 3],
        [1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_select_per_row_and_head():
    values = torch.rand(3, 2, 9, generator=torch.Generator().manual_seed(0))
    scores = TokenScores(values, torch.ones(3, 2, 9, dtype=torch.bool), torch.zeros(3, 2, 9, dtype=torch.int64))
    kept = select(scores, torch.tensor([[1, 2], [3, 4], [9, 0]]))
    for row in range(3):
        for head in range(2):
            best = sorted(range(9), key=lambda j: -float(values[row, head, j]))
            count = len(kept[row][head])
            assert kept[row][head].tolist() == sorted(best[:count])
    assert [[len(h) for h in row] for row in kept] == [[1, 2], [3, 4], [9, 0]]


def test_select_never_takes_a_pad():
    with pytest.raises(AssertionError, match="more tokens asked for than are valid"):
        select(one_head([1.0, 2.0], valid=[False, True]), torch.tensor([[2]]))


def guards(positions, valid, pads, first, recent):
    return guard_ends(torch.tensor([[valid]]), torch.tensor([[positions]]), torch.tensor([pads]), first, recent)[
        0, 0
    ].tolist()


def test_both_ends_by_hand():
    """Three pads, then six tokens; two first, two recent: 4 3 . . 1 2."""
    assert guards(list(range(9)), [False] * 3 + [True] * 6, 3, 2, 2) == [0, 0, 0, 4, 3, 0, 0, 1, 2]


def test_ends_that_meet_the_first_win():
    assert guards([0, 1, 2], [True] * 3, 0, 2, 3) == [5, 4, 3]


def test_positions_in_any_order():
    assert guards([5, 0, 9, 3], [True] * 4, 0, 1, 5) == [1, 6, 5, 0]


def test_no_protection():
    assert guards([0, 1, 2], [True] * 3, 0, 0, 0) == [0, 0, 0]


def test_a_first_token_that_is_gone_is_not_replaced():
    """Protection goes by position: after an eviction of 0 and 1, token 2 is no sink."""
    assert guards([2, 3, 8], [True] * 3, 0, 2, 1) == [0, 0, 1]


def test_nothing_valid():
    assert guards([0, 1], [False, False], 2, 4, 4) == [0, 0]
