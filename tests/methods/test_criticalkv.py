"""CriticalKV: two stages, the second weighted by what the value does to the output."""

from dataclasses import replace

import pytest
import torch
from oracles import build, dense_attention, random_case

import sparing
from sparing.errors import InvalidInputError, UnsupportedModelError
from sparing.methods.kv.criticalkv import CriticalKV, OutputWeighted, output_norms
from sparing.methods.kv.h2o import AccumulatedAttention
from sparing.methods.kv.knorm import KeyNorm
from sparing.methods.kv.snapkv import WindowAttention
from sparing.testing import Driver, random_prompt, tiny_model


class Weights:
    """An output projection that a test has written: (Hq, Dv, hidden)."""

    def __init__(self, weight):
        self._weight = weight

    def weight(self):
        return self._weight


def choose(scores, norms, protected, budget: int, share: float, epsilon: float) -> list[int]:
    """The equation, one token at a time: protected ones, then the best by score, then by score times norm."""
    kept = sorted(protected)[-budget:]
    rest, room = [j for j in range(len(scores)) if j not in kept], budget - len(kept)
    first = sorted(rest, key=lambda j: (-scores[j], j))[: int(share * room)]
    others = [j for j in rest if j not in first]
    second = sorted(others, key=lambda j: (-(scores[j] + epsilon) * norms[j], j))[: room - len(first)]
    return sorted(kept + first + second)


def slow_norms(values, weight) -> list[list[float]]:
    """[query head][token]: the sum over the hidden channels c of |Σ_d v_d W_dc|, one number at a time."""
    group = len(weight) // len(values)
    return [
        [sum(abs(float(v.double() @ channel)) for channel in w.T) for v in values[h // group]]
        for h, w in enumerate(weight.double())
    ]


def test_norms_equal_the_equation():
    case = random_case(seed=60)
    weight = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(61))
    norms = output_norms(replace(case.stored, output=Weights(weight)))
    for row, pad in enumerate([0, 3, 7]):
        wanted = torch.tensor(slow_norms(case.stored.values[row], weight), dtype=torch.float64)
        torch.testing.assert_close(norms[row, :, pad:].double(), wanted[:, pad:], rtol=1e-6, atol=1e-6)
        assert not norms[row, :, :pad].any()


def refined(scorer, numbers, room: int, values=None, weight=None):
    """(N,) new values for one head of N one-channel tokens."""
    tokens = len(numbers)
    stored = build(torch.zeros(1, 1, tokens, 1), torch.zeros(1, 1, tokens, 1)).stored
    values = torch.ones(tokens) if values is None else torch.tensor(values)
    stored = replace(
        stored, values=values.view(1, 1, tokens, 1), output=Weights(torch.ones(1, 1, 1) if weight is None else weight)
    )
    return scorer.refine(torch.tensor(numbers).view(1, 1, tokens), stored.valid, torch.tensor([[room]]), stored)[0, 0]


def test_hand_numbers():
    """Room for four: 0 and 1 by score; of 2, 3, 4, 5 with products 2·0.2, 1·0.2, 5·0.1, 9·0.1 the last two."""
    scorer = OutputWeighted(WindowAttention(), epsilon=0.0)
    scores, values = [0.4, 0.3, 0.2, 0.2, 0.1, 0.1], [0.0, 0.1, 2.0, -1.0, 5.0, -9.0]
    new = refined(scorer, scores, 4, values)
    assert new[:2].tolist() == [float("inf")] * 2
    torch.testing.assert_close(new[2:], torch.tensor([0.4, 0.2, 0.5, 0.9]))
    assert (
        sorted(new.topk(4).indices.tolist())
        == [0, 1, 4, 5]
        == choose(scores, [abs(v) for v in values], [], 4, 0.5, 0.0)
    )


@pytest.mark.parametrize(("share", "first"), [(0.0, 0), (0.3, 1), (0.5, 2), (0.75, 3), (1.0, 5)])
def test_the_first_stage_takes_its_share_rounded_down(share, first):
    new = refined(OutputWeighted(WindowAttention(), first_stage=share), [0.1, 0.5, 0.2, 0.4, 0.3, 0.05], 5)
    best = [1, 3, 4, 2, 0, 5]
    assert sorted(torch.isinf(new).nonzero().flatten().tolist()) == sorted(best[:first])


def test_epsilon_gives_a_token_without_attention_a_chance():
    scores, values = [0.0, 1e-6], [100.0, 1.0]
    assert int(refined(OutputWeighted(WindowAttention(), 0.0, 0.0), scores, 1, values).argmax()) == 1
    assert int(refined(OutputWeighted(WindowAttention(), 0.0), scores, 1, values).argmax()) == 0


def test_with_grouped_queries_the_norms_are_averaged():
    """Two query heads of one KV head: projections by 1 and by -3, so a value of 2 counts (2 + 6) / 2."""
    weight = torch.tensor([1.0, -3.0]).view(2, 1, 1)
    new = refined(OutputWeighted(WindowAttention(), 0.0, 0.0), [0.5, 0.5], 1, [2.0, 1.0], weight)
    torch.testing.assert_close(new, torch.tensor([2.0, 1.0]))


def test_no_room_and_no_contenders():
    scorer = OutputWeighted(WindowAttention())
    assert not torch.isinf(refined(scorer, [0.1, 0.2], 0)).any()
    stored = replace(
        build(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)).stored, output=Weights(torch.ones(1, 1, 1))
    )
    nobody = torch.zeros(1, 1, 2, dtype=torch.bool)
    assert not torch.isinf(scorer.refine(torch.ones(1, 1, 2), nobody, torch.tensor([[2]]), stored)).any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_model_keeps_what_the_equation_says(name, adaptive):
    """The whole way, with the model's own projection, pads, grouped queries (not in gpt2), and uneven budgets."""
    model = tiny_model(name)
    method = CriticalKV(keep=20, window=4)
    if adaptive:
        method = sparing.Evict(20, method.parts().scorer, sparing.AdaptiveHeads())
    prompt = random_prompt(48, 37)
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        Driver(model, cache).read(prompt)
        seen = [(layer.states[cache.scorers[0]], layer.stored_tokens()) for layer in cache.evicting]
        plan = cache.report().plan
    counts = set()
    for number, (rows, stored) in enumerate(seen):
        attention = dense_attention(rows, stored)
        block = model.transformer.h[number].attn if name == "gpt2" else model.model.layers[number].self_attn
        matrix = block.c_proj.weight if name == "gpt2" else block.o_proj.weight.T
        query_heads, kv_heads = rows.states.shape[1], stored.keys.shape[1]
        weight = matrix.detach().double().reshape(query_heads, -1, matrix.shape[1])
        group = query_heads // kv_heads
        for row, pad in enumerate(prompt.pads):
            norms = slow_norms(stored.values[row], weight)
            for head, kept in enumerate(plan.layers[number].kept[row]):
                mine = range(head * group, (head + 1) * group)
                votes = [sum(attention[row][h][i][j] for h in mine for i in range(4)) / group / 4 for j in range(48)]
                near = [votes[max(j - 2, pad) : min(j + 3, 44)] for j in range(pad, 44)]
                pooled = [sum(part) / len(part) for part in near]
                mean = [sum(norms[h][j] for h in mine) / group for j in range(pad, 48)]
                counts.add(len(kept))
                wanted = choose([*pooled, *votes[44:]], mean, range(44 - pad, 48 - pad), len(kept), 0.5, 1e-4)
                assert (kept - pad).tolist() == wanted, (number, row, head)
    assert (len(counts) > 1) == adaptive


def test_it_differs_from_snapkv():
    """The same votes and budget: were the second stage not there, both would keep the same."""
    plans = []
    for method in (
        CriticalKV(keep=20, window=4),
        CriticalKV(keep=20, window=4, first_stage=1.0),
        sparing.SnapKV(20, 4),
    ):
        with sparing.use(tiny_model("llama"), method) as session:
            cache = session.new_cache()
            Driver(session.model, cache).read(random_prompt(64))
            plans.append([[head.tolist() for head in layer.kept[0]] for layer in cache.report().plan.layers])
    assert plans[1] == plans[2]
    assert plans[0] != plans[2]


def test_while_decoding_it_scores_and_weighs_again():
    scorer = OutputWeighted(WindowAttention(window=4))
    method = sparing.Evict(24, scorer, moment="every_step", period=4)
    model = tiny_model("llama")
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        prompt = random_prompt(40, steps=9)
        driver.read(prompt)
        driver.decode(prompt)
    assert {length for layer in cache.evicting for length in layer.store.lengths.tolist()} <= set(range(20, 25))


def test_a_layer_without_a_plain_projection_is_refused_by_name():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.secret = layer.self_attn.o_proj
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.secret)
        del layer.self_attn.secret
    with sparing.use(model, CriticalKV(keep=0.5)) as session:
        cache = session.new_cache()
        Driver(model, cache).read(random_prompt(64))
        with pytest.raises(UnsupportedModelError, match=r"no plain output projection.*use a method"):
            cache.report()


def test_defaults_and_refusals():
    scorer = CriticalKV().parts().scorer
    assert (scorer.first_stage, scorer.epsilon, scorer.scorer) == (0.5, 1e-4, WindowAttention(32, 5))
    assert scorer.needs_output
    assert OutputWeighted(AccumulatedAttention()).protects(10) == (0, 5)
    with pytest.raises(InvalidInputError, match="scorer: got 'KeyNorm', allowed is a scorer whose scores are shares"):
        OutputWeighted(KeyNorm())
    for bad in ({"first_stage": 1.5}, {"first_stage": float("nan")}, {"epsilon": -1.0}, {"window": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            CriticalKV(**bad)
