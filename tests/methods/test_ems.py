"""EMS: the global-local score against its equation, and merging against dense attention over all tokens."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import attention_error, build, dense_attention, random_case

import sparing
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.kv.ems import EMS, GlobalLocal, Merge
from sparing.methods.kv.snapkv import WindowAttention
from sparing.testing import Driver, random_prompt, tiny_model

# -- the score ------------------------------------------------------------------------------------------------------


def oracle(case, window: int, kernel: int) -> list:
    """s[b][h][j] of the tokens before the window, by the equation."""
    attention = dense_attention(case.queries, case.stored)
    rows, heads = case.queries.states.shape[:2]
    kv_heads, tokens = case.stored.keys.shape[1:3]
    group, first = heads // kv_heads, tokens - window
    scores = []
    for b in range(rows):
        pad = int(case.stored.pads[b])
        last, voted = [i for i in range(first, tokens) if i >= pad], range(pad, first)
        for h in range(kv_heads):
            mine = [attention[b][h * group + g] for g in range(group)]
            local = {j: sum(a[i][j] for a in mine for i in last) / group / len(last) for j in voted}
            everywhere = {j: sum(a[i][j] for a in mine for i in range(pad, tokens)) / group for j in voted}
            ratio = sum(local.values()) / sum(everywhere.values()) if voted else 0.0
            best = {j: max(local[j], everywhere[j] * ratio) for j in voted}
            for j in voted:
                near = [best[m] for m in range(j - kernel // 2, j + kernel // 2 + 1) if m in best]
                scores.append((b, h, j, sum(near) / len(near)))
    return scores


@pytest.mark.parametrize("sizes", [[13], [6, 7], [1] * 13, [11, 2]], ids=str)
def test_score_equals_the_equation(sizes):
    case = random_case(seed=70)
    scores = case.score(GlobalLocal(window=4, kernel_size=3), sizes)
    compared = oracle(case, 4, 3)
    assert len(compared) == 2 * (9 + 6 + 2)
    for b, h, j, expected in compared:
        assert float(scores[b, h, j]) == pytest.approx(expected, abs=20 * attention_error(case))


def planted():
    """All rows but the last look at token 1 (of 6), the last at token 3; each with all of its attention."""
    keys, queries = torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2)
    keys[0, 0, 1, 0] = keys[0, 0, 3, 1] = 50.0
    queries[0, 0, :5, 0] = queries[0, 0, 5, 1] = 1.0
    return build(queries, keys, softmax=Softmax(1.0))


def test_hand_numbers():
    """Sums: token 0 has row 0, token 1 rows 1 to 4, token 3 row 5: 1, 4, 0, 1, 0. The last row: 0, 0, 0, 1, 0. Their
    means are 6/5 and 1/5, so the sums count a sixth: 1/6, 4/6, 0, 1, 0.
    """
    scores = planted().score(GlobalLocal(window=1, kernel_size=1))
    torch.testing.assert_close(scores[0, 0, :5], torch.tensor([1 / 6, 4 / 6, 0, 1, 0]), atol=1e-6, rtol=0)


def test_either_view_saves_a_token():
    """SnapKV's view has no vote for token 1, the heavy hitter; the sums alone put token 3 behind it."""
    local = planted().score(WindowAttention(window=1, kernel_size=1))[0, 0, :5]
    assert float(local[1]) < 1e-6
    assert set(planted().score(GlobalLocal(window=1, kernel_size=1))[0, 0, :5].topk(2).indices.tolist()) == {1, 3}


# -- merging --------------------------------------------------------------------------------------------------------


def lanes(keys, values, pads=(0,)):
    """Tokens of (B, H, N, D) float64 keys and values."""
    return build(keys, keys, values, pads).stored


def attend(query, keys, values, bias, slots):
    """Softmax attention of one query over some slots of one head, in float64."""
    logits = keys[slots] @ query + bias[slots].double()
    return logits.softmax(-1) @ values[slots]


def folded(action, stored, kept, scores):
    """What is stored of a single head."""
    result = action.apply([[torch.tensor(kept)]], stored, scores)
    bias = torch.zeros(scores.shape[-1]) if result.bias is None else result.bias[0, 0]
    return result.keys[0, 0], result.values[0, 0], bias


def test_merging_duplicates_changes_no_output():
    """Three different tokens, 4, 2 and 3 times each, one of each kept: every query gets what it gets of all nine."""
    g = torch.Generator().manual_seed(71)
    which = torch.tensor([0, 1, 2, 0, 0, 2, 1, 0, 2])
    keys, values = (torch.randn(1, 1, 3, 6, generator=g, dtype=torch.float64)[:, :, which] for _ in range(2))
    kept, scores = [1, 4, 8], torch.rand(1, 1, 9, generator=g)
    new_keys, new_values, bias = folded(Merge(mass=1.0), lanes(keys, values), kept, scores)
    torch.testing.assert_close(bias[kept], torch.tensor([2.0, 4.0, 3.0]).log())
    for query in torch.randn(20, 6, generator=g, dtype=torch.float64):
        dense = attend(query, keys[0, 0], values[0, 0], torch.zeros(9), list(range(9)))
        # A float32 log is off by half a unit in the last place, relative to log 4 < 2.
        torch.testing.assert_close(attend(query, new_keys, new_values, bias, kept), dense, atol=1e-6, rtol=0)
        exact = torch.tensor([0, 2, 0, 0, 4, 0, 0, 0, 3]).double().log().nan_to_num(neginf=0.0)
        torch.testing.assert_close(attend(query, new_keys, new_values, exact, kept), dense, atol=1e-13, rtol=1e-13)
        without = attend(query, new_keys, new_values, torch.zeros(9), kept)
        assert float((without - dense).abs().max()) > 1e-3  # dropping duplicates is not the same


def test_a_model_with_duplicate_tokens_says_the_same():
    """gpt2 without positions: equal tokens have equal keys and values, so a third of the cache is enough."""
    model = tiny_model("gpt2", torch.float64)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    prompt = random_prompt(60, steps=6)
    few = torch.tensor([3, 7, 11, 19, 23])
    # Behind the first layer tokens differ by what they have seen, so the attention there must not count.
    for block in model.transformer.h[1:]:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
        torch.nn.init.zeros_(block.attn.c_proj.bias)
    ids = few[prompt.ids[0] % 5][None]
    said = []
    for method in (sparing.SnapKV(1.0), EMS(keep=20, window=5, mass=1.0), EMS(keep=20, window=5, threshold=2.0)):
        with sparing.use(model, method) as session:
            cache = session.new_cache()
            driver = Driver(model, cache)
            cache.expect_prompt(60)
            driver.feed(ids)
            cache.report()
            said.append(torch.cat(driver.decode(prompt)))
    torch.testing.assert_close(said[1], said[0], atol=1e-5, rtol=0)
    assert float((said[2] - said[0]).abs().max()) > 1e-3


def test_hand_numbers_of_a_merge():
    """Centre 0 has key (3, 0), value 1, score 3; member 2 has key (4, 3), value 5, score 1; 1 is another centre.
    Weights 3/4 and 1/4: value 2, norm (9 + 5) / 4 = 3.5, direction of (3/4 + 4/5/4, 3/5/4) = (0.95, 0.15).
    """
    keys = torch.tensor([[3.0, 0], [0, 1], [4, 3]]).view(1, 1, 3, 2)
    values = torch.tensor([1.0, -1, 5]).view(1, 1, 3, 1)
    new_keys, new_values, bias = folded(Merge(mass=1.0), lanes(keys, values), [0, 1], torch.tensor([[[3.0, 2.0, 1.0]]]))
    assert float(new_values[0]) == pytest.approx(2.0)
    direction = torch.tensor([0.95, 0.15]) / math.hypot(0.95, 0.15)
    torch.testing.assert_close(new_keys[0], 3.5 * direction)
    torch.testing.assert_close(bias[:2], torch.tensor([math.log(2), 0.0]))
    assert torch.equal(new_keys[1], keys[0, 0, 1])  # who gets nothing stays, bit for bit


def test_resemblance_needs_keys_and_values_both_alike():
    """Token 2 has the key of centre 0 and the value of centre 1; token 3 opposes centre 0 in both, a product of +1."""
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 0], [-1, 0]]).view(1, 1, 4, 2)
    values = torch.tensor([[1.0, 0], [0, 1], [0, 1], [-1, 0]]).view(1, 1, 4, 2)
    for threshold in (0.0, 0.6, 1.0):
        *_, bias = folded(Merge(threshold, 1.0), lanes(keys, values), [0, 1], torch.ones(1, 1, 4))
        assert not bias.any(), threshold


def test_the_most_alike_centre_gets_the_token_and_the_threshold_is_met_by_equality():
    angles = torch.tensor([0.0, 1.0, 0.4])
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1).view(1, 1, 3, 2).double()
    values = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    for threshold, wanted in ((0.9, 2), (0.93, 1)):
        *_, bias = folded(Merge(threshold, 1.0), lanes(keys, values), [0, 1], torch.ones(1, 1, 3))
        assert round(float(bias[0].exp())) == wanted  # cos 0.4 = 0.921, cos 0.6 = 0.825
        assert float(bias[1]) == 0.0
    keys[:] = torch.tensor([1.0, 0.0])
    *_, bias = folded(Merge(1.0, 1.0), lanes(keys, values), [0, 1], torch.ones(1, 1, 3))
    assert round(float(bias[0].exp())) == 2


def test_only_tokens_within_the_mass_are_merged():
    """Equal tokens; the kept one has 0.5 of the scores, the others 0.2, 0.2 and 0.1: up to 0.9 two more fit."""
    ones = torch.ones(1, 1, 4, 2)
    scores = torch.tensor([[[0.2, 0.5, 0.1, 0.2]]])
    for mass, wanted in ((0.0, 1), (0.5, 1), (0.69, 1), (0.7, 2), (0.9, 3), (1.0, 4)):
        *_, bias = folded(Merge(0.6, mass), lanes(ones, ones), [1], scores)
        assert round(float(bias[1].exp())) == wanted, mass


def test_above_one_it_is_pure_eviction():
    model = tiny_model("llama")
    plans, said, stores = [], [], []
    scorer = GlobalLocal(8, 7)
    for method in (EMS(20, 8, threshold=1.5), sparing.Evict(20, scorer), EMS(20, 8, threshold=0.0, mass=1.0)):
        with sparing.use(model, method) as session:
            cache = session.new_cache()
            driver, prompt = Driver(model, cache), random_prompt(64)
            driver.read(prompt)
            plans.append([[head.tolist() for head in layer.kept[0]] for layer in cache.report().plan.layers])
            stores.append([layer.store.bias for layer in cache.evicting])
            said.append(torch.cat(driver.decode(prompt)))
    assert plans[0] == plans[1] == plans[2]
    assert torch.equal(said[0], said[1])
    assert stores[0] == [None, None]
    assert not torch.allclose(said[2], said[1])


def test_merged_tokens_merge_again_by_their_counts():
    """A token that stands for 3 and one for 2 become one for 5."""
    ones = torch.ones(1, 1, 2, 2)
    stored = replace(lanes(ones, ones), bias=torch.tensor([[[math.log(3), math.log(2)]]]))
    *_, bias = folded(Merge(mass=1.0), stored, [0], torch.ones(1, 1, 2))
    assert float(bias[0].exp()) == pytest.approx(5.0, rel=1e-6)


def test_pads_and_other_lanes_stay_out():
    """Equal tokens everywhere, and nonsense in the pads: each lane counts its own real ones."""
    ones = torch.ones(2, 2, 6, 2)
    ones[1, :, :4] = torch.nan
    stored = lanes(ones, ones, pads=(0, 4))
    kept = [[torch.tensor([5]), torch.tensor([4, 5])], [torch.tensor([5]), torch.tensor([4, 5])]]
    bias = Merge(mass=1.0).apply(kept, stored, torch.ones(2, 2, 6)).bias
    assert bias.exp().round().long()[..., 4:].tolist() == [[[1, 6], [5, 1]], [[1, 2], [1, 1]]]


def test_negative_and_zero_scores_weigh_alike():
    keys, values = torch.ones(1, 1, 2, 2), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    for pair in ([0.0, 0.0], [-1.0, -5.0]):
        _, new, _ = folded(Merge(mass=1.0), lanes(keys, values), [0], torch.tensor([[pair]]))
        assert float(new[0]) == pytest.approx(2.0)


def test_half_precision_is_merged_in_float32():
    keys = torch.ones(1, 1, 300, 2, dtype=torch.bfloat16)
    values = torch.full((1, 1, 300, 1), 3.0, dtype=torch.bfloat16)
    stored = lanes(keys, values)
    result = Merge(mass=1.0).apply([[torch.tensor([0])]], stored, torch.ones(1, 1, 300))
    assert result.keys.dtype == result.values.dtype == torch.bfloat16
    assert float(result.bias[0, 0, 0].exp()) == pytest.approx(300, rel=1e-5)
    assert float(result.values[0, 0, 0]) == 3.0
    assert torch.equal(result.keys[0, 0, 0], keys[0, 0, 0])


def test_merges_with_any_scorer_and_while_decoding():
    """When the cache is full, what leaves is merged; a head never stands for more tokens than it has seen."""
    model = tiny_model("llama")
    action = Merge(threshold=0.0, mass=1.0)
    method = sparing.Evict(24, WindowAttention(window=4), moment="every_step", period=4, action=action)
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        driver, prompt = Driver(model, cache), random_prompt(40, steps=9)
        driver.read(prompt)
        driver.decode(prompt)
    for layer in cache.evicting:
        for start, length in layer.store.spans:
            assert 20 <= length <= 24
            assert length + 1 < float(layer.store.bias[start : start + length].exp().sum()) <= 49.01


def test_latent_attention_is_refused_by_name():
    model = tiny_model("deepseek_v3")
    with sparing.use(model, EMS(keep=0.5)) as session, pytest.raises(MethodRefusedError, match="cannot merge tokens"):
        Driver(model, session.new_cache()).read(random_prompt(64))


def test_defaults_and_refusals():
    parts = EMS().parts()
    assert (parts.scorer, parts.action) == (GlobalLocal(32, 7), Merge(0.6, 0.95))
    assert parts.scorer.protects(100) == (0, 32)
    nan = float("nan")
    for bad in (
        {"window": 0},
        {"kernel_size": 4},
        {"threshold": -0.1},
        {"threshold": nan},
        {"mass": 1.5},
        {"mass": nan},
    ):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            EMS(**bad)
