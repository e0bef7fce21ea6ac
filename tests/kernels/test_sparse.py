"""Every way to run a pattern, against dense attention in float64 under the pattern token by token."""

import pytest
import torch

from sparing.core.pattern import Pattern
from sparing.core.scorer import Softmax
from sparing.kernels.sparse import attend_sparse, gather
from sparing.kernels.sparse.partial import attend_part, with_sinks
from tests.core.test_pattern import CASES, pattern

EPS = torch.finfo(torch.float32).eps


def states(p, dtype, kv_heads=1, dim=16, value_dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (p.heads, p.rows, dim), (kv_heads, p.tokens, dim), (kv_heads, p.tokens, value_dim)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def dense(query, keys, values, p, softmax):
    """Outputs and log-sum-exps, float64, head by head."""
    outs, sums = [], []
    for head in range(p.heads):
        kv = head // (p.heads // keys.shape[0])
        logits = query[head].double() @ keys[kv].double().T * softmax.scaling
        if softmax.softcap is not None:
            logits = torch.tanh(logits / softmax.softcap) * softmax.softcap
        logits = logits.masked_fill(~p.may_read(head, torch.arange(p.start, p.tokens)), -torch.inf)
        outs.append(logits.softmax(-1) @ values[kv].double())
        sums.append(logits.logsumexp(-1))
    return torch.stack(outs), torch.stack(sums)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gathered_attention(case, dtype):
    p, softmax = pattern(**CASES[case]), Softmax(0.5)
    given = states(p, dtype)
    out, lse = dense(*given, p, softmax)
    got = gather.attend_gathered(*given, p, softmax)
    # A weighted mean of values below 5 of which each weight is off by some roundings; bfloat16 outputs are rounded at
    # every one of at most three parts.
    tolerance = {torch.float64: 1e-12, torch.float32: 200 * EPS, torch.bfloat16: 3 * 2.0**-8 * 4}[dtype]
    assert float((got.out.double() - out).abs().max()) < tolerance
    assert float((got.lse.double() - lse).abs().max()) < max(tolerance, 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_any_way_gives_the_same(case):
    """Groups of query heads, values of another size, a softcap, sinks; what runs is what the machine offers."""
    p, softmax = pattern(heads=4, **CASES[case]), Softmax(0.5, softcap=3.0, sinks=torch.tensor([-1.0, 0.0, 2.0, 9.0]))
    given = states(p, torch.float32, kv_heads=2, value_dim=32)
    out, lse = dense(*given, p, softmax)
    got = attend_sparse(*given, p, softmax)
    assert float((got.out.double() - out).abs().max()) < 200 * EPS
    assert softmax.sinks is not None
    share = 1 / (1 + torch.exp(softmax.sinks.double()[:, None] - lse))
    assert float((with_sinks(got, softmax).double() - out * share[..., None]).abs().max()) < 200 * EPS


def test_a_block_more_would_be_noticed():
    p = pattern()
    given = states(p, torch.float32)
    other = Pattern(p.tokens, p.start, p.size, torch.ones_like(p.blocks))
    difference = (
        gather.attend_gathered(*given, p, Softmax(0.5)).out - gather.attend_gathered(*given, other, Softmax(0.5)).out
    )
    assert float(difference.abs().max()) > 0.1


def test_gathering_in_parts_changes_nothing(monkeypatch):
    p = pattern(tokens=200, groups=3)
    given = states(p, torch.float64)
    whole = gather.attend_gathered(*given, p, Softmax(0.5)).out
    monkeypatch.setattr(gather, "GATHERED", 1)
    torch.testing.assert_close(gather.attend_gathered(*given, p, Softmax(0.5)).out, whole, atol=1e-14, rtol=0)


def test_large_logits_do_not_overflow():
    p = pattern()
    given = states(p, torch.float32)
    got = gather.attend_gathered(given[0] * 1e4, given[1], given[2], p, Softmax(1.0))
    assert torch.isfinite(got.out).all()


def test_a_masked_part():
    g = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(3, n, 8, generator=g) for n in (4, 10, 10))
    mask = torch.rand(3, 1, 10, generator=g) < 0.5
    mask[..., 0] = True
    logits = (query.double() @ keys.double().mT * 0.3).masked_fill(~mask, -torch.inf)
    got = attend_part(query, keys, values, Softmax(0.3), mask=mask)
    assert float((got.out - logits.softmax(-1) @ values.double()).abs().max()) < 50 * EPS
    assert float((got.lse - logits.logsumexp(-1)).abs().max()) < 50 * EPS


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "keys", "values"])
def test_each_gradient_alone_is_that_of_masked_attention(which):
    """What is gathered for one problem must not be overwritten by the next; the log-sum-exps have gradients too."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 200, 16, generator=generator) for _ in range(3)]
    states[which].requires_grad_()
    on = torch.rand(2, 13, 13, generator=generator) < 0.3
    read = Pattern(200, 0, 16, on, columns=torch.rand(2, 1, 200, generator=generator) < 0.1)
    weights = torch.randn(2, 200, 16, generator=generator)
    mask = torch.stack([read.may_read(head, torch.arange(200)) for head in range(2)])
    query, keys, values = states
    wanted = (query @ keys.mT * 0.25).masked_fill(~mask, -torch.inf).softmax(-1) @ values
    found = gather.attend_gathered(query, keys, values, read, Softmax(0.25)).out
    mine, theirs = (torch.autograd.grad((out * weights).sum(), states[which])[0] for out in (found, wanted))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
