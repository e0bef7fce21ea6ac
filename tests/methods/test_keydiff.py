"""KeyDiff: minus the cosine to the mean of the unit keys."""

import math

import pytest
import torch
from oracles import EPS, build, random_case

from sparing.errors import InvalidInputError
from sparing.methods.kv.keydiff import KeyDiff, KeyDifference


def oracle(keys: list[list[float]], valid: list[bool]) -> list[float]:
    def length(x):
        return math.sqrt(sum(a * a for a in x))

    unit = [[a / length(k) for a in k] for k, there in zip(keys, valid, strict=True) if there]
    anchor = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    return [-sum(a * b for a, b in zip(k, anchor, strict=True)) / (length(k) * length(anchor)) for k in keys]


def test_equals_the_equation():
    case = random_case(seed=8)
    scores = KeyDifference().score(None, case.stored)
    for b in range(3):
        for h in range(2):
            expected = oracle(case.stored.keys[b, h].double().tolist(), case.stored.valid[b, h].tolist())
            anchor = torch.nn.functional.normalize(case.stored.keys[b, h], dim=-1)[case.stored.valid[b, h]].mean(0)
            error = 4 * EPS * (8 + 13) / float(anchor.norm())  # a short mean makes its direction uncertain
            for j in range(int(case.stored.pads[b]), 13):
                assert float(scores[b, h, j]) == pytest.approx(expected[j], abs=error)


def test_hand_numbers():
    """Three keys along x and one along y: anchor (3, 1)/4, cosines 3/√10 and 1/√10; lengths do not matter."""
    keys = torch.tensor([[[[1.0, 0.0], [5.0, 0.0], [0.0, 9.0], [2.0, 0.0]]]])
    scores = KeyDifference().score(None, build(keys, keys).stored)[0, 0]
    near, far = -3 / 10**0.5, -1 / 10**0.5
    torch.testing.assert_close(scores, torch.tensor([near, near, far, near]), atol=1e-6, rtol=0)


def test_outliers_stay_before_near_duplicates():
    generator = torch.Generator().manual_seed(9)
    keys = torch.zeros(1, 1, 23, 8)
    keys[..., 0] = 1.0
    keys += 0.01 * torch.randn(keys.shape, generator=generator)
    for outlier, axis in ((4, 3), (11, 5), (17, 6)):
        keys[0, 0, outlier] = torch.eye(8)[axis]
    scores = KeyDifference().score(None, build(keys, keys).stored)[0, 0]
    assert sorted(scores.topk(3).indices.tolist()) == [4, 11, 17]


def test_the_anchor_is_the_mean_of_unit_keys_not_of_keys():
    """One key 100 times longer along y would turn the plain mean; the unit mean stays with the four along x."""
    keys = torch.tensor([[[[1.0, 0.0]] * 4 + [[0.0, 100.0]]]])
    scores = KeyDifference().score(None, build(keys, keys).stored)[0, 0]
    assert int(scores.argmax()) == 4


def test_moving_all_keys_changes_the_order():
    """Unlike attention, key geometry is not blind to a constant added to every key."""
    case = random_case(seed=10)
    moved = build(case.queries.states, case.stored.keys + 3.0)
    assert not torch.allclose(KeyDifference().score(None, case.stored), KeyDifference().score(None, moved.stored))


def test_defaults_and_refusal():
    assert KeyDiff().parts().scorer.protects(100) == (0, 16)
    assert not KeyDiff().parts().scorer.comparable_across_heads
    with pytest.raises(InvalidInputError, match="recent: got -1"):
        KeyDiff(recent=-1)
