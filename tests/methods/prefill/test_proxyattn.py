"""ProxyAttn: proxies and shares by the equation, heads that need more get more, bounds and refusals."""

import math
from dataclasses import replace

import pytest
import torch

from methods.prefill.sparse_calls import (
    assert_batch_is_rows,
    assert_budget,
    assert_faithful,
    logits,
    mask_of,
    random_call,
    said,
    tokens,
)
from sparing.core.parsing import parse_method
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.proxyattn import Proxies, ProxyAttn


def proxy_scores(call, groups, stride, size):
    """The equation, a proxy, row and key at a time: [query head][row block][key block]."""
    kv_heads = call.keys.shape[0]
    first, blocks = call.start // size, -(-call.tokens // size)
    scores = torch.zeros(call.heads, blocks - first, blocks, dtype=torch.float64)
    rows = [i for i in range(call.start, call.tokens) if i % stride == 0 or i == call.start]
    for g in range(groups):
        members = [h for h in range(kv_heads) if h * groups // kv_heads == g]
        heads = [h for h in range(call.heads) if h // call.group in members]
        keys = call.keys[members].double().mean(0)[::stride]
        for i in rows:
            query = call.query[heads, i - call.start].double().mean(0)
            found = keys[: i // stride + 1] @ query * call.softmax.scaling
            cap = call.softmax.softcap
            shares = (found if cap is None else cap * torch.tanh(found / cap)).softmax(-1)
            for number, share in enumerate(shares.tolist()):
                at = i // size - first, number * stride // size
                for head in heads:
                    scores[head, at[0], at[1]] = max(float(scores[head, at[0], at[1]]), share)
    return scores


@pytest.mark.parametrize(("count", "start"), [(96, 0), (83, 0), (90, 32), (83, 37), (70, 69), (50, 47)])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 4), (2, 4), (3, 8)])
def test_scores_are_the_equation(count, start, groups, stride):
    call = random_call(count, start, heads=6, kv_heads=3, dim=8, size=2.0)
    found = Proxies(groups, stride).score(call, 16)
    wanted = proxy_scores(call, groups, stride, 16)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_rows_a_few_at_a_time_are_all_rows(monkeypatch):
    call = random_call(200, 37)
    whole = Proxies(2, 4).score(call, 16)
    monkeypatch.setattr("sparing.methods.prefill.proxyattn.ELEMENTS", 300)
    torch.testing.assert_close(Proxies(2, 4).score(call, 16), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("softmax", [Softmax(0.5), Softmax(0.5, softcap=1.5)])
def test_a_proxy_of_a_head_is_the_head(softmax):
    """More groups than heads are as many as heads; every token, so the largest attention of each block is exact."""
    call = replace(random_call(70, heads=3, kv_heads=3, size=3.0), softmax=softmax)
    mass = torch.nn.functional.pad(logits(call).softmax(-1), (0, 10, 0, 10))
    wanted = mass.unflatten(2, (-1, 16)).amax(-1).unflatten(1, (-1, 16)).amax(2)
    torch.testing.assert_close(Proxies(9, 1).score(call, 16).double(), wanted, rtol=1e-4, atol=1e-7)


def test_equal_heads_are_their_proxy():
    call = random_call(96, heads=1, kv_heads=1)
    four = replace(call, query=call.query.repeat(4, 1, 1), keys=call.keys.repeat(2, 1, 1))
    found = Proxies(1, 4).score(four, 16)
    torch.testing.assert_close(found, Proxies(1, 4).score(call, 16).expand(4, -1, -1))


def needed_share(call, head, size, threshold):
    """b_h: the smallest share of all blocks that holds the threshold of what the last block of rows attends to."""
    rows = call.tokens - (call.tokens - 1) // size * size
    mass = logits(call)[head, -rows:].softmax(-1).mean(0)
    blocks = sorted((float(part.sum()) for part in mass.split(size)), reverse=True)
    return min(n for n in range(1, len(blocks) + 1) if sum(blocks[:n]) >= threshold - 1e-9) / len(blocks)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(("count", "start"), [(160, 0), (150, 0), (150, 41)])
def test_heads_read_their_share_of_every_row(threshold, count, start):
    call = random_call(count, start)
    call = replace(call, query=call.query * torch.tensor([0.0, 2.0, 5.0, 20.0])[:, None, None])
    method = ProxyAttn(keep=1.0, block=16, threshold=threshold, least=0)
    blocks = method.pattern(call).blocks
    scores = proxy_scores(call, 1, 4, 16)
    first, different = start // 16, set()
    for head in range(4):
        share = needed_share(call, head, 16, threshold)
        for row in range(blocks.shape[1]):
            own = first + row
            # As many of the best as the share says, the first and the own block being the best of all.
            wanted = math.ceil(share * (own + 1) - 1e-9)
            order = sorted(range(own + 1), key=lambda j: (j not in (0, own), -float(scores[head, row, j])))
            assert {0, own} | set(order[:wanted]) == set(blocks[head, row].nonzero()[:, 0].tolist())
        different.add(share)
    assert len(different) > 1


def test_a_head_that_needs_one_block_leaves_the_budget_to_the_others():
    """Head 0 is sharp: its last rows look at the first token alone. Head 1 looks at everything alike."""
    call = random_call(256, heads=2, kv_heads=1, dim=16)
    keys = torch.zeros(1, 256, 16)
    keys[0, 0, 0] = 1.0
    query = torch.zeros(2, 256, 16)
    query[0, :, 0] = 100.0
    call = replace(call, query=query, keys=keys, softmax=Softmax(1.0))
    density = ProxyAttn(keep=0.5, block=16, least=0).pattern(call).density()
    # First and own block of 16 rows of blocks: 16 triangles of 136 pairs and 15 squares of 256, of 32896 pairs.
    assert abs(float(density[0]) - (16 * 136 + 15 * 256) / 32896) < 1e-9
    assert 0.5 - 256 / 32896 < float(density.mean()) <= 0.5
    assert float(density[1]) > 0.8


def test_every_row_reads_the_least_first():
    """With room for about 3 blocks of each row, a least of 3 leaves nothing to what single heads need."""
    call = random_call(256, heads=2, kv_heads=1, size=6.0)
    for least, counts in ((48, {3}), (40, {3}), (0, None)):
        blocks = ProxyAttn(keep=0.31, block=16, least=least).pattern(call).blocks[:, 3:]
        found = set(blocks.sum(-1).flatten().tolist())
        assert (min(found) >= 3) == (counts is not None)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9, 60])
@pytest.mark.parametrize(("count", "start"), [(256, 0), (250, 0), (301, 77)])
@pytest.mark.parametrize("least", [0, 2048])
def test_the_budget_is_honoured_and_used(keep, count, start, least):
    call = random_call(count, start, size=2.0)
    method = ProxyAttn(keep=keep, block=16, least=least)
    assert_budget(method, call, unused=16 * 16)
    assert_faithful(method, call)


def test_everything_is_read_at_one():
    call = random_call(150)
    assert bool((mask_of(ProxyAttn(keep=1.0, block=16).pattern(call)) == (logits(call) > -torch.inf)).all())
    assert ProxyAttn(keep=1.0).reads_all
    assert ProxyAttn(keep=1.0, threshold=1.0).reads_all
    sharp = random_call(150, size=30.0)
    assert bool((ProxyAttn(keep=1.0, block=16, threshold=1.0, least=0).pattern(sharp).density() == 1).all())
    assert not ProxyAttn(keep=1.0, threshold=0.95).reads_all


def test_chunks_are_refused():
    """Budgets come from the prompt's last rows."""
    method, ids = ProxyAttn(keep=0.5, block=16), tokens(100)
    assert float((said(method, ids, [100]) - said(ProxyAttn(1.0), ids, [100])).abs().max()) > 0.01
    with pytest.raises(MethodRefusedError, match="read the prompt at once"):
        said(method, ids, [32, 68])


def test_a_padded_batch_is_its_rows():
    assert_batch_is_rows(ProxyAttn(keep=0.5, block=16))


def test_the_papers_numbers_text_and_what_is_refused():
    method = ProxyAttn()
    assert (method.groups, method.stride, method.threshold, method.least, method.block) == (1, 4, None, 2048, 128)
    assert parse_method("proxyattn(threshold=0.9,groups=4)", 0.5) == ProxyAttn(0.5, groups=4, threshold=0.9)
    for bad in ({"stride": 3}, {"stride": 0}, {"groups": 0}, {"threshold": 0.0}, {"least": -1}):
        with pytest.raises(InvalidInputError, match="mass" if "threshold" in bad else next(iter(bad))):
            ProxyAttn(**bad)
    with pytest.raises(InvalidInputError, match="stride"):
        Proxies(1, 5).score(random_call(64), 16)
