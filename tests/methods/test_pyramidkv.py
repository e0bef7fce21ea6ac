"""PyramidKV: SnapKV's score, and budgets on a falling line that sum exactly."""

import math
import random

import pytest
import torch

from sparing.core.allocate import Pyramid
from sparing.core.token_scores import TokenScores
from sparing.errors import InvalidInputError
from sparing.methods.kv.pyramidkv import PyramidKV
from sparing.methods.kv.snapkv import SnapKV


def layers_of(lengths: list[list[int]]) -> list[TokenScores]:
    """One row; lengths[layer][head] valid tokens."""
    result = []
    for heads in lengths:
        valid = torch.arange(max(heads)) < torch.tensor(heads)[:, None]
        result.append(
            TokenScores(torch.zeros(valid.shape)[None], valid[None], torch.zeros(valid.shape, dtype=torch.int64)[None])
        )
    return result


def budgets(allocator, tokens: int, lengths: list[list[int]]) -> list[list[int]]:
    return [counts[0].tolist() for counts in allocator.allocate(layers_of(lengths), [tokens])]


def line(tokens: int, window: int, beta: float, layers: int, present: int) -> list[float]:
    """The paper's rule, layer by layer."""
    x = tokens - window
    least = x / beta
    most = 2 * x - least
    if most > present - window:
        most = present - window
        least = 2 * x - most
    return [window + most - layer * (most - least) / max(layers - 1, 1) for layer in range(layers)]


def test_hand_numbers():
    """C = 60, W = 10, beta = 5: min = 10, max = 90, step 20."""
    assert budgets(Pyramid(5, 10), 60, [[200, 200]] * 5) == [[100, 100], [80, 80], [60, 60], [40, 40], [20, 20]]


def test_a_prompt_shorter_than_the_top_flattens_the_line():
    """n = 80: max = 70, min = 30."""
    assert budgets(Pyramid(5, 10), 60, [[80]] * 5) == [[80], [70], [60], [50], [40]]


def test_the_published_drift_is_gone():
    """C = 128, n = 8192, L = 32: flooring min and step gives 133.5 on average; here exactly 128."""
    counts = budgets(Pyramid(20, 8), 128, [[8192]] * 32)
    assert sum(c for layer in counts for c in layer) == 32 * 128


@pytest.mark.parametrize("seed", range(40))
def test_exact_falling_and_bounded(seed):
    rng = random.Random(seed)
    layers, heads, present = rng.randint(1, 12), rng.randint(1, 4), rng.randint(20, 300)
    window, beta = rng.randint(0, 16), rng.choice([1, 1.5, 3, 20, 1000])
    tokens = rng.randint(window, present)
    counts = budgets(Pyramid(beta, window), tokens, [[present] * heads] * layers)
    totals = [sum(layer) for layer in counts]
    assert sum(totals) == layers * heads * tokens
    assert totals == sorted(totals, reverse=True)
    assert all(window <= c <= present for layer in counts for c in layer)
    assert all(max(layer) - min(layer) <= 1 for layer in counts)
    if layers > 1:
        for total, ideal in zip(totals, line(tokens, window, beta, layers, present), strict=True):
            assert abs(total - heads * ideal) < 1 + 1e-6


def test_beta_one_is_uniform():
    assert budgets(Pyramid(1, 8), 33, [[100, 100]] * 7) == [[33, 33]] * 7


def test_one_layer_gets_it_all():
    assert budgets(Pyramid(20, 8), 33, [[100, 100]]) == [[33, 33]]


def test_layers_with_different_heads_sum_exactly():
    counts = budgets(Pyramid(20, 2), 10, [[50] * 4, [50]])
    assert sum(c for layer in counts for c in layer) == 10 * 5
    assert min(counts[0]) > counts[1][0]


def test_a_short_layer_hands_its_tokens_on():
    counts = budgets(Pyramid(20, 2), 20, [[5, 5], [60, 60], [60, 60]])
    assert counts[0] == [5, 5]
    assert sum(c for layer in counts for c in layer) == 20 * 6


def test_a_budget_inside_the_window_is_uniform():
    assert budgets(Pyramid(20, 32), 7, [[100]] * 4) == [[7]] * 4


def test_the_score_is_snapkvs():
    assert PyramidKV().parts().scorer == SnapKV().parts().scorer
    assert PyramidKV().parts().allocator == Pyramid(20.0, 32)


@pytest.mark.parametrize("beta", [0.5, 0, -1, math.nan])
def test_refuses(beta):
    with pytest.raises(InvalidInputError, match="beta"):
        PyramidKV(beta=beta)
