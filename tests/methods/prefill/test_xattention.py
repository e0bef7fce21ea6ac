"""XAttention: antidiagonals by the equation, lines that are always found, shares that are met."""

from dataclasses import replace

import pytest
import torch

from methods.prefill.sparse_calls import (
    assert_batch_is_rows,
    assert_budget,
    assert_faithful,
    logits,
    mask_of,
    part_of,
    random_call,
    said,
    tokens,
)
from sparing.core.parsing import parse_method
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.xattention import Antidiagonals, XAttention


def tile_logits(call, stride):
    """[head][row tile][key tile] mean over the antidiagonal of what is there and may be seen, a pair at a time."""
    q, k = call.query.double(), call.keys.double()
    first, last = call.start // stride, -(-call.tokens // stride)
    table = []
    for head in range(call.heads):
        rows = []
        for r in range(first, last):
            row = []
            for c in range(r + 1):
                width = min(call.tokens - r * stride, stride) if c == r else stride
                pairs = [(r * stride + width - 1 - t, c * stride + t) for t in range(width)]
                pairs = [(i, j) for i, j in pairs if call.start <= i < call.tokens and j <= i]
                products = [float(q[head, i - call.start] @ k[head // call.group, j]) for i, j in pairs]
                row.append(sum(products) / len(products) * call.softmax.scaling)
            rows.append(torch.tensor(row, dtype=torch.float64))
        table.append(rows)
    return table


def block_scores(call, stride, size):
    """The equation: softmax over tiles, summed over blocks."""
    first = call.start // size
    scores = torch.zeros(call.heads, -(-call.tokens // size) - first, -(-call.tokens // size), dtype=torch.float64)
    for head, rows in enumerate(tile_logits(call, stride)):
        for number, row in enumerate(rows):
            block = (call.start // stride + number) * stride // size - first
            cap = call.softmax.softcap
            shares = (row if cap is None else cap * torch.tanh(row / cap)).softmax(-1)
            for c, share in enumerate(shares.tolist()):
                scores[head, block, c * stride // size] += share
    return scores


@pytest.mark.parametrize(("count", "start"), [(64, 0), (75, 0), (65, 0), (80, 32), (83, 37), (70, 69), (49, 47)])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_scores_are_the_equation(count, start, stride):
    size = 24 if stride == 3 else 16
    call = random_call(count, start, dim=8, size=2.0)
    found = Antidiagonals(stride).score(call, size)
    assert found.dtype == torch.float32
    wanted = block_scores(call, stride, size)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_rows_a_few_at_a_time_are_all_rows(monkeypatch):
    call = random_call(200, 37)
    whole = Antidiagonals(8).score(call, 16)
    monkeypatch.setattr("sparing.methods.prefill.xattention.ELEMENTS", 1)
    torch.testing.assert_close(Antidiagonals(8).score(call, 16), whole, rtol=1e-5, atol=1e-6)


def test_tiles_of_one_token_are_exact_and_capped_logits_too():
    for softmax in (Softmax(0.5), Softmax(0.5, softcap=1.5)):
        call = replace(random_call(70), softmax=softmax)
        mass = logits(call).softmax(-1)
        blocks = torch.nn.functional.pad(mass, (0, 10, 0, 10)).unflatten(2, (-1, 16)).sum(-1)
        wanted = blocks.unflatten(1, (-1, 16)).sum(2)
        torch.testing.assert_close(Antidiagonals(1).score(call, 16).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("line", ["vertical", "slash"])
def test_a_planted_line_is_found_wherever_it_lies(line):
    """Key 37 (or the key 53 before it) of every row has the logit 40, all others 0; block 2 (or d - 3, d - 4) holds it.

    A tile with the line has a mean of 40 / 8 = 5 on its antidiagonal: e^5 = 148 times what a tile without it has. Of at
    most 18 tiles in a row, the line's hold at least 148 / (148 + 17) = 0.89. The diagonal line is in two tiles of each
    row of tiles, of which one may lie beyond the antidiagonal's pairs; both blocks are read if they hold any of it.
    """
    count, dim = 144, 144
    query, keys = torch.zeros(1, count, dim), torch.eye(dim)[None] * 8.0
    for row in range(count):
        key = 37 if line == "vertical" else row - 53
        if 0 <= key <= row:
            query[0, row, key] = 5.0
    call = replace(random_call(count, heads=1, kv_heads=1, dim=dim), query=query, keys=keys, softmax=Softmax(1.0))
    pattern = XAttention(keep=1.0, block=16, stride=8, threshold=0.85).pattern(call)
    mask = mask_of(pattern)[0]
    assert all(bool(mask[row, key]) for row, key in query[0].nonzero().tolist())
    assert float(pattern.density()) < 0.6


def test_pairs_after_their_row_are_not_counted():
    """Key i + 1 fits row i, which may not read it: what may be read is 0, so all tiles before a row are alike."""
    dim = 64
    query, keys = torch.eye(dim)[None].roll(1, -1) * 9.0, torch.eye(dim)[None] * 9.0
    query[0, -1] = 0.0
    call = replace(random_call(dim, heads=1, kv_heads=1, dim=dim), query=query, keys=keys, softmax=Softmax(1.0))
    scores = Antidiagonals(4).score(call, 16)[0]
    for row in range(4):
        own = sum((t + 1) / (4 * row + t + 1) for t in range(4))  # of row r of tiles, t + 1 of r + 1 are in its block
        assert abs(float(scores[row, row]) - own) < 1e-5


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9, 60])
@pytest.mark.parametrize(("count", "start"), [(256, 0), (250, 0), (301, 77)])
def test_the_budget_is_honoured_and_used(keep, count, start):
    call = random_call(count, start, size=2.0)
    method = XAttention(keep=keep, block=16, stride=4)
    assert_budget(method, call, unused=16 * 16)
    assert_faithful(method, call)


def test_everything_is_read_at_one():
    call = random_call(150)
    assert bool((mask_of(XAttention(keep=1.0, block=16).pattern(call)) == (logits(call) > -torch.inf)).all())
    assert XAttention(keep=1.0, block=16).reads_all
    assert XAttention(keep=1.0, block=16, threshold=1.0).reads_all
    sharp = random_call(150, size=30.0)  # shares of many blocks are 0 in float32
    assert bool((XAttention(keep=1.0, block=16, threshold=1.0).pattern(sharp).density() == 1).all())
    assert not XAttention(keep=1.0, block=16, threshold=0.9).reads_all


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_rows_read_the_least_that_holds_the_share(threshold):
    """The crossing block is included, the first and the own block count; without its worst block a row has less."""
    call = random_call(256, size=4.0)
    blocks = XAttention(keep=1.0, block=16, stride=4, threshold=threshold).pattern(call).blocks
    scores = block_scores(call, 4, 16)
    shares = scores / scores.sum(-1, keepdim=True)
    read, free = 0, 0
    for head in range(4):
        for row in range(16):
            chosen = [j for j in range(row + 1) if blocks[head, row, j]]
            assert {0, row} <= set(chosen)
            held = float(shares[head, row, chosen].sum())
            assert held >= threshold - 1e-5
            extra = [j for j in chosen if j not in (0, row)]
            if extra:
                assert held - float(shares[head, row, extra].min()) < threshold + 1e-5
            read, free = read + len(extra), free + max(row - 1, 0)
    assert 0 < read < free


def test_keep_is_the_most_that_a_threshold_takes():
    call = random_call(256)
    tight = XAttention(keep=0.4, block=16, stride=4, threshold=0.99)
    assert torch.equal(tight.pattern(call).blocks, replace(tight, threshold=None).pattern(call).blocks)
    assert float(tight.pattern(call).density().mean()) <= 0.4


def test_chunks_are_refused():
    """The share that fits the budget is the same for all rows, so it takes all of them to know it."""
    method, ids = XAttention(keep=0.5, block=16, stride=4), tokens(100)
    assert float((said(method, ids, [100]) - said(XAttention(1.0), ids, [100])).abs().max()) > 0.01
    with pytest.raises(MethodRefusedError, match="read the prompt at once"):
        said(method, ids, [32, 68])


def test_a_chunk_scores_as_the_whole_does():
    call = random_call(200)
    whole = Antidiagonals(8).score(call, 16)
    part = Antidiagonals(8).score(part_of(call, 64, 160), 16)
    torch.testing.assert_close(part, whole[:, 4:10, :10], rtol=1e-5, atol=1e-6)


def test_a_padded_batch_is_its_rows():
    assert_batch_is_rows(XAttention(keep=0.5, block=16, stride=4))


def test_the_papers_numbers_text_and_what_is_refused():
    assert (XAttention().stride, XAttention().block, XAttention().threshold) == (16, 128, None)
    assert parse_method("xattention(threshold=0.9,block=32)", 0.5) == XAttention(0.5, 32, 16, 0.9)
    for bad in ({"stride": 3}, {"stride": 0}, {"threshold": 0.0}, {"threshold": 1.5}, {"block": 20}):
        with pytest.raises(InvalidInputError, match="mass" if "threshold" in bad else next(iter(bad))):
            XAttention(**bad)
    with pytest.raises(InvalidInputError, match="stride"):
        Antidiagonals(5).score(random_call(64), 16)
