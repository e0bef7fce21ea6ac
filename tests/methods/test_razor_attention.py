"""RazorAttention: which heads are retrieval heads, and one token that stands for all that was dropped."""

import dataclasses
import math

import pytest
import torch
from oracles import build, dense_attention, random_case

import sparing
from methods.roles import kept, measured
from sparing.errors import InvalidInputError, ScoresMismatchError
from sparing.methods.kv.razor_attention import Compensate
from sparing.session import use
from sparing.testing import Driver, random_prompt, tiny_model

ECHO = measured("echo", [[0.0, 0.0, 0.0, 0.8], [0.1, 0.1, 0.1, 0.1]])
INDUCTION = measured("induction", [[0.1, 0.2, 0.1, 0.1], [0.5, 0.6, 0.9, 0.1]])
BOTH = (ECHO, INDUCTION)


def test_retrieval_heads_are_the_union_of_both_rankings_by_the_best_query_head():
    """KV heads score 0, .8 / .1, .1 by echo and .2, .1 / .6, .9 by induction. Half of 4 heads are 2, a tenth is 1."""
    assert sparing.RazorAttention(0.5, BOTH, induction=0.5, echo=0.1).retrieval_heads() == [(1, 1), (0, 1), (1, 0)]
    assert sparing.RazorAttention(0.5, BOTH, induction=0.0, echo=0.25).retrieval_heads() == [(0, 1)]
    assert sparing.RazorAttention(0.5, BOTH).retrieval_heads() == [(1, 1), (0, 1)]  # 14 % and 1 %, rounded up
    assert sparing.RazorAttention(0.5, BOTH[::-1]).retrieval_heads() == [(1, 1), (0, 1)]
    assert sparing.RazorAttention(0.5, BOTH, induction=0.0, echo=0.0).retrieval_heads() == []


def test_only_retrieval_heads_keep_everything_whatever_the_budget():
    """4 · 56 tokens of 64: two whole heads, and 48 each for the two others, the last dropped one among them."""
    found = kept(sparing.RazorAttention(56, BOTH, sinks=4, recent=4))
    assert found[1][1] == found[0][1] == list(range(64))
    assert found[0][0] == found[1][0] == [*range(4), *range(20, 64)]  # 4 sinks, 43 recent; 4 to 20 are one token at 20


def test_a_budget_that_does_not_hold_all_retrieval_heads_holds_the_best():
    """4 · 22 = 64 + 3 · 8: room for one whole head."""
    found = kept(sparing.RazorAttention(22, BOTH, sinks=4, recent=4))
    assert [len(head) for heads in found.values() for head in heads] == [8, 8, 8, 64]


# -- the token that stands for others -------------------------------------------------------------------------------


def oracle(stored, kept_slots, row, head):
    """(key, value, weight) of one head's compensation token: weighted means, one number at a time in float64."""
    lost = [j for j in range(stored.keys.shape[2]) if stored.valid[row, head, j] and j not in kept_slots]
    weights = [math.exp(float(stored.bias[row, head, j])) if stored.bias is not None else 1.0 for j in lost]
    total = sum(weights)
    means = []
    for x in (stored.keys, stored.values):
        vectors = x[row, head].double().tolist()
        means.append([sum(w * vectors[j][d] for w, j in zip(weights, lost, strict=True)) / total for d in range(8)])
    return means[0], means[1], total


def slots(*heads):
    return [[torch.tensor(head, dtype=torch.int64) for head in row] for row in heads]


KEPT = slots(([0, 11, 12], list(range(13))), ([3, 12], [3, 4, 12]), ([], [12]))


@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_equation(biased):
    case = random_case(seed=3)
    stored = case.stored
    if biased:
        weights = torch.rand(stored.valid.shape, generator=torch.Generator().manual_seed(0)) * 3
        stored = dataclasses.replace(stored, bias=weights)
    folded = Compensate().apply(KEPT, stored, torch.zeros(stored.valid.shape))
    for row, heads in enumerate(KEPT):
        for head, chosen in enumerate(heads):
            if len(chosen) == 13:
                assert folded.kept[row][head].tolist() == chosen.tolist()
                assert torch.equal(folded.keys[row, head], stored.keys[row, head])
                continue
            key, value, total = oracle(stored, chosen.tolist(), row, head)
            (slot,) = set(folded.kept[row][head].tolist()) - set(chosen.tolist())
            last = max(j for j in range(13) if stored.valid[row, head, j] and j not in chosen.tolist())
            assert slot == last
            # A float32 mean of up to 13 numbers of size 5: 13 roundings of 2^-24 · 5, weights and their sum as many.
            assert folded.keys[row, head, slot].tolist() == pytest.approx(key, abs=1e-5)
            assert folded.values[row, head, slot].tolist() == pytest.approx(value, abs=1e-5)
            assert float(folded.bias[row, head, slot]) == pytest.approx(math.log(total), abs=1e-6)
            for j in chosen.tolist():
                assert torch.equal(folded.keys[row, head, j], stored.keys[row, head, j])
                assert stored.bias is None or folded.bias[row, head, j] == stored.bias[row, head, j]


def test_merging_again_is_merging_at_once():
    """Tokens 2 to 5 merged, then that token with 6 to 9: the mean and the weight of all eight."""
    stored = random_case(seed=4, tokens=13).alone(0).stored
    first = Compensate().apply(slots(([0, 1, *range(6, 13)],) * 2), stored, torch.zeros(1, 2, 13))
    again = dataclasses.replace(stored, keys=first.keys, values=first.values, bias=first.bias)
    valid = torch.zeros(1, 2, 13, dtype=torch.bool)
    for head in (0, 1):
        valid[0, head, first.kept[0][head]] = True
    twice = Compensate().apply(slots(([0, 1, 10, 11, 12],) * 2), dataclasses.replace(again, valid=valid), None)
    once = Compensate().apply(slots(([0, 1, 10, 11, 12],) * 2), stored, None)
    assert [head.tolist() for head in twice.kept[0]] == [[0, 1, 9, 10, 11, 12]] * 2
    torch.testing.assert_close(twice.keys[:, :, 9], once.keys[:, :, 9], atol=2e-6, rtol=0)
    torch.testing.assert_close(twice.values[:, :, 9], once.values[:, :, 9], atol=2e-6, rtol=0)
    torch.testing.assert_close(twice.bias[:, :, 9], torch.full((1, 2), math.log(8)), atol=1e-6, rtol=0)


def attended(case, folded):
    """The last row's output over what is stored, in float64 with plain loops."""
    stored = dataclasses.replace(case.stored, keys=folded.keys, values=folded.values)
    logits = [float(case.queries.states[0, 0, -1].double() @ stored.keys[0, 0, j].double()) for j in folded.kept[0][0]]
    weights = [
        math.exp(logit * case.queries.softmax.scaling + float(folded.bias[0, 0, j]))
        for logit, j in zip(logits, folded.kept[0][0], strict=True)
    ]
    rows = [stored.values[0, 0, j].double() for j in folded.kept[0][0]]
    return sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)


def test_equal_keys_lose_nothing_and_without_the_log_they_would():
    """If dropped keys are equal, one token with their mean value and log N is the exact attention."""
    generator = torch.Generator().manual_seed(5)
    keys, values, queries = (torch.randn(1, 1, 13, 8, generator=generator) for _ in range(3))
    keys[0, 0, 2:10] = keys[0, 0, 2]
    case = build(queries, keys, values)
    folded = Compensate().apply(slots(([0, 1, 10, 11, 12],)), case.stored, None)
    row = torch.tensor(dense_attention(case.queries, case.stored)[0][0][12], dtype=torch.float64)
    exact = row @ values[0, 0].double()
    assert float((attended(case, folded) - exact).abs().max()) < 1e-6
    without = dataclasses.replace(folded, bias=torch.zeros_like(folded.bias))
    assert float((attended(case, without) - exact).abs().max()) > 1e-2


def test_every_token_counts_once_also_after_a_second_turn():
    """In every head exp(bias) sums to the tokens seen, and no head has more than one token that stands for others."""
    model, method = tiny_model("llama"), sparing.RazorAttention(0.4, BOTH, sinks=4, recent=4)
    with use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(random_prompt(64))
        for seen in (64, 84, 104):
            cache.report()
            for layer in cache.evicting:
                held = layer.stored_tokens()
                weights = held.bias.exp() * held.valid
                assert weights.sum(-1).tolist() == [pytest.approx([seen] * 2, rel=1e-5)]
                standing = (weights > 1.5).sum(-1)[0].tolist()
                assert all(count <= 1 for count in standing)
                assert sum(standing) >= 1
            if seen < 104:
                cache.expect_prompt(seen + 20)
                driver.feed(random_prompt(20, seed=seen).ids)


def test_what_lies_in_pads_does_not_matter():
    stored = random_case(seed=6).stored
    poisoned = dataclasses.replace(
        stored,
        keys=stored.keys.masked_fill(~stored.valid[..., None], torch.nan),
        values=stored.values.masked_fill(~stored.valid[..., None], torch.inf),
    )
    clean, dirty = (Compensate().apply(KEPT, each, None) for each in (stored, poisoned))
    assert torch.equal(clean.keys[stored.valid], dirty.keys[stored.valid])
    assert torch.equal(clean.values[stored.valid], dirty.values[stored.valid])


def test_both_measurements_are_needed():
    with pytest.raises(
        ScoresMismatchError, match="razor needs one measurement by each of echo, induction; there is echo"
    ):
        sparing.RazorAttention(0.5, ECHO)
    with pytest.raises(ScoresMismatchError, match="there is echo, echo"):
        sparing.RazorAttention(0.5, (ECHO, ECHO))


@pytest.mark.parametrize("bad", [{"echo": -0.1}, {"induction": 1.1}, {"sinks": -1}, {"recent": -1}])
def test_refuses(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        sparing.RazorAttention(0.5, BOTH, **bad)
