"""The native prefill kernel against dense attention in float64, for every instruction set that this machine has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparing.core.pattern import Partial, Pattern
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.kernels import native
from sparing.kernels.sparse.native_prefill import attend_native, offers

if not native.is_built():
    pytest.skip(f"{native.status()}", allow_module_level=True)

SETS = native.INSTRUCTION_SETS[: native._library().sparing_best_isa() + 1]
EPS = 2.0**-24
# Of the kernel's 2^x and tanh, relative; see sparse_prefill.inc. tanh is 2^x and three more roundings.
EXP, TANH = 2e-7, 6e-7
TILE = 64


@dataclass
class Case:
    query: Tensor
    keys: Tensor
    values: Tensor
    pattern: Pattern
    softmax: Softmax

    def run(self, isa: str | None = None) -> Partial:
        return attend_native(self.query, self.keys, self.values, self.pattern, self.softmax, isa)


@dataclass
class _Answered(Case):
    """A case whose answer is given."""

    answer: Partial

    def run(self, isa: str | None = None) -> Partial:
        return self.answer


def case(tokens=300, start=0, size=32, heads=2, group=2, dim=64, value_dim=64, dtype=torch.float32, softcap=None,
         density=0.3, columns=0.1, blocks_per_group=None, seed=0) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    count = heads * group
    query = torch.randn(count, tokens - start, dim, generator=g).to(dtype)
    keys = torch.randn(heads, tokens, dim, generator=g).to(dtype)
    values = torch.randn(heads, tokens, value_dim, generator=g).to(dtype)
    blocks = -(-tokens // size)
    on = torch.rand(count, blocks - start // size, blocks, generator=g) < density
    groups = 1
    if blocks_per_group is not None:
        groups = (blocks - 1) // blocks_per_group - start // size // blocks_per_group + 1
    some = torch.rand(count, groups, tokens, generator=g) < columns if columns else None
    pattern = Pattern(tokens, start, size, on, some, blocks_per_group)
    return Case(query, keys, values, pattern, Softmax(dim**-0.5, softcap))


def reference(c: Case, head: int) -> tuple[Tensor, Tensor, float]:
    """Attention of a head by its definition, in float64: out, lse, and the most that a float32 logit is off by."""
    kv = head * c.keys.shape[0] // c.query.shape[0]
    query, keys, values = c.query[head].double(), c.keys[kv].double(), c.values[kv].double()
    logits = query @ keys.T * c.softmax.scaling
    # D products of a query that was scaled before, summed in any order.
    off = (query.shape[-1] + 2) * EPS * float((query.abs() @ keys.abs().T).max()) * c.softmax.scaling
    if c.softmax.softcap is not None:
        logits = c.softmax.softcap * torch.tanh(logits / c.softmax.softcap)
        off += TANH * float(logits.abs().max())
    may = c.pattern.may_read(head, torch.arange(c.pattern.start, c.pattern.tokens))
    # The constants log2 e and log 2, and the distance from the maximum, are rounded.
    off += 6 * EPS * float(logits.abs().max())
    logits = logits.masked_fill(~may, -torch.inf)
    return logits.softmax(-1) @ values, logits.logsumexp(-1), off


def check(c: Case, isa: str | None = None) -> None:
    found = c.run(isa)
    assert found.out.dtype == c.query.dtype
    for head in range(c.query.shape[0]):
        out, lse, off = reference(c, head)
        # A weight is off by its logit's error and the exponential's; once more for every later tile's factor, and by a
        # rounding for each of the N sums. The same holds for the sum that it is divided by.
        tiles = c.pattern.tokens // TILE + 1
        weight = off + (tiles + 1) * (EXP + 2 * EPS) + c.pattern.tokens * EPS
        bound = 2 * weight * float(c.values.double().abs().max())
        # bfloat16 outputs are rounded once, at the end: with 8 significant bits, by at most 2^-8 of them.
        rounding = 0.0 if c.query.dtype == torch.float32 else 2.0**-8
        assert bound < 1e-2  # outputs are of size 0.1 to 1: a wrong key shows
        assert bool(((found.out[head].double() - out).abs() <= bound + rounding * (out.abs() + bound)).all())
        assert float((found.lse[head].double() - lse).abs().max()) <= weight + 4 * EPS * float(lse.abs().max())


PATTERNS = {
    "blocks": {"columns": 0},
    "blocks of 16": {"size": 16, "blocks_per_group": 5},
    "blocks of 48": {"size": 48, "blocks_per_group": 1},
    "blocks of 80 and a chunk": {"size": 80, "start": 121, "tokens": 451},
    "blocks of 128": {"size": 128, "tokens": 420, "blocks_per_group": 2},
    "blocks of 512": {"size": 512, "tokens": 1030, "heads": 1},
    "columns alone": {"density": 0.0, "columns": 0.4},
    "everything": {"density": 1.0},
    "groups and a chunk": {"start": 77, "blocks_per_group": 3},
    "one row": {"start": 299},
    "one token": {"tokens": 1},
}


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_kernel_is_attention_under_the_pattern(isa, name):
    check(case(**PATTERNS[name]), isa)
    check(case(**PATTERNS[name], dtype=torch.bfloat16, seed=1), isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dim", [64, 256])
def test_it_is_as_exact_as_float32_is(isa, dim):
    """Bounds are for the worst case; torch's own float32 attention says what is usual."""
    c = case(tokens=500, density=1.0, columns=0, group=1, dim=dim)
    by_torch = torch.nn.functional.scaled_dot_product_attention(c.query, c.keys, c.values, is_causal=True)
    found = c.run(isa).out
    for head in range(2):
        out, _, _ = reference(c, head)
        usual = float((by_torch[head].double() - out).abs().max())
        assert float((found[head].double() - out).abs().max()) <= 3 * usual


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 208, 256])
@pytest.mark.parametrize("value_dim", [16, 80, 128, 224])
def test_head_sizes(isa, dtype, dim, value_dim):
    check(case(tokens=150, dim=dim, value_dim=value_dim, dtype=dtype, start=9, seed=dim), isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
def test_softcap(isa, softcap):
    check(case(softcap=softcap), isa)
    c = case(softcap=softcap, size=64)
    check(dataclasses.replace(c, query=c.query * 8), isa)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_query_heads_share_keys(group):
    check(case(group=group, heads=3))


def test_what_lies_in_memory_otherwise_is_the_same():
    c = case()
    turned = {
        name: getattr(c, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("query", "keys", "values")
    }
    other = dataclasses.replace(c, **turned)
    assert not other.keys.is_contiguous()
    assert torch.equal(c.run().out, other.run().out)


@pytest.mark.parametrize("isa", SETS)
def test_large_logits_do_not_overflow(isa):
    c = case(density=0.5)
    large = dataclasses.replace(c, query=c.query * 1e4)
    found = large.run(isa)
    assert bool(found.out.isfinite().all())
    assert bool(found.lse.isfinite().all())
    out, lse, _ = reference(large, 0)
    # Softmax is one-hot here: a value is picked, and only a near tie could pick another.
    assert float((found.out[0].double() - out).abs().max()) < 1e-2
    assert float((found.lse[0].double() / lse - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("isa", SETS)
def test_a_row_that_reads_itself_alone_is_its_value(isa):
    c = case(density=0.0, columns=0)
    # Huge values that no row may read: weights of what is not read are exactly 0.
    found = c.run(isa).out
    c.values[:, 1:] = 3e38
    again = c.run(isa).out
    for head in range(4):
        assert torch.equal(found[head, 0], c.values[head // 2, 0])
        assert torch.equal(again[head, 0], c.values[head // 2, 0])


@pytest.mark.parametrize("isa", SETS)
def test_nothing_outside_the_pattern_is_read(isa):
    """A key block and a column that no row reads are full of nan; where they are read, nan comes out."""
    c = case(size=32, columns=0.2)
    c.pattern.blocks[:, 3:, 2] = False
    c.pattern.columns[:, :, 64:96] = False
    expected = c.run(isa)
    for tensor in (c.keys, c.values):
        tensor[:, 64:96] = torch.nan
    found = c.run(isa)
    assert torch.equal(found.out[:, 96:], expected.out[:, 96:])
    assert bool(found.out[:, 64:96].isnan().all())


def test_a_wrong_block_is_noticed():
    c = case(columns=0)
    check(c)
    wrong = c.pattern.blocks.roll(1, -1)
    found = dataclasses.replace(c, pattern=dataclasses.replace(c.pattern, blocks=wrong)).run()
    with pytest.raises(AssertionError):
        check(_Answered(c.query, c.keys, c.values, c.pattern, c.softmax, found))


def test_a_wrong_column_is_noticed():
    c = case(density=0.0, columns=0.05)
    check(c)
    wrong = c.pattern.columns.roll(1, -1)
    found = dataclasses.replace(c, pattern=dataclasses.replace(c.pattern, columns=wrong)).run()
    with pytest.raises(AssertionError):
        check(_Answered(c.query, c.keys, c.values, c.pattern, c.softmax, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(dtype):
    c = case(tokens=700, size=48, blocks_per_group=4, dtype=dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            found.append(c.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one.out, found[0].out) and torch.equal(one.lse, found[0].lse) for one in found)


def test_chunks_of_a_prompt_are_the_whole():
    """Rows do not know in which chunk they were read, but for the order of sums."""
    c = case(tokens=300, size=32)
    whole = c.run()
    for start in (32, 100, 250):
        part = Pattern(300, start, 32, c.pattern.blocks[:, start // 32 :], c.pattern.columns)
        found = dataclasses.replace(c, query=c.query[:, start:], pattern=part).run()
        assert torch.allclose(found.out, whole.out[:, start:], atol=2e-6)
        assert torch.allclose(found.lse, whole.lse[:, start:], atol=2e-6)


def test_what_it_cannot_do_is_known_before():
    c = case()
    tensors = c.query, c.keys, c.values
    assert offers(*tensors, c.pattern)
    assert not offers(*(x.half() for x in tensors), c.pattern)
    assert not offers(c.query, c.keys.bfloat16(), c.values, c.pattern)
    assert not offers(c.query[..., :24], c.keys[..., :24], c.values, c.pattern)
    assert not offers(*(x.repeat(1, 1, 5) for x in tensors), c.pattern)
    assert not offers(*tensors, dataclasses.replace(c.pattern, rule=lambda rows, keys: keys >= 0))
    assert not offers(*tensors, Pattern(300, 0, 24, torch.ones(4, 13, 13, dtype=torch.bool)))
    with torch.enable_grad():
        assert not offers(c.query.clone().requires_grad_(), c.keys, c.values, c.pattern)
    assert not offers(*tensors, Pattern(300, 0, 32, c.pattern.blocks, is_causal=False))


@pytest.mark.parametrize("wrong", [{"keys": slice(0, 299)}, {"query": slice(1, 300)}, {"values": slice(0, 299)}])
def test_sizes_that_disagree_are_refused(wrong):
    c = case()
    (name, part), *_ = wrong.items()
    with pytest.raises(InvalidInputError):
        dataclasses.replace(c, **{name: getattr(c, name)[:, part]}).run()
