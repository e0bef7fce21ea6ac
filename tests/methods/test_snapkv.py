"""SnapKV against its equation, and on patterns worked out by hand."""

import math

import pytest
import torch
from oracles import attention_error, build, dense_attention, random_case

from sparing.core.scorer import Softmax
from sparing.core.token_scores import TokenScores, guard_ends, select
from sparing.errors import InvalidInputError
from sparing.methods.kv.snapkv import SnapKV, WindowAttention


def oracle(case, window: int, kernel: int, pool: str) -> list:
    """s[b][h][j]: mean of the last rows' attention, mean over the group, pooled over the neighbours that exist."""
    attention = dense_attention(case.queries, case.stored)
    rows, heads = case.queries.states.shape[:2]
    kv_heads, tokens = case.stored.keys.shape[1:3]
    group, first = heads // kv_heads, max(tokens - window, 0)
    scores = [[[None] * tokens for _ in range(kv_heads)] for _ in range(rows)]
    for b in range(rows):
        last = [i for i in range(first, tokens) if i >= int(case.stored.pads[b])]
        for h in range(kv_heads):
            mass = [
                sum(attention[b][h * group + g][i][j] for g in range(group) for i in last) / (group * len(last))
                for j in range(tokens)
            ]
            voted = range(int(case.stored.pads[b]), first)
            for j in voted:
                near = [mass[m] for m in range(j - kernel // 2, j + kernel // 2 + 1) if m in voted]
                scores[b][h][j] = max(near) if pool == "max" else sum(near) / len(near)
    return scores


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("sizes", [[13], [6, 7], [1] * 13, [11, 2]], ids=str)
def test_equals_the_equation(pool, sizes):
    case = random_case()
    scores = case.score(WindowAttention(window=4, kernel_size=3, pool=pool), sizes)
    compared = 0
    for b, row in enumerate(oracle(case, 4, 3, pool)):
        for h, head in enumerate(row):
            for j, expected in enumerate(head):
                if expected is not None:
                    compared += 1
                    assert float(scores[b, h, j]) == pytest.approx(expected, abs=attention_error(case))
    assert compared == 2 * (9 + 6 + 2)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_constant_attention_gives_constant_scores_up_to_the_borders(kernel):
    """Equal keys: rows 4 and 5 of 6 pay 1/5 and 1/6 to each key, 11/60 on average, the first token included."""
    case = build(torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4))
    scores = case.score(WindowAttention(window=2, kernel_size=kernel))
    torch.testing.assert_close(scores[0, 0, :4], torch.full((4,), 11 / 60), atol=1e-7, rtol=0)


def planted():
    """Row 7 of 8 has logit ln 63 for key 3 and 0 for the others: masses 63/70 and 1/70 each."""
    keys = torch.zeros(1, 1, 8, 2)
    keys[0, 0, 3, 0] = math.log(63)
    return build(torch.tensor([1.0, 0.0]).expand(1, 1, 8, 2), keys, softmax=Softmax(1.0))


def test_planted_key_pulls_its_neighbours():
    scores = planted().score(WindowAttention(window=1, kernel_size=3))
    beside = 65 / 210  # (63 + 1 + 1) / 70 / 3
    expected = torch.tensor([3, 3, 0, 0, 0, 3, 3]) / 210
    expected[2:5] = beside
    torch.testing.assert_close(scores[0, 0, :7], expected, atol=1e-6, rtol=0)


def test_planted_key_is_always_selected_and_the_window_stays():
    case, scorer = planted(), WindowAttention(window=2, kernel_size=1)
    stored = case.stored
    guard = guard_ends(stored.valid, stored.positions, stored.pads, *scorer.protects(3))
    kept = select(TokenScores(case.score(scorer), stored.valid, guard), torch.tensor([[3]]))
    assert kept[0][0].tolist() == [3, 6, 7]


def test_the_window_takes_part_in_the_softmax_but_not_in_the_vote():
    """A window key that takes half of the mass halves the others, but does not smear over its neighbour."""
    keys = torch.zeros(1, 1, 6, 2)
    keys[0, 0, 5, 0] = math.log(5)
    case = build(torch.tensor([1.0, 0.0]).expand(1, 1, 6, 2), keys, softmax=Softmax(1.0))
    scores = case.score(WindowAttention(window=1, kernel_size=3))
    torch.testing.assert_close(scores[0, 0], torch.tensor([0.1] * 5 + [0.5]), atol=1e-6, rtol=0)


def test_defaults_are_the_authors():
    scorer = SnapKV().parts().scorer
    assert (scorer.window, scorer.kernel_size, scorer.pool) == (32, 5, "avg")
    assert scorer.protects(100) == (0, 32)


@pytest.mark.parametrize("bad", [{"window": 0}, {"kernel_size": 4}, {"kernel_size": 0}, {"pool": "median"}])
def test_refuses(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        WindowAttention(**bad)
