"""Knorm: minus the norm of the key."""

import math

import pytest
import torch
from oracles import EPS, PlainRotary, build, random_case

from sparing.errors import InvalidInputError
from sparing.methods.kv.knorm import KeyNorm, Knorm


def test_equals_the_equation():
    case = random_case(seed=5)
    scores = KeyNorm().score(None, case.stored)
    for (b, h, j), score in zip(torch.ones(3, 2, 13).nonzero().tolist(), scores.flatten().tolist(), strict=True):
        norm = math.sqrt(sum(x * x for x in case.stored.keys[b, h, j].double().tolist()))
        assert score == pytest.approx(-norm, rel=8 * EPS)  # D = 8 terms


def test_hand_numbers():
    case = build(torch.zeros(1, 1, 3, 2), torch.tensor([[[[3.0, 4.0], [0.0, 0.5], [1.0, 0.0]]]]))
    assert KeyNorm().score(None, case.stored).tolist() == [[[-5.0, -0.5, -1.0]]]


def test_ten_times_longer_is_the_first_to_go():
    case = random_case(seed=6)
    keys = torch.nn.functional.normalize(case.stored.keys, dim=-1)
    keys[0, 1, 4] *= 10
    scores = KeyNorm().score(None, build(case.queries.states, keys).stored)
    assert int(scores[0, 1].argmin()) == 4


def test_rotation_keeps_the_score():
    keys = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(7))
    rotated = PlainRotary(16).rotate(keys, torch.arange(40)[None])
    before, after = (KeyNorm().score(None, build(k, k).stored) for k in (keys, rotated))
    torch.testing.assert_close(before, after, atol=0, rtol=1e-6)


def test_defaults():
    scorer = Knorm().parts().scorer
    assert scorer.protects(100) == (0, 16)
    assert not scorer.comparable_across_heads


def test_refuses():
    with pytest.raises(InvalidInputError, match="recent: got -1"):
        Knorm(recent=-1)
