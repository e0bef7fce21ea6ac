"""CaM: the values of dropped tokens are handed on, with the right probability and in the right parts."""

from dataclasses import replace

import pytest
import torch
from oracles import build

import sparing
from sparing.errors import InvalidInputError
from sparing.measures.draws import uniform
from sparing.methods.kv.cam import CaM, HandOn
from sparing.methods.kv.snapkv import WindowAttention
from sparing.testing import Driver, random_prompt, tiny_model


def case(values, pads=(0,)):
    values = torch.as_tensor(values, dtype=torch.float32)
    return build(torch.ones_like(values), torch.ones_like(values), values, pads).stored


def oracle(values, scores, draws, kept, spread: int, pad: int = 0):
    """The equation, one dropped token at a time, of one head in float64: (N, D) new values."""
    new = values.double().clone()
    for i in range(pad, len(values)):
        if i in kept:
            continue
        after = [k for k in sorted(kept) if k > i][:spread]
        if not after:
            continue
        mean = sum(float(scores[k]) for k in after) / len(after)
        probability = min(max(float(scores[i]) / mean, 0.0), 1.0) if mean else float(scores[i] > 0)
        if float(draws[i]) < probability:
            for k in after:
                new[k] += values[i].double() / len(after)
    return new


@pytest.mark.parametrize("spread", [1, 3, 32])
def test_equals_the_equation(spread):
    g = torch.Generator().manual_seed(80)
    values, scores = torch.randn(2, 2, 30, 4, generator=g), torch.rand(2, 2, 30, generator=g)
    stored = case(values, pads=(0, 5))
    kept = [[torch.arange(5 + head, 30, 3 + row) for head in range(2)] for row in range(2)]
    draws = uniform(stored, 7)
    result = HandOn(spread, seed=7).apply(kept, stored, scores)
    merged = 0
    for row in range(2):
        for head in range(2):
            slots = kept[row][head].tolist()
            wanted = oracle(values[row, head], scores[row, head], draws[row, head], slots, spread, (0, 5)[row])
            torch.testing.assert_close(result.values[row, head, slots].double(), wanted[slots], atol=1e-5, rtol=0)
            merged += int((wanted[slots] != values[row, head, slots].double()).any(-1).sum())
    assert merged > 10
    assert result.keys is stored.keys
    assert result.bias is None
    assert torch.equal(result.positions, stored.positions)


def test_hand_numbers():
    """Token 1 (value 6, score 9) is certain to go to 2, 3 and 5 in thirds; 4 (score 0) never goes; 0 precedes, 6 is
    last and has nobody behind it.
    """
    stored = case(torch.tensor([1.0, 6, 10, 20, 100, 30, 7]).view(1, 1, 7, 1))
    scores = torch.tensor([[[0.0, 9, 1, 1, 0, 1, 9]]])
    result = HandOn(spread=3).apply([[torch.tensor([0, 2, 3, 5])]], stored, scores)
    assert result.values[0, 0, [0, 2, 3, 5], 0].tolist() == [1, 12, 22, 32]


def test_the_probability_is_the_ratio():
    """Every second token is dropped, with a quarter of the score of those that stay: a quarter of them is handed on."""
    tokens = 4000
    stored = case(torch.ones(1, 1, tokens, 1))
    kept, scores = torch.arange(1, tokens, 2), torch.full((1, 1, tokens), 0.25)
    scores[..., kept] = 1.0
    gained = float((HandOn(spread=4).apply([[kept]], stored, scores).values[0, 0, kept] - 1).sum())
    assert abs(gained - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5  # five standard deviations
    certain = HandOn(spread=4).apply([[kept]], stored, torch.ones(1, 1, tokens)).values[0, 0, kept] - 1
    assert float(certain.sum()) == pytest.approx(2000)


def test_in_expectation_the_output_is_what_was_lost():
    """Attention 0.1 on a dropped token, 0.2 on each of two that stay: on average they give back 0.1 v."""
    stored = case(torch.tensor([8.0, 1.0, 1.0]).view(1, 1, 3, 1))
    scores = torch.tensor([[[0.1, 0.2, 0.2]]])
    back = []
    for seed in range(500):
        values = HandOn(seed=seed).apply([[torch.tensor([1, 2])]], stored, scores).values[0, 0]
        back.append(float(0.2 * (values[1] + values[2]) - 0.4))
    assert sum(back) / len(back) == pytest.approx(0.8, abs=5 * 0.8 / 500**0.5)


def test_the_seed_decides_and_nothing_else():
    g = torch.Generator().manual_seed(81)
    values, scores = torch.randn(1, 2, 40, 4, generator=g), torch.rand(1, 2, 40, generator=g)
    kept = [[torch.arange(0, 40, 3)] * 2]
    stored = case(values)
    one, two = (HandOn(4, seed=3).apply(kept, stored, scores).values for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, HandOn(4, seed=4).apply(kept, stored, scores).values)


def test_slots_need_not_be_in_the_order_of_positions():
    g = torch.Generator().manual_seed(82)
    values, scores = torch.randn(1, 1, 12, 2, generator=g), torch.rand(1, 1, 12, generator=g)
    stored, kept = case(values), torch.tensor([2, 3, 7, 11])
    plain = HandOn(2).apply([[kept]], stored, scores).values[0, 0, kept]
    turn = torch.randperm(12, generator=g)
    where = turn.argsort()
    mixed = replace(stored, values=values[:, :, turn], positions=stored.positions[:, :, turn])
    moved = HandOn(2).apply([[where[kept].sort().values]], mixed, scores[:, :, turn]).values[0, 0]
    torch.testing.assert_close(moved[where[kept]], plain)


def test_while_decoding_the_token_that_leaves_is_handed_on():
    """One token leaves a step; the values that are held change, the keys do not, and the cache keeps its size."""
    model = tiny_model("llama", torch.float64)
    said = []
    for spread in (4, 32):
        with sparing.use(model, CaM(keep=24, window=4, spread=spread)) as session:
            cache = session.new_cache()
            driver, prompt = Driver(model, cache), random_prompt(40, steps=6)
            driver.read(prompt)
            said.append(driver.decode(prompt)[-1])
        assert {n for layer in cache.evicting for n in layer.store.lengths.tolist()} == {24}
        assert all(layer.store.bias is None for layer in cache.evicting)
    assert not torch.allclose(*said)


def test_defaults_and_refusals():
    parts = CaM().parts()
    assert (parts.scorer, parts.action, parts.moment, parts.period) == (
        WindowAttention(32, 5),
        HandOn(32),
        "every_step",
        1,
    )
    assert CaM(moment="prefill_end").parts().moment == "prefill_end"
    for bad in ({"window": 0}, {"kernel_size": 2}, {"spread": 0}, {"moment": "never"}, {"period": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            CaM(**bad)
