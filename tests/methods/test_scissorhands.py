"""Scissorhands: counts by hand and by a slow loop, the window, and half a cache dropped at once."""

import math

import pytest
import torch
from oracles import build, dense_attention, random_case

from sparing import Scissorhands, parse_method, use
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.measures.attention import below_average
from sparing.methods.kv.scissorhands import Persistence
from sparing.testing import Driver, held_positions, random_prompt, run_method, tiny_model

torch.set_num_threads(1)


def planted(attention):
    """A case of one head whose attention is the given lower triangle of rows: keys are axes, queries logarithms."""
    size = len(attention)
    queries = torch.zeros(size, size)
    for i, row in enumerate(attention):
        for j, a in enumerate(row):
            queries[i, j] = math.log(a)
    return build(queries[None, None], torch.eye(size)[None, None], softmax=Softmax(1.0))


def slow(case, window):
    """Σ over the group of the rows, of the last `window` valid ones, in which a key that they see is below 1 / t."""
    heads = case.stored.keys.shape[1]
    group = case.queries.states.shape[1] // heads
    maps = dense_attention(case.queries, case.stored)
    result = torch.zeros(case.stored.valid.shape, dtype=torch.float64)
    for b, pad in enumerate(case.stored.pads.tolist()):
        for h in range(heads):
            for q in range(group):
                rows = maps[b][h * group + q]
                for i in range(max(case.tokens - window, pad), case.tokens):
                    for j in range(pad, i + 1):
                        result[b, h, j] -= int(rows[i][j] < 1 / (i + 1 - pad))
                last = rows[case.tokens - 1]
                for j in range(pad, case.tokens):
                    result[b, h, j] += last[j] / 2 / group
    return result


def test_three_rows_by_hand():
    """Even shares are 1, 1/2 and 1/3. Key 0: never below. Key 1: 0.4 < 1/2 in row 1, 0.1 < 1/3 in row 2. Key 2: 0.5."""
    case = planted([[1.0], [0.6, 0.4], [0.4, 0.1, 0.5]])
    assert below_average(case.queries, case.stored)[0, 0].tolist() == [0, 2, 0]
    torch.testing.assert_close(case.score(Persistence())[0, 0], torch.tensor([0.2, -2 + 0.05, 0.25]), atol=1e-6, rtol=0)
    assert Persistence(window=1).score((case.queries, None), case.stored).shape == (1, 1, 3)


@pytest.mark.parametrize("window", [1, 4, 400])
def test_the_equation(window):
    case = random_case(seed=9)
    found = case.score(Persistence(window=window)).double()
    wanted = slow(case, window)
    torch.testing.assert_close(found[case.stored.valid], wanted[case.stored.valid], atol=1e-5, rtol=0)


def test_even_attention_is_not_below_average():
    case = build(torch.zeros(1, 2, 9, 4), torch.randn(1, 1, 9, 4, generator=torch.Generator().manual_seed(0)))
    assert below_average(case.queries, case.stored).abs().max() == 0


def test_a_pivotal_token_is_never_dropped():
    """Token 5 is above its even share in every row, the others' shares vary: of 40, 5 stay and it is among them."""
    tokens = 40
    g = torch.Generator().manual_seed(1)
    rows = []
    for i in range(tokens):
        row = torch.rand(i + 1, generator=g).double() + 1e-3
        if i >= 5:
            others = row.sum() - row[5]
            row[5] = 1.5 * others / (i + 1)
        rows.append((row / row.sum()).tolist())
    case = planted(rows)
    scores = case.score(Persistence(recent=0))[0, 0]
    assert 5 in scores.sort(descending=True).indices[:5].tolist()
    assert float(scores[5]) >= 0


def test_what_was_counted_before_a_drop_fades_with_the_rows_after_it():
    """Of a window of 8 rows, 2 came since the drop: what stood before counts 6/8."""
    case = random_case(seed=11).alone(0)
    scorer = Persistence(window=8)
    fresh = case.score(scorer)
    two = case.queries
    two = type(two)(two.states[:, :, -2:], two.positions[-2:], two.valid[:, -2:], two.softmax)
    before = torch.full((1, 2, 11), -4.0)
    state = scorer.observe(before, two, case.stored)
    plain = scorer.score(scorer.observe(None, two, case.stored), case.stored)
    found = scorer.score(state, case.stored)
    torch.testing.assert_close(found[..., :11], plain[..., :11] - 3.0)
    assert torch.equal(found[..., 11:], plain[..., 11:])
    assert torch.equal(scorer.score(before, case.stored)[..., :11], before)
    assert not torch.equal(fresh, plain)


def test_half_of_a_full_cache_goes_at_once_and_the_newest_ten_stay():
    model, prompt = tiny_model("llama"), random_prompt(60, steps=50)
    sizes = []
    with use(model, Scissorhands(keep=32)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        assert cache.report().plan.tokens_kept == 32 * 4
        for step in range(50):
            driver.feed(prompt.forced[:, [step]])
            heads = [head for rows in held_positions(cache).values() for head in rows[0]]
            assert len({len(head) for head in heads}) == 1
            sizes.append(len(heads[0]))
            if sizes[-1] == 17:
                assert all(set(range(51 + step, 61 + step)) <= set(head.tolist()) for head in heads)
    assert max(sizes) == 32
    assert sizes == [17 + step % 16 for step in range(50)]  # 33 are there, 16 go: room for 16 more


def test_memory_beside_the_cache_is_a_number_per_token_after_a_drop():
    run = run_method(tiny_model("llama"), Scissorhands(keep=0.25), random_prompt(320))
    for layer in run.cache.evicting:
        assert layer.store.scores is not None
        rows = sum(states.shape[2] for states in layer.pending)
        assert rows <= 4


def test_text_and_refusals():
    assert parse_method("scissorhands(period=8,window=50)").period == 8
    assert parse_method("scissorhands(period=0.25)").period == 0.25
    for wrong in ({"window": 0}, {"recent": -1}, {"period": 1.5}, {"period": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            Scissorhands(**wrong)
