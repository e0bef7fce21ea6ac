"""The native decode kernel against attention in float64, for every instruction set that this machine has."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from lanes import EPS, bound, case, reference

from sparing.core.scorer import Softmax
from sparing.kernels import native
from sparing.kernels.attend import attend
from sparing.kernels.compact import CompactStore
from sparing.kernels.native.build import build, compiler
from sparing.kernels.ragged import RaggedStore

if native._library() is None:
    pytest.skip(f"{native.status()}", allow_module_level=True)

BEST = native._library().sparing_best_isa()
SETS = native.INSTRUCTION_SETS[: BEST + 1]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_kernel_is_attention(isa, dtype, dim, group):
    queries, keys, values, starts, lengths, bias = case(dim, group, dtype)
    scaling = dim**-0.5
    for given in (None, bias):
        found, lse = native.ragged_decode(queries, keys, values, starts, lengths, scaling, given, isa)
        expected, expected_lse = reference(queries, keys, values, starts, lengths, scaling, given)
        # bfloat16 outputs are rounded once, at the end: with 8 significant bits, by at most 2^-8 of it.
        rounding = 0.0 if dtype == torch.float32 else 2.0**-8 * float(expected.abs().max())
        assert float((found.double() - expected).abs().max()) <= bound(queries, dim, scaling) + rounding
        assert float((lse.double() - expected_lse).abs().max()) <= bound(queries, dim, scaling)


def test_large_logits_do_not_overflow():
    queries, keys, values, starts, lengths, _ = case(64, 4, torch.float32)
    found, _ = native.ragged_decode(queries * 1e3, keys, values, starts, lengths, 1.0)
    expected, _ = reference(queries * 1e3, keys, values, starts, lengths, 1.0)
    assert bool(found.isfinite().all())
    # Softmax is one-hot here: a value is picked, and only a near tie could pick another.
    assert torch.equal(found[0], values[starts[0]].expand(4, -1))
    assert float((found.double() - expected).abs().max()) < 1e-2


def test_threads_change_nothing():
    queries, keys, values, starts, lengths, _ = case(128, 4, torch.float32)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            outs.append(native.ragged_decode(queries, keys, values, starts, lengths, 0.1)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_it_works_after_a_fork():
    code = """
import os, torch
from sparing.kernels import native
torch.set_num_threads(2)
q, k = torch.randn(2, 4, 64), torch.randn(2000, 64)
at = (torch.tensor([0, 1000]), torch.tensor([1000, 1000]))
first = native.ragged_decode(q, k, k, *at, 0.1)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(native.ragged_decode(q, k, k, *at, 0.1)[0], first) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_what_it_cannot_do_is_known_before():
    q, k = torch.zeros(1, 4, 64), torch.zeros(8, 64)
    assert native.can_decode(q, k, k, 4)
    assert not native.can_decode(q, k, k, 9)
    assert not native.can_decode(q.half(), k.half(), k.half(), 4)
    assert not native.can_decode(q, k, torch.zeros(8, 32), 4)
    assert not native.can_decode(torch.zeros(1, 4, 72), torch.zeros(8, 72), torch.zeros(8, 72), 4)


def test_it_can_be_switched_off_and_says_so():
    code = "from sparing.kernels import native; print(native.status())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SPARING_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "native kernels: off (SPARING_NATIVE=0)"
    assert "on (" in native.status()


def test_without_a_compiler_the_build_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert compiler() is None
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        build()


# -- codes ----------------------------------------------------------------------------------------------------------


def coded_case(bits: int, dim: int, group: int, dtype: torch.dtype, bias: bool):
    """Lanes of pages that are full, thin, empty or missing, with a window behind each; keys have an outlier channel."""
    g = torch.Generator().manual_seed(bits + dim)
    total = 500
    keys, values = (torch.randn(1, 4, total, dim, generator=g) for _ in range(2))
    keys[..., 3] *= 20
    kept = [[torch.arange(n) for n in (500, 300, 64, 130)]]
    biases = torch.randn(1, 4, total, generator=g) if bias else None
    positions = torch.arange(total).expand(1, 4, -1)
    store = RaggedStore.pack(kept, keys.to(dtype), values.to(dtype), positions, None, biases)
    store = CompactStore.pack(store, bits)
    # Lane 1 loses some tokens of every page; lane 3's only page is emptied below.
    slots = [torch.arange(n) for n in store.lengths.tolist()]
    slots[1] = slots[1][slots[1] % 7 > 1]
    store = store.select([slots], None)
    assert store.pages is not None
    store.pages.counts[-1] = 0
    store._held[3] = 0
    return torch.randn(4, group, dim, generator=g).to(dtype), store


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_codes_are_attended_as_what_they_stand_for(isa, bits, dtype, dim, group):
    scaling = dim**-0.5
    for bias in (False, True):
        queries, store = coded_case(bits, dim, group, dtype, bias)
        assert native.can_decode_coded(queries, store)
        found, lse = native.coded_decode(queries, store, scaling, isa)
        # What codes stand for, before it is rounded to the model's precision.
        exact = dataclasses.replace(store, coding=dataclasses.replace(store.coding, dtype=torch.float64))
        assert store.pages is not None
        # Terms of a logit are q_d z_d and q_d s_d c, c < 2^b; each is rounded, and so is each of their D sums.
        size = (store.pages.key_zeros.abs() + store.pages.key_scales * 2**bits) @ queries.float().abs().flatten(0, 1).T
        logit = 2 * dim * EPS * float(size.max()) * scaling
        # Weights err by e^(2δ) - 1 in all, and their sums by n ε; values are below 6.
        bound = 6 * (2 * logit + (4 + 500 / 16) * 2 * EPS)
        rounding = 0.0 if dtype == torch.float32 else 2.0**-8 * 6
        for lane in range(4):
            keys, values = (t.double() for t in exact.lane(lane))
            logits = queries[lane].double() @ keys.T * scaling
            logits = logits if not bias else logits + store.lane_bias(lane)
            expected = logits.softmax(-1) @ values
            assert float((found[lane].double() - expected).abs().max()) <= bound + rounding
            assert float((lse[lane].double() - logits.logsumexp(-1)).abs().max()) <= bound


def test_a_wrong_scale_is_noticed():
    queries, store = coded_case(8, 64, 4, torch.float32, False)
    before, _ = native.coded_decode(queries, store, 0.125)
    store.pages.key_scales[0] *= 1.5
    after, _ = native.coded_decode(queries, store, 0.125)
    assert float((before - after)[0].abs().max()) > 1e-3
    assert torch.equal(before[1:], after[1:])


def test_threads_change_nothing_with_codes():
    queries, store = coded_case(4, 128, 4, torch.float32, False)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(native.coded_decode(queries, store, 0.1)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_what_it_promises_it_can_do(dim):
    """A head of 80 does not fill registers of 16 twice over: the next instruction set has to serve it."""
    queries, keys = torch.randn(1, 4, dim), torch.randn(8, dim)
    assert native.can_decode(queries, keys, keys, 4)
    found, _ = native.ragged_decode(queries, keys, keys, torch.tensor([0]), torch.tensor([8]), 0.1)
    assert torch.allclose(found[0], (queries[0] @ keys.T * 0.1).softmax(-1) @ keys, atol=1e-5)


def test_codes_without_a_kernel_are_attended_in_torch():
    queries, store = coded_case(8, 64, 4, torch.float32, False)
    assert not native.can_decode_coded(queries.double(), store)
    assert not native.can_decode_coded(torch.randn(4, 9, 64), store)
    assert not native.can_decode_coded(queries, CompactStore.pack(store.window, None))
    by_torch = [
        torch.nn.functional.scaled_dot_product_attention(q[None], *(t[None] for t in store.lane(i)), scale=0.1)[0]
        for i, q in enumerate(queries)
    ]
    found = attend(queries.view(1, 16, 1, 64), store, Softmax(0.1)).view(4, 4, 64)
    assert torch.allclose(found, torch.stack(by_torch), atol=1e-5)
