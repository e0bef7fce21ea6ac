"""ThinK against its equation, and on patterns worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import EPS, build, random_case

from sparing import KeyDiff, ThinK, use
from sparing.core.parsing import parse_method
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.kernels import compact
from sparing.kernels.attend import attend
from sparing.kernels.compact import CompactStore
from sparing.kernels.ragged import RaggedStore
from sparing.measures.attention import window_rows
from sparing.methods.kv.snapkv import WindowAttention
from sparing.methods.kv.think import ThinKeys, channel_scores
from sparing.testing import Driver, random_prompt, tiny_model


def oracle(case, window: int, kept: list) -> list:
    """Score[b][h][i]: the Frobenius norms of the outer products of query and key columns, added over the group."""
    q, k = case.queries.states.double().tolist(), case.stored.keys.double().tolist()
    rows, heads, kv_heads = len(q), len(q[0]), len(k[0])
    scores = []
    for b in range(rows):
        last = [i for i in range(case.tokens - window, case.tokens) if i >= int(case.stored.pads[b])]
        scores.append([])
        for h in range(kv_heads):
            scores[b].append([])
            for d in range(len(k[0][0][0])):
                total = 0.0
                for g in range(heads // kv_heads):
                    query = q[b][h * (heads // kv_heads) + g]
                    total += sum((query[i][d] * k[b][h][j][d]) ** 2 for i in last for j in kept[b][h]) ** 0.5
                scores[b][h].append(total)
    return scores


@pytest.mark.parametrize("sizes", [[13], [6, 7], [1] * 13, [11, 2]], ids=str)
def test_equals_the_equation(sizes):
    case = random_case()
    kept = [
        [[j for j in range(13) if j >= int(case.stored.pads[b]) and (j + h) % 3] for h in range(2)] for b in range(3)
    ]
    mask = torch.zeros(3, 2, 13, dtype=torch.bool)
    for b in range(3):
        for h in range(2):
            mask[b, h, kept[b][h]] = True
    state, scorer = None, ThinKeys(WindowAttention(window=4), window=5)
    for queries, stored in case.chunks(sizes):
        state = scorer.observe(state, queries, stored)
    found = channel_scores(state[1], case.stored, mask)
    wanted = torch.tensor(oracle(case, 5, kept))
    # Sums of up to 13 squares and a product of two roots, each in float32.
    torch.testing.assert_close(found.double(), wanted.double(), atol=0, rtol=40 * EPS)
    chosen = scorer.choose_channels(state, case.stored, mask)
    assert chosen.shape == (3, 2, 4)  # the whole channels in 0.6 of 8
    for b in range(3):
        for h in range(2):
            best = sorted(range(8), key=lambda d: -wanted[b, h, d].item())[:4]
            assert chosen[b, h].tolist() == sorted(best)


def test_tokens_are_those_of_the_other_scorer():
    case = random_case()
    wrapped = case.score(ThinKeys(WindowAttention(4, 3)), [6, 7])
    assert torch.equal(wrapped, case.score(WindowAttention(4, 3), [6, 7]))
    assert ThinKeys(WindowAttention(4)).protects(9) == (0, 4)


def planted():
    """Channel 2 has the largest keys, but no query looks at it; queries look at channels 1 and 5, and a bit at 0."""
    keys = torch.full((1, 1, 40, 8), 0.01)
    keys[..., 2] = 9.0
    keys[..., [0, 1, 5]] = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    queries = torch.zeros(1, 2, 40, 8)
    queries[..., 1], queries[..., 5], queries[..., 0] = 2.0, -3.0, 0.1
    return build(queries, keys, softmax=Softmax(1.0))


def test_what_no_query_needs_goes_however_large_it_is():
    case = planted()
    scorer = ThinKeys(WindowAttention(window=4), channels=0.4)
    state = scorer.observe(None, case.queries, case.stored)
    assert scorer.choose_channels(state, case.stored, case.stored.valid).tolist() == [[[0, 1, 5]]]


def thin_store(channels: torch.Tensor, bias: bool):
    g = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, 24, 8, generator=g, dtype=torch.float64) for _ in range(2))
    biases = torch.randn(1, 2, 24, generator=g) if bias else None
    kept = [[torch.arange(24), torch.arange(0, 24, 2)]]
    store = RaggedStore.pack(kept, keys, values, torch.arange(24).expand(1, 2, -1), None, biases)
    return CompactStore.pack(store, None, channels)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_is_that_with_the_pruned_channels_of_old_keys_at_zero(new, bias, monkeypatch):
    monkeypatch.setattr(compact, "PAGE", 4)
    monkeypatch.setattr(compact, "RECENT", 3)
    channels = torch.tensor([[[0, 3, 6], [1, 2, 7]]])
    store = thin_store(channels, bias)
    store = store.select([[torch.tensor([i for i in range(24) if i % 5]), torch.arange(12)]], None)  # thin pages too
    g = torch.Generator().manual_seed(2)
    tokens = torch.randn(1, 2, new, 8, generator=g, dtype=torch.float64)
    store.append(tokens, tokens, 24)
    query = torch.randn(1, 4, new, 8, generator=g, dtype=torch.float64)
    found = attend(query, store, Softmax(0.5))
    for h in range(4):
        lane = h // 2
        keys, values = store.lane(lane)
        gone = [d for d in range(8) if d not in channels[0, lane].tolist()]
        old = len(keys) - int(store.window.lengths[lane])
        assert not keys[:old, gone].any()
        assert bool((keys[old:, gone] != 0).all())
        for i in range(new):
            seen = len(keys) - (new - 1 - i)
            logits = torch.tensor([sum(float(query[0, h, i, d] * k[d]) for d in range(8)) * 0.5 for k in keys[:seen]])
            logits = logits.double() + (store.lane_bias(lane)[:seen] if bias else 0.0)
            wanted = logits.softmax(0) @ values[:seen]
            torch.testing.assert_close(found[0, h, i], wanted, atol=1e-6, rtol=0)


def test_the_bytes_of_the_channels_are_freed():
    """320 tokens: of 288 in pages, half the channels of the keys; 32 in the window."""
    model, prompt = tiny_model("llama", head_dim=64), random_prompt(320)
    held = {}
    for channels in (1.0, 0.5):
        with use(model, ThinK(1.0, channels=channels)) as session:
            driver = Driver(model, session.new_cache())
            driver.read(prompt)
            held[channels] = session.report().bytes_kept
    pages, lanes = (320 - compact.RECENT) // compact.PAGE * compact.PAGE, 4
    numbers = 32 - 64  # channels that each lane holds: int64 numbers of them
    assert held[1.0] - held[0.5] == lanes * (pages * 32 * 4 + 8 * -numbers)


def test_it_composes_with_codes_and_other_scorers():
    assert parse_method("think(channels=0.5,bits=4)", 0.3) == ThinK(0.3, channels=0.5, bits=4)
    other = ThinK(0.3, scorer=KeyDiff().parts().scorer)
    assert not other.parts().scorer.comparable_across_heads
    assert other.is_compact
    assert not replace(other, keep=1.0).keeps_all


def test_the_window_of_queries_is_the_last_rows():
    case = random_case()
    scorer = ThinKeys(WindowAttention(), window=3)
    state = None
    for queries, stored in case.chunks([5, 8]):
        state = scorer.observe(state, queries, stored)
    assert torch.equal(state[1].states, window_rows(None, case.queries, 3).states)


@pytest.mark.parametrize(
    "bad", [{"channels": 0.0}, {"channels": 1.1}, {"channels": float("nan")}, {"window": 0}], ids=str
)
def test_bad_fields_are_refused(bad):
    with pytest.raises(InvalidInputError):
        ThinK(0.5, **bad)
