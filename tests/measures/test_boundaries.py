"""Where texts fall into parts: features, labels and peaks against plain loops."""

import math

import pytest
import torch

from sparing.core.lens import AttentionCall
from sparing.core.scorer import Softmax
from sparing.measures.boundaries import attention_jumps, best_peaks, cosine_drops, key_features, peaks, scored


def random_keys(count=40, heads=2, dim=8, seed=0):
    return torch.randn(heads, count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [1, 4])
def test_scores_are_sums_over_pairs_of_the_window(window):
    keys, width = random_keys(), 2 * window
    weights = torch.randn(2, width, width, generator=torch.Generator().manual_seed(1))
    found = scored(key_features(keys, window), weights)
    k = keys.double()
    logs = k.norm(dim=-1).log()
    logs = logs - logs.mean(-1, keepdim=True)
    for p in range(40):
        if p < window or p > 40 - window:
            assert found[p] == -torch.inf
            continue
        wanted = 0.0
        for h in range(2):
            for a in range(width):
                wanted += float(weights[h, 0, a] * logs[h, p - window + a])
                for b in range(a + 1, width):
                    one, other = k[h, p - window + a], k[h, p - window + b]
                    wanted += float(weights[h, b - a, a] * (one @ other / one.norm() / other.norm()))
        assert abs(float(found[p]) - wanted) < 1e-4


def test_features_do_not_change_with_where_rotated_keys_stand():
    keys = random_keys(dim=2)
    turned = []
    for shift in (0.0, 100.0):
        angle = (torch.arange(40.0) + shift)[:, None] * 0.3
        first, second = keys[..., :1], keys[..., 1:]
        rotated = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        turned.append(key_features(torch.cat(rotated, dim=-1), 4))
    torch.testing.assert_close(*turned, rtol=0, atol=1e-4)


def test_cosines_drop_where_keys_turn():
    """Equal keys on either side of 17, at right angles across: 1 beside, 0 across."""
    keys = torch.zeros(1, 40, 4)
    keys[:, :17, 0], keys[:, 17:, 1] = 1.0, 3.0
    drops = cosine_drops(key_features(keys, 4), 4)
    assert int(drops.argmax()) == 17
    assert abs(float(drops[17]) - 1.0) < 1e-5
    assert abs(float(drops[30])) < 1e-5


def test_short_texts_have_no_boundary():
    for count in (1, 5, 7):
        keys = random_keys(count)
        assert bool((cosine_drops(key_features(keys, 4), 4) == -torch.inf).all())
        assert best_peaks(cosine_drops(key_features(keys, 4), 4), 8, 3).tolist() == []


def call_of(count, seed=0, heads=4, kv_heads=2, dim=8):
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, heads, count, dim, generator=g) * 2
    keys, values = (torch.randn(1, kv_heads, count, dim, generator=g) for _ in range(2))
    causal = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    return AttentionCall(0, queries, keys, values, Softmax(dim**-0.5), lambda rows: causal[:, :, rows])


@pytest.mark.parametrize(("count", "window"), [(60, 4), (300, 4), (40, 2), (9, 4), (8, 4), (3, 4)])
def test_jumps_are_ratios_of_what_later_rows_pay(count, window):
    call = call_of(count)
    found = attention_jumps(call, window)
    keys = call.keys[0].double().repeat_interleave(2, dim=0)
    mass = call.queries[0].double() @ keys.mT * call.softmax.scaling
    mass = mass.masked_fill(~call.may_see(slice(None))[0], -torch.inf).softmax(-1).mean(0)
    assert found.shape == (count,)
    for p in range(count):
        if p < window or p >= count - window:
            assert float(found[p]) == 0.0
            continue
        past, coming = (float(mass[p + window :, a : a + window].sum()) for a in (p - window, p))
        assert math.isclose(float(found[p]), max(past, coming) / min(past, coming), rel_tol=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distance", [1, 3, 8])
def test_peaks_are_greedy(seed, distance):
    values = torch.randint(0, 30, (70,), generator=torch.Generator().manual_seed(seed)).float()
    values[values < 5] = -torch.inf
    wanted = []
    for p in sorted(range(70), key=lambda p: -float(values[p])):
        if values[p] > -torch.inf and all(abs(p - other) >= distance for other in wanted):
            wanted.append(p)
    assert peaks(values, distance).nonzero()[:, 0].tolist() == sorted(wanted)
    assert best_peaks(values, distance, 3).tolist() == sorted(wanted[:3])
    assert best_peaks(values, distance, 0).tolist() == []
