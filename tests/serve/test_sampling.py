"""Drawing tokens."""

from __future__ import annotations

import pytest
import torch

from sparing.serve.sampling import Sampler, Sampling, nucleus


def reference_nucleus(probabilities: list[float], top_p: float) -> set[int]:
    """Likeliest first, until their sum reaches top_p (Holtzman et al. 2019, section 3.1)."""
    kept: set[int] = set()
    total = 0.0
    for index in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if kept and total >= top_p:
            break
        kept.add(index)
        total += probabilities[index]
    return kept


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        probabilities = torch.rand(12, generator=random, dtype=torch.float64).softmax(-1)
        top_p = float(torch.rand(1, generator=random, dtype=torch.float64))
        kept = nucleus(probabilities, top_p)
        assert set(kept.nonzero().flatten().tolist()) == reference_nucleus(probabilities.tolist(), top_p)
        assert torch.equal(kept[kept > 0], probabilities[kept > 0])


def test_by_hand() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.2, 0.2])
    assert nucleus(probabilities, 0.0).tolist() == pytest.approx([0, 0.5, 0, 0])
    assert nucleus(probabilities, 0.5).tolist() == pytest.approx([0, 0.5, 0, 0])
    assert nucleus(probabilities, 0.75).tolist() == pytest.approx([0, 0.5, 0.2, 0.2])


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert Sampler(Sampling(0.0, 1.0, None)).draw(logits) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-45, 1e-6, 0.1])
def test_a_tiny_temperature_is_the_likeliest_too(temperature: float) -> None:
    logits = torch.tensor([1000.0, -1000.0, 990.0])
    assert {Sampler(Sampling(temperature, 1.0, seed)).draw(logits) for seed in range(20)} == {0}


def test_a_seed_repeats_and_requests_do_not_share_random_numbers() -> None:
    logits = torch.zeros(1000)

    def drawn(seed: int | None, beside: bool = False) -> list[int]:
        one, other = Sampler(Sampling(1.0, 1.0, seed)), Sampler(Sampling(1.0, 1.0, 99))
        return [one.draw(logits) + 0 * (other.draw(logits) if beside else 0) for _ in range(8)]

    assert drawn(7) == drawn(7, beside=True) != drawn(8)
    assert drawn(None) != drawn(None)
    assert drawn(-(2**63)) == drawn(-(2**63))


def test_frequencies_follow_the_softened_probabilities() -> None:
    logits, temperature, count = torch.tensor([0.0, 1.0, 2.0]), 2.0, 4000
    sampler = Sampler(Sampling(temperature, 1.0, 0))
    drawn = torch.tensor([sampler.draw(logits) for _ in range(count)])
    expected = (logits.double() / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=3) / count
    # Four standard deviations of a share of `count` draws.
    assert bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all())
