"""Leverage: how little the other keys explain a key."""

import pytest
import torch
from oracles import PlainRotary, build, random_case

from sparing.errors import InvalidInputError
from sparing.methods.kv.leverage import Leverage, LeverageScore


def oracle(keys: torch.Tensor, jitter: float) -> torch.Tensor:
    """(N, D) float64 keys before rotation → x_jᵀ (XᵀX + λ I)⁻¹ x_j, one row at a time."""
    x = keys - keys.mean(0)
    gram = sum(torch.outer(row, row) for row in x) + jitter * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.stack([row @ torch.linalg.solve(gram, row) for row in x])


@pytest.mark.parametrize("rotary", [None, PlainRotary(8)], ids=["unrotated", "rotary"])
def test_equals_the_equation(rotary):
    case = random_case(seed=11, tokens=20, rotary=rotary)
    stored = case.stored
    keys = stored.keys.double()
    if rotary is not None:
        turned = [
            [[rotary.matrix(int(p - stored.pads[b])).T @ k for p, k in enumerate(head)] for head in row]
            for b, row in enumerate(keys)
        ]
        keys = torch.stack([torch.stack([torch.stack(head) for head in row]) for row in turned])
    scores = LeverageScore(sketch=0).score(None, stored)
    for b, pad in enumerate([0, 3, 7]):
        for h in range(2):
            torch.testing.assert_close(scores[b, h, pad:].double(), oracle(keys[b, h, pad:], 0.01), atol=2e-6, rtol=0)


def test_exact_leverage_sums_to_the_rank():
    keys = torch.randn(1, 1, 300, 16, generator=torch.Generator().manual_seed(12))
    exact = LeverageScore(sketch=0, jitter=0.0)
    scores = exact.score(None, build(keys, keys).stored)
    assert float(scores.double().sum()) == pytest.approx(16.0, abs=1e-4)
    assert 0 <= float(scores.min()) <= float(scores.max()) <= 1 + 1e-6
    flat = keys * (torch.arange(16) < 5)  # only five directions left
    assert float(exact.score(None, build(flat, flat).stored).sum()) == pytest.approx(5.0, abs=1e-4)


def test_a_full_sketch_equals_no_sketch():
    """An invertible Φ does not change a projection: Φ (d x d) without jitter gives the exact scores."""
    keys = torch.randn(1, 2, 60, 8, generator=torch.Generator().manual_seed(13))
    stored = build(keys, keys).stored
    exact, sketched = (LeverageScore(sketch=k, jitter=0.0).score(None, stored) for k in (0, 8))
    torch.testing.assert_close(exact, sketched, atol=1e-4, rtol=0)


def test_planted_outlier_comes_first():
    keys = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(14))
    keys[..., 7] = 0.0
    keys[0, 0, 40, 7] = 1.0  # the only key with anything along the last axis
    for sketch in (0, 48):
        scores = LeverageScore(sketch=sketch).score(None, build(keys, keys).stored)[0, 0]
        assert int(scores.argmax()) == 40
        assert float(scores[40]) > 0.9


def test_hand_numbers():
    """Keys 0, 0, 3 in one dimension: centred -1, -1, 2; squares 1, 1, 4 over their sum 6."""
    keys = torch.tensor([0.0, 0.0, 3.0]).view(1, 1, 3, 1)
    scores = LeverageScore(sketch=0, jitter=0.0).score(None, build(keys, keys).stored)
    torch.testing.assert_close(scores[0, 0], torch.tensor([1 / 6, 1 / 6, 4 / 6]))
    with_jitter = LeverageScore(sketch=0, jitter=2.0).score(None, build(keys, keys).stored)
    torch.testing.assert_close(with_jitter[0, 0], torch.tensor([1 / 8, 1 / 8, 4 / 8]))


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
def test_large_keys_in_few_directions_do_not_fail(size):
    """A sketch wider than the keys is singular; beside large keys float32 would lose the jitter."""
    keys = size * torch.randn(1, 1, 500, 16, generator=torch.Generator().manual_seed(15))
    keys[..., 0] *= 1e3
    scores = LeverageScore(sketch=48).score(None, build(keys, keys).stored)
    assert bool(torch.isfinite(scores).all())
    assert 0 <= float(scores.min()) <= float(scores.max()) <= 1 + 1e-6


def test_defaults_and_refusal():
    scorer = Leverage().parts().scorer
    assert (scorer.sketch, scorer.jitter, scorer.protects(100)) == (48, 0.01, (8, 4))
    for bad in ({"sketch": -1}, {"jitter": -0.1}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            Leverage(**bad)
