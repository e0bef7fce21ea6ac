"""Numbers about rows of attention, watching rows, and uniform attention from prefix sums, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.core.lens import AttentionCall
from sparing.core.scorer import Softmax
from sparing.measures import attention as tiles
from sparing.measures.attention import attention_rows
from sparing.measures.batches import pad_left
from sparing.measures.heads import distances, focus, mean_distance, row_mean
from sparing.measures.uniform import uniform_attention
from sparing.measures.watching import watch_rows
from sparing.testing import tiny_model

HEADS, KV_HEADS = 4, 2


def call_of(seen, values=None, dtype=torch.float64, dim=8, seed=0):
    """A call whose rows see what the (B, T, S) pattern says."""
    batch, rows, stored = seen.shape
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, HEADS, rows, dim, generator=g, dtype=torch.float64).to(dtype)
    keys = torch.randn(batch, KV_HEADS, stored, dim, generator=g, dtype=torch.float64).to(dtype)
    if values is None:
        values = torch.randn(batch, KV_HEADS, stored, 6, generator=g, dtype=torch.float64)
    return AttentionCall(0, queries, keys, values.to(dtype), Softmax(dim**-0.5), lambda part: seen[:, None, part])


def causal(rows, stored, batch=1):
    at = torch.arange(stored - rows, stored)
    return (torch.arange(stored) <= at[:, None]).expand(batch, -1, -1)


def windowed(rows, window):
    at = torch.arange(rows)
    return causal(rows, rows) & (torch.arange(rows) > at[:, None] - window)


def padded(rows, pads):
    """A row of the batch for each number of left pads; pads see nothing."""
    real = torch.arange(rows) >= torch.tensor(pads)[:, None]
    return causal(rows, rows, len(pads)) & real[:, None, :] & real[:, :, None]


# What rows may see. The last is no run of neighbouring keys.
PATTERNS = {
    "causal": causal(40, 40),
    "decoding": causal(3, 40),
    "one key": causal(1, 1),
    "window": windowed(40, 7),
    "pads": padded(40, (0, 13, 39)),
    "pads and window": padded(40, (0, 13, 39)) & windowed(40, 7),
    "more than a tile": causal(300, 300),
    "strided": causal(40, 40) & (torch.arange(40) % 3 == 0),
}


def means(call, seen):
    """(B, T, Hq, Dv): every row's plain mean of what it sees."""
    batch, heads, rows = call.queries.shape[:3]
    out = torch.zeros(batch, rows, heads, call.values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for t in range(rows):
            for head in range(heads):
                kv = head // (heads // call.values.shape[1])
                visible = call.values[b, kv][seen[b, t]].double()
                if len(visible):
                    out[b, t, head] = visible.mean(0)
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
def test_uniform_attention_is_the_mean_of_what_is_seen(pattern):
    seen = PATTERNS[pattern]
    call = call_of(seen)
    found = uniform_attention(call)
    # A prefix sum of n values of size up to 4 is off by n · 4 · 2^-53, and n is at most 300.
    torch.testing.assert_close(found, means(call, seen), atol=4 * 300 * 2.0**-53 * 2, rtol=0)


def test_it_is_the_cumulative_mean_bit_for_bit_where_sums_are_exact():
    """Whole numbers add up exactly, so nothing is left to rounding but the division."""
    values = torch.randint(-50, 50, (1, KV_HEADS, 200, 6), generator=torch.Generator().manual_seed(1)).double()
    found = uniform_attention(call_of(causal(200, 200), values))
    expected = values.cumsum(2) / torch.arange(1, 201)[:, None]
    for head in range(HEADS):
        assert torch.equal(found[:, :, head], expected[:, head // 2])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_attention_with_queries_of_zero(pattern):
    call = call_of(PATTERNS[pattern])
    blank = AttentionCall(0, call.queries * 0, call.keys, call.values, call.softmax, call.may_see)
    values = call.values.repeat_interleave(HEADS // KV_HEADS, dim=1)
    expected = (attention_rows(blank) @ values).transpose(1, 2)
    torch.testing.assert_close(uniform_attention(call), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_values_are_added_in_float64(dtype):
    """A mean of 3000 numbers near 1000 keeps every digit of the dtype; sums in the dtype would not."""
    values = 1000 + torch.randn(1, 1, 3000, 2, generator=torch.Generator().manual_seed(2))
    seen = causal(3000, 3000)
    call = call_of(seen, values, dtype)
    found = uniform_attention(call)
    assert found.dtype == dtype
    exact = (call.values.double().cumsum(2) / torch.arange(1, 3001)[:, None])[0, 0]
    assert torch.equal(found[0, :, 0], exact.to(dtype))


def test_distances_count_from_the_stored_tokens():
    call = call_of(causal(3, 5))
    assert distances(call, slice(0, 3)).tolist() == [[2, 1, 0, -1, -2], [3, 2, 1, 0, -1], [4, 3, 2, 1, 0]]
    assert distances(call, slice(2, 3)).tolist() == [[4, 3, 2, 1, 0]]


def test_mean_distance_worked_by_hand():
    call = call_of(causal(3, 5))
    row = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1]).double()  # 4, 3, 2, 1 and 0 back from the last row
    attention = row.expand(1, HEADS, 1, 5)
    last = slice(2, 3)
    assert mean_distance(call, last, attention).flatten().tolist() == pytest.approx([2.4] * HEADS)
    assert mean_distance(call, last, attention, clip=2).flatten().tolist() == pytest.approx([1.6] * HEADS)
    assert mean_distance(call, last, attention, clip=0).flatten().tolist() == [0] * HEADS


def test_focus_worked_by_hand():
    call = call_of(causal(4, 4))
    rows = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0]]).double()
    found = focus(call, slice(0, 4), rows.expand(1, HEADS, 4, 4))[0, 0]
    assert math.isnan(found[0]), "a row that sees one key can do nothing else"
    assert found[1:].tolist() == pytest.approx([0, 1, 0.5])


def test_focus_is_over_the_keys_if_a_sink_takes_part_of_the_row():
    call = call_of(causal(4, 4))
    rows = torch.full((1, HEADS, 1, 4), 0.05, dtype=torch.float64)
    assert focus(call, slice(3, 4), rows).abs().max() < 1e-12
    assert focus(call, slice(3, 4), rows * torch.tensor([1.0, 0, 0, 0])).flatten().tolist() == [1] * HEADS


def test_focus_of_pads_is_nan():
    seen = padded(5, (3,))
    call = call_of(seen)
    found = focus(call, slice(0, 5), attention_rows(call))[0, 0]
    assert found.isnan().tolist() == [True, True, True, True, False]


def test_row_means_leave_out_what_is_not_counted_and_nan():
    values = torch.tensor([[[1.0, 2.0, math.nan, 4.0], [1.0, 1.0, 1.0, 7.0]]]).expand(2, -1, -1)
    counted = torch.tensor([[True, False, True, True], [False, False, False, False]])
    found = row_mean(values, counted)
    assert found[0].tolist() == [2.5, 3.0]
    assert found[1].isnan().all(), "nothing is counted"


@pytest.mark.parametrize("height", [1, 7, 128])
def test_every_row_of_every_layer_is_watched_once(monkeypatch, height):
    monkeypatch.setattr(tiles, "ROWS_PER_TILE", height)
    model = tiny_model("llama")
    ids, mask = pad_left([list(range(1, 31)), list(range(1, 24))])
    visits = torch.zeros(2, 30)

    def number(call, rows, attention):
        assert attention.shape == (2, HEADS, rows.stop - rows.start, 30)
        visits[call.layer, rows] += 1
        at = torch.arange(rows.start, rows.stop).float()
        return (10 * call.layer + at).expand(2, HEADS, -1) + attention.sum(-1)

    found = watch_rows(ModelLens(model), ids, mask, number)
    assert torch.equal(visits, torch.ones(2, 30))
    expected = torch.arange(30) + 10 * torch.arange(2)[:, None] + 1.0
    assert torch.allclose(found[:, 0], expected[:, None].expand(-1, HEADS, -1))
    pads = torch.arange(30) < 7  # rows of pads see nothing
    assert torch.allclose(found[:, 1], (expected - pads.float())[:, None].expand(-1, HEADS, -1))


def test_watching_leaves_a_model_as_it_was():
    model = tiny_model("gpt2")
    ids, mask = pad_left([list(range(1, 31))])
    before = model(ids).logits
    watch_rows(ModelLens(model), ids, mask, mean_distance)
    assert torch.equal(model(ids).logits, before)
