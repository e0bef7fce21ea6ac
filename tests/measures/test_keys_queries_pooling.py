"""Key geometry, query moments, and reduction over groups and neighbours."""

import pytest
import torch
from oracles import EPS

from sparing.core.scorer import standardised
from sparing.measures.keys import centred, leverage, mean_direction
from sparing.measures.pooling import over_group, pool_tokens
from sparing.measures.queries import add_moments


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- keys


def test_mean_direction_by_hand():
    """Unit keys (1, 0), (0, 1) and, not valid, anything: the mean is (1/2, 1/2)."""
    keys = torch.tensor([[[[5.0, 0.0], [0.0, 0.1], [float("nan"), 1.0]]]])
    valid = torch.tensor([[[True, True, False]]])
    assert mean_direction(keys, valid).tolist() == [[[0.5, 0.5]]]


def test_centred_sums_to_zero_and_leaves_pads_at_zero():
    x, valid = random(2, 2, 9, 4) + 5, torch.ones(2, 2, 9, dtype=torch.bool)
    valid[0, :, :3] = False
    result = centred(x, valid)
    torch.testing.assert_close(result.sum(2), torch.zeros(2, 2, 4), atol=9 * 10 * EPS * 4, rtol=0)
    assert not result[0, :, :3].any()


def test_nothing_valid_gives_zeros():
    x, valid = random(1, 1, 3, 2), torch.zeros(1, 1, 3, dtype=torch.bool)
    assert not mean_direction(x, valid).any()
    assert not centred(x, valid).any()
    assert not leverage(centred(x, valid), 0.0).any()


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 6, 6), (4, 6, 4), (6, 6, 6)])
def test_leverage_sums_to_the_rank(rows, columns, rank):
    scores = leverage(random(1, 1, rows, columns), 0.0)
    assert float(scores.sum()) == pytest.approx(rank, abs=1e-5)
    assert float(scores.max()) <= 1 + 1e-6


def test_leverage_is_the_diagonal_of_the_projection():
    x = random(1, 1, 30, 6, seed=1)
    wide = x[0, 0].double()
    expected = (wide @ torch.linalg.pinv(wide)).diagonal()
    torch.testing.assert_close(leverage(x, 0.0)[0, 0].double(), expected, atol=1e-6, rtol=0)


# -- queries


def cov(queries):
    return torch.cov(queries.double().T, correction=0)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [13, 27], [3, 1, 36]], ids=["once", "ones", "two", "three"])
@pytest.mark.parametrize("bias", [0.0, 1000.0])
def test_moments_in_chunks_equal_the_dense_ones(sizes, bias):
    queries = random(2, 3, 40, 4, seed=2) + bias
    counts = torch.arange(40) >= torch.tensor([[0], [11]])
    state, start = None, 0
    for size in sizes:
        part = slice(start, start + size)
        state, start = add_moments(state, queries[:, :, part], counts[:, part]), start + size
    assert state.count.flatten().tolist() == [40, 29]
    for row, first in enumerate([0, 11]):
        for head in range(3):
            rows = queries[row, head, first:]
            torch.testing.assert_close(state.mean[row, head].double(), rows.double().mean(0), atol=1e-6, rtol=4e-6)
            # rounding of 1000 to float32 is 3e-5; as an error of each offset it enters linearly
            torch.testing.assert_close(state.covariance[row, head].double(), cov(rows), atol=1e-5 + bias * 1e-6, rtol=0)


def test_moments_of_nothing():
    state = add_moments(None, random(1, 1, 3, 2), torch.zeros(1, 3, dtype=torch.bool))
    assert not state.mean.any()
    assert not state.covariance.any()
    rows = random(1, 1, 5, 2, seed=3)
    state = add_moments(state, rows, torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(state.covariance[0, 0].double(), cov(rows[0, 0]), atol=1e-6, rtol=0)


# -- pooling


def test_over_group_by_hand():
    """Four query heads, two KV heads: heads 0 and 1 belong to KV head 0."""
    x = torch.tensor([[[1.0], [3.0], [10.0], [20.0]]])
    assert over_group(x, 2).tolist() == [[[2.0], [15.0]]]
    assert over_group(x, 2, "max").tolist() == [[[3.0], [20.0]]]
    assert over_group(x, 2, "sum").tolist() == [[[4.0], [30.0]]]


def test_average_at_borders_and_pads_by_hand():
    scores = torch.tensor([[[100.0, 6.0, 3.0, 0.0, 9.0]]])
    valid = torch.tensor([[[False, True, True, True, True]]])
    expected = torch.tensor([[[0.0, 4.5, 3.0, 4.0, 4.5]]])
    torch.testing.assert_close(pool_tokens(scores, valid, 3, "avg"), expected)


def test_maximum_at_borders_and_pads_by_hand():
    scores = torch.tensor([[[100.0, -6.0, -3.0, -9.0, -8.0]]])
    valid = torch.tensor([[[False, True, True, True, True]]])
    assert pool_tokens(scores, valid, 3, "max").tolist() == [[[0.0, -3.0, -3.0, -3.0, -8.0]]]


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 31])
@pytest.mark.parametrize("how", ["avg", "max"])
def test_a_constant_stays_constant(kernel, how):
    scores = torch.full((1, 1, 12), 0.3)
    torch.testing.assert_close(pool_tokens(scores, torch.ones(1, 1, 12, dtype=torch.bool), kernel, how), scores)


# -- standardising


def test_standardised_by_hand():
    """1 and 3 of three: mean 2, deviation 1."""
    values, valid = torch.tensor([[[1.0, 3.0, 99.0]]]), torch.tensor([[[True, True, False]]])
    assert standardised(values, valid).tolist() == [[[-1.0, 1.0, 0.0]]]


@pytest.mark.parametrize("count", [3, 7, 11, 1000])
@pytest.mark.parametrize("value", [0.1, 123.456, 0.0])
def test_a_head_that_differs_by_rounding_only_is_zero(count, value):
    """Its mean is off by a rounding error; dividing that by itself would lift or sink the whole head by 1."""
    valid = torch.ones(1, 1, count, dtype=torch.bool)
    assert not standardised(torch.full((1, 1, count), value), valid).any()
