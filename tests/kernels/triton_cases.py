"""The Triton decode kernel against attention in float64: on the GPU if there is one, else in Triton's interpreter.

Not collected by itself: test_triton.py runs it in a process of its own, since what triton compiles or interprets is
settled when it is first imported.
"""

import pytest
import torch
from lanes import EPS, bound, case, reference

from sparing.core.scorer import Softmax
from sparing.kernels import attend as attending
from sparing.kernels import native, triton_decode
from sparing.kernels.ragged import RaggedStore
from sparing.kernels.triton_decode import can_decode, ragged_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half a unit in the last place of what weights, and then outputs, are rounded to.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """triton 3.9's interpreter multiplies matrices of bfloat16 as the integers that their bits are: widen them."""
    if DEVICE == "cuda":
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def dot(self, a, b, *others):
        a, b = (self.create_fp_ext(t, float32) if t.dtype.scalar == bfloat16 else t for t in (a, b))
        return multiply(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def put(*tensors):
    return [t.to(DEVICE) for t in tensors]


def check(given, scaling, found, lse, exact):
    queries, _, values, _, lengths, _ = given
    expected, expected_lse = reference(*given[:5], scaling, given[5])
    rounding = ROUNDING[queries.dtype]
    largest = float(values[values.isfinite()].abs().max())
    # A weight (≤ 1, the largest = 1) and an output are rounded once each; small weights of float16 are subnormal.
    rounded = 2 * rounding * largest
    if queries.dtype == torch.float16:
        rounded += 2.0**-25 * int(lengths.max()) * largest
    assert float((found.cpu().double() - expected).abs().max()) <= exact + rounded
    assert float((lse.cpu().double() - expected_lse).abs().max()) <= exact


@pytest.mark.parametrize(("splits", "biased"), [(1, False), (4, True)])
@pytest.mark.parametrize(
    ("dtype", "dim", "width", "group"),
    [
        (torch.float32, 16, 16, 1), (torch.float32, 64, 64, 4), (torch.float32, 64, 32, 17),
        (torch.bfloat16, 64, 64, 4), (torch.bfloat16, 128, 128, 8), (torch.bfloat16, 80, 96, 7),
        (torch.float16, 256, 256, 1),
    ],
    ids=str,
)  # fmt: skip
def test_the_kernel_is_attention(dtype, dim, width, group, splits, biased):
    queries, keys, _, starts, lengths, bias = case(dim, group, dtype)
    values = case(width, group, dtype, seed=1)[2]
    given = (queries, keys, values, starts, lengths, bias if biased else None)
    on_device = put(queries, keys, values, starts, lengths)
    found, lse = ragged_decode(*on_device, dim**-0.5, bias.to(DEVICE) if biased else None, splits)
    assert found.dtype == dtype
    check(given, dim**-0.5, found, lse, bound(queries, dim, dim**-0.5))


def test_a_wrong_length_is_noticed():
    """The bound is not so wide that a token more or less would pass."""
    queries, keys, values, starts, lengths, _ = given = case(64, 4, torch.bfloat16)
    shorter = lengths - (lengths > 1).long()
    found, lse = ragged_decode(*put(queries, keys, values, starts, shorter), 0.125, None, 4)
    with pytest.raises(AssertionError):
        check((*given[:5], None), 0.125, found, lse, bound(queries, 64, 0.125))


def test_large_logits_do_not_overflow():
    queries, keys, values, starts, lengths, _ = case(64, 4, torch.float32)
    found, _ = ragged_decode(*put(queries * 1e3, keys, values, starts, lengths), 1.0, None, 4)
    expected, _ = reference(queries * 1e3, keys, values, starts, lengths, 1.0)
    assert bool(found.isfinite().all())
    assert torch.equal(found[0].cpu(), values[starts[0]].expand(4, -1))
    assert float((found.cpu().double() - expected).abs().max()) < 1e-2


def test_pieces_that_a_bias_forbids_are_left_out():
    """All tokens of the first piece, and of the first block of the second, at -inf."""
    queries, keys, values, starts, lengths, bias = case(64, 4, torch.float32)
    bias[starts[-1] : starts[-1] + 256 + 64] = -torch.inf
    found, lse = ragged_decode(*put(queries, keys, values, starts, lengths), 0.125, bias.to(DEVICE), 4)
    check((queries, keys, values, starts, lengths, bias), 0.125, found, lse, bound(queries, 64, 0.125))


def test_what_it_cannot_do_is_known_before():
    q, k = torch.zeros(1, 4, 64), torch.zeros(8, 64)
    assert can_decode(q, k, k, 4)
    assert can_decode(q.half(), k.half(), k.half(), 32)
    assert not can_decode(q, k, k, 33)
    assert not can_decode(q.double(), k.double(), k.double(), 4)
    assert not can_decode(q, k.half(), k.half(), 4)
    assert not can_decode(q, k, torch.zeros(8, 257), 4)


def test_no_length_is_compiled_in(monkeypatch):
    """Launches over other lengths differ in tensors only."""
    launches = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                scalars = [a for a in arguments if not isinstance(a, torch.Tensor)]
                launches[-1].append((grid, scalars, constants))
                self.kernel[grid](*arguments, **constants)

            return launch

    for name in ("_attend_pieces", "_merge_pieces"):
        monkeypatch.setattr(triton_decode, name, Recorded(getattr(triton_decode, name)))
    queries, keys, values, starts, lengths, _ = put(*case(16, 2, torch.float32))
    for given in (lengths, (lengths + 1) // 2, torch.ones_like(lengths)):
        launches.append([])
        ragged_decode(queries, keys, values, starts, given, 0.25)
    assert len(launches[0]) == 2
    assert launches[0] == launches[1] == launches[2]


def test_few_lanes_are_split_and_many_are_not(monkeypatch):
    monkeypatch.setattr(triton_decode, "_multiprocessors", lambda device: 132)
    device = torch.device(DEVICE)
    assert [triton_decode._splits(lanes, device) for lanes in (1, 8, 9, 64, 528, 5000)] == [64, 64, 64, 16, 1, 1]


def test_uneven_lanes_are_attended_by_it(monkeypatch):
    """Through `attend`, over a store that grew; even lanes, several tokens and gradients go to torch."""
    monkeypatch.setattr(attending, "GPUS", (DEVICE,))
    monkeypatch.setattr(native, "can_decode", lambda *_: False)
    calls = []
    monkeypatch.setattr(triton_decode, "ragged_decode", lambda *a: calls.append(1) or ragged_decode(*a))
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 300), (2, 300), (8, 2))
    keys, values, query = put(*(torch.randn(2, heads, n, 32, generator=g) for heads, n in sizes))
    positions = torch.arange(300, device=DEVICE).expand(2, 2, -1)
    lengths = [300, 7, 130, 1]
    kept = [[torch.arange(n) for n in lengths[:2]], [torch.arange(n) for n in lengths[2:]]]
    for bias in (None, torch.randn(2, 2, 300, generator=g).to(DEVICE)):
        store = RaggedStore.pack(kept, keys, values, positions, None, bias)
        store.append(keys[:, :, :1], values[:, :, :1], 300)
        found = attending.attend(query[:, :, :1], store, Softmax(0.2))
        for lane in range(4):
            own, value = store.lane(lane)
            logits = query[:, :, :1].reshape(4, 4, 32)[lane].double() @ own.double().T * 0.2
            logits = logits if bias is None else logits + store.lane_bias(lane)
            error = found.reshape(4, 4, 32)[lane].double() - logits.softmax(-1) @ value.double()
            # As `bound`: logits of |q||k| below 4 D, off by D ε each; sums of 300 exponentials; values below 6.
            assert float(error.abs().max()) <= 6 * (2 * 32 * EPS * 4 * 32 * 0.2 + (4 + 300 / 16) * 2 * EPS)
    assert len(calls) == 2
    attending.attend(query, store, Softmax(0.2))
    attending.attend(query[:, :, :1].clone().requires_grad_(), store, Softmax(0.2))
    attending.attend(query[:, :, :1], store, Softmax(0.2, softcap=30.0))
    even = RaggedStore.pack([[torch.arange(9)] * 2] * 2, keys, values, positions, None)
    attending.attend(query[:, :, :1], even, Softmax(0.2))
    assert len(calls) == 2
