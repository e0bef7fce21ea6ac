"""Random eviction: the same numbers for the same token, however it comes."""

import pytest
import torch
from oracles import build, random_case

from sparing.methods.kv.random import Random, RandomScore


@pytest.mark.parametrize("row", range(3))
def test_a_padded_row_draws_what_it_draws_alone(row):
    case = random_case()
    alone = RandomScore(seed=3).score(None, case.alone(row).stored)[0]
    padded = RandomScore(seed=3).score(None, case.stored)[row, :, int(case.stored.pads[row]) :]
    assert torch.equal(padded, alone)


@pytest.mark.parametrize(("short", "long"), [(1, 2), (3, 17), (15, 40), (16, 1000)])
def test_a_longer_prompt_begins_with_the_same_numbers(short, long):
    a, b = (
        RandomScore().score(None, build(torch.zeros(1, 3, n, 2), torch.zeros(1, 3, n, 2)).stored) for n in (short, long)
    )
    assert torch.equal(a, b[..., :short])


def test_seeds_layers_and_heads_differ():
    import dataclasses

    stored = random_case().stored
    scores = [RandomScore(0).score(None, stored), RandomScore(1).score(None, stored)]
    scores.append(RandomScore(0).score(None, dataclasses.replace(stored, layer=1)))
    scores.append(scores[0].flip(1))
    for a in range(4):
        for b in range(a):
            assert not torch.equal(scores[a], scores[b])
    assert torch.equal(scores[0], RandomScore(0).score(None, stored))


def test_numbers_are_uniform():
    """10 000 numbers: the mean of U(0, 1) is 1/2 with standard error 0.0029."""
    x = RandomScore().score(None, build(torch.zeros(1, 1, 10_000, 2), torch.zeros(1, 1, 10_000, 2)).stored)
    assert 0 <= float(x.min()) <= float(x.max()) < 1
    assert float(x.mean()) == pytest.approx(0.5, abs=5 * 0.0029)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    RandomScore().score(None, random_case().stored)
    assert torch.equal(before, torch.get_rng_state())
    assert Random().parts().scorer.protects(10) == (0, 0)
