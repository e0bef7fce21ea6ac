"""HyperAttention: the estimator by its equation, unbiased sums, true Gray order, nothing twice, budgets, draws."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from methods.prefill.sparse_calls import EPS, assert_batch_is_rows, logits, random_call, said, tokens
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.hyper_attention import HyperAttention, buckets, estimate


def gray(place):
    return place ^ (place >> 1)


def bucket_by_hand(state, planes):
    """Search for the place whose Gray code is the signs."""
    signs = sum((float(state @ planes[:, r]) > 0) << r for r in range(planes.shape[1]))
    return next(place for place in range(2 ** planes.shape[1]) if gray(place) == signs)


def estimated_by_hand(query, keys, values, planes, places, blocks, softmax):
    """One head in float64, a row and a key at a time: (n, Dv) and (n,)."""
    n, m = len(query), len(keys)
    centred = keys - keys.mean(0)
    rows = sorted(range(n), key=lambda i: (bucket_by_hand(query[i], planes), i))
    order = sorted(range(m), key=lambda j: (bucket_by_hand(centred[j], planes), j))
    out, lse = torch.zeros(n, values.shape[1], dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for block in range(blocks):
        own = range(block * m // blocks, (block + 1) * m // blocks)
        for at in range(block * n // blocks, (block + 1) * n // blocks):
            row, weights = rows[at], []
            for place, share in [(p, 1.0) for p in own] + [(p, m / len(places)) for p in places if p not in own]:
                logit = float(query[row] @ keys[order[place]]) * softmax.scaling
                if softmax.softcap is not None:
                    logit = math.tanh(logit / softmax.softcap) * softmax.softcap
                weights.append((share * math.exp(logit), order[place]))
            total = sum(weight for weight, _ in weights)
            lse[row] = math.log(total)
            out[row] = sum(weight / total * values[j] for weight, j in weights)
    return out, lse


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("n", "m", "blocks", "drawn"), [(24, 24, 3, 5), (10, 37, 4, 9), (33, 20, 6, 1), (12, 30, 5, 0)]
)
def test_the_estimate_is_that_of_the_equation(n, m, blocks, drawn, softcap):
    g = torch.Generator().manual_seed(1)
    query, planes = torch.randn(2, 2, n, 8, generator=g), torch.randn(2, 8, 4, generator=g)
    keys, values = (torch.randn(2, m, 8, generator=g) + 1.0 for _ in range(2))
    places, softmax = torch.randint(m, (2, drawn), generator=g), Softmax(0.4, softcap)
    part = estimate(query, keys, values, planes, places, blocks, softmax)
    for kv, head in itertools.product(range(2), range(2)):
        out, lse = estimated_by_hand(
            query[kv, head].double(), keys[kv].double(), values[kv].double(), planes[kv].double(), places[kv].tolist(),
            blocks, softmax,
        )  # fmt: skip
        bound = 2 * EPS * (8 * 0.4 * float(query.norm(dim=-1).max() * keys.norm(dim=-1).max()) + m)
        assert float((part.lse[kv, head] - lse).abs().max()) <= bound
        assert float((part.out[kv, head] - out).abs().max()) <= bound * float(values.abs().max())


def test_neighbouring_buckets_differ_in_one_sign():
    """All 128 buckets of seven signs: sorted by the bucket, the signs of neighbours differ once."""
    codes = torch.arange(128)
    signs = (codes[:, None] >> torch.arange(7)) & 1
    places = buckets((2.0 * signs - 1)[None], torch.eye(7)[None])[0]
    assert sorted(places.tolist()) == list(range(128))
    ordered = signs[places.argsort()]
    assert ordered.diff(dim=0).abs().sum(-1).eq(1).all()
    published = signs[(codes ^ (codes >> 1)).argsort()]
    assert published.diff(dim=0).abs().sum(-1).max() > 1


def dense(call):
    """Outputs (Hq, Q, Dv) and log-sum-exps in float64."""
    found = logits(call)
    return found.softmax(-1) @ call.values.double().repeat_interleave(call.group, dim=0), found.logsumexp(-1)


@pytest.mark.parametrize("start", [0, 33])
def test_the_denominators_are_right_on_average(start):
    """The mean over 60 seeds of exp(lse) is the true denominator, within five of its own standard errors."""
    call = random_call(96, start, heads=2, kv_heads=1, size=0.5)
    truth, method = dense(call)[1].exp(), HyperAttention(0.4, block=16, min_tokens=16)
    found = torch.stack([replace(method, seed=s).attend(call).part.lse.double().exp() for s in range(60)])
    error = found.std(0) / 60**0.5
    off = (found.mean(0) - truth).abs() / error.clamp_min(1e-4 * truth)
    assert float(off.max()) < 5.0
    assert float((found.std(0) / truth).max()) > 0.05  # the seeds do differ


def test_rows_of_one_bucket_find_the_keys_of_theirs():
    """Keys in opposite directions, and rows along them: each row's block holds its own direction only."""
    directions = torch.cat([torch.eye(4), -torch.eye(4)])
    which = torch.arange(64) % 8
    states = (4.0 * directions[which])[None]
    planes = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    values = torch.nn.functional.one_hot(which, 8).float()[None]
    part = estimate(states[:, None], states, values, planes, torch.zeros(1, 0, dtype=torch.int64), 8, Softmax(0.1))
    torch.testing.assert_close(part.out[0, 0], values[0])


def test_large_buckets_and_large_parts_are_exact():
    call = random_call(150, 37)
    out, lse = dense(call)
    for method in (HyperAttention(1.0, bucket=1000), HyperAttention(1.0, min_tokens=1000)):
        part = method.attend(call).part
        torch.testing.assert_close(part.lse.double(), lse, atol=1e-4, rtol=0)
        torch.testing.assert_close(part.out.double(), out, atol=1e-4, rtol=0)
    assert HyperAttention(1.0).reads_all
    assert not HyperAttention(1.0, bucket=64).reads_all


@pytest.mark.parametrize("keep", [0.15, 0.25, 0.5, 0.8, 60])
@pytest.mark.parametrize(("count", "start"), [(512, 0), (411, 0), (411, 300), (301, 7)])
def test_the_budget_is_honoured_and_used(keep, count, start):
    call, method = random_call(count, start), HyperAttention(keep, block=16)
    attended = method.attend(call)
    spent, allowed = int(attended.pattern.pairs()[0]), method.pairs(call)
    assert torch.equal(attended.pattern.pairs(), method.pattern(call).pairs())
    assert 0.85 * allowed <= spent <= allowed
    assert bool(attended.part.out.isfinite().all())


def test_equal_calls_give_the_same_and_seeds_and_layers_differ():
    call, method = random_call(200), HyperAttention(0.2, block=16)
    one, two = (method.attend(call).part.out for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, HyperAttention(0.2, block=16, seed=1).attend(call).part.out)
    assert not torch.equal(one, method.attend(replace(call, layer=1)).part.out)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    method.attend(call)
    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_are_refused_and_batches_are_rows():
    with pytest.raises(MethodRefusedError, match="hyperattention"):
        said(HyperAttention(0.5, block=16), tokens(128), [64, 64])
    assert_batch_is_rows(HyperAttention(0.5, block=16))


def test_what_is_refused():
    for bad in ({"planes": 0}, {"planes": 63}, {"bucket": 0}, {"samples": -1}, {"min_tokens": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            HyperAttention(**bad)
