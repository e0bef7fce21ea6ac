"""SALE: weights by the equation, codes within their bound, means that don't matter, thresholds and refusals."""

import math
from dataclasses import replace

import pytest
import torch

import sparing
from methods.prefill.sparse_calls import (
    EPS,
    assert_batch_is_rows,
    assert_budget,
    assert_faithful,
    logits,
    mask_of,
    random_call,
    said,
    tokens,
)
from sparing.core.measured import needed_by
from sparing.core.parsing import parse_method
from sparing.core.samples import PasskeySample
from sparing.core.scorer import Softmax
from sparing.core.scores import ModelIdentity, Scores
from sparing.errors import InvalidInputError, MethodRefusedError, ScoresMismatchError
from sparing.methods.heads.sale import SaleThresholds
from sparing.methods.prefill.sale import Sale, coded
from sparing.scoring import score
from sparing.testing import tiny_model


def code(x, bits):
    """The nearest of 2^bits - 1 even steps from -max to max, a number at a time."""
    largest = max(abs(each) for each in x)
    most = 2 ** (bits - 1) - 1
    return [round(each * most / largest) * largest / most for each in x]


def estimated(call, bits):
    """(Hq, Q, N) logits of the equation in float64."""
    query, keys = call.query.double(), call.keys.double()
    found = torch.zeros(call.heads, call.rows, call.tokens, dtype=torch.float64)
    for head in range(call.heads):
        mine = keys[head // call.group]
        q_mean, k_mean = query[head].mean(0), mine.mean(0)
        k_codes, q_codes = (
            torch.tensor([code(x.tolist(), bits) for x in each], dtype=torch.float64)
            for each in (mine - k_mean, query[head] - q_mean)
        )
        found[head] = q_codes @ k_codes.T + q_mean @ (mine - k_mean).T + (query[head] @ k_mean)[:, None]
    found *= call.softmax.scaling
    return found if call.softmax.softcap is None else torch.tanh(found / call.softmax.softcap) * call.softmax.softcap


def weights(call, s, block, first, local, stride):
    """{(head, row block, key block): log of the largest weight}, of blocks that may be chosen."""
    exact, found = logits(call), {}
    for head in range(call.heads):
        for number in range(call.start // block, -(-call.tokens // block)):
            low, high = max(number * block, call.start), min((number + 1) * block, call.tokens)
            rows = {min(max(number * block + i, low), high - 1) for i in range(stride - 1, block, stride)}
            for other in range(first, max(number - local, 0)):
                best = -math.inf
                for i in rows:
                    read = [j for j in range(i + 1) if j // block < first or j // block >= number - local]
                    total = sum(math.exp(float(exact[head, i - call.start, j])) for j in read)
                    inside = s[head, i - call.start, other * block : (other + 1) * block]
                    best = max(best, float(inside.max()) - math.log(total))
                found[head, number - call.start // block, other] = best
    return found


CASES = [(0, 4, 1, None), (37, 4, 8, None), (64, 16, 4, 2.0)]


@pytest.mark.parametrize(("start", "bits", "stride", "softcap"), CASES)
def test_the_blocks_are_those_of_the_largest_weights(start, bits, stride, softcap):
    call = replace(random_call(134, start, seed=1, size=2.0), softmax=Softmax(0.25, softcap))
    method = Sale(keep=0.6, block=16, local=10, estimate_bits=bits, stride=stride)
    known = weights(call, logits(call) if bits == 16 else estimated(call, bits), 16, 1, 1, stride)
    pattern = method.pattern(call)
    values = [(known[at], pattern.blocks[at].item()) for at in known]
    taken, left_out = ([value for value, is_on in values if is_on == wanted] for wanted in (True, False))
    assert min(taken) > max(left_out) - 1e-4
    assert len(taken) > 10 < len(left_out)
    by_threshold = replace(method, keep=1.0, tau=math.exp((min(taken) + max(left_out)) / 2)).pattern(call)
    assert torch.equal(by_threshold.blocks, pattern.blocks)


def test_with_exact_logits_a_block_is_read_if_any_weight_is_larger_than_tau():
    call = random_call(134, seed=2, size=2.0)
    known = weights(call, logits(call), 16, 1, 0, 1)
    for tau in (2.0, 0.7):
        pattern = Sale(keep=1.0, block=16, local=0, tau=tau, estimate_bits=16, stride=1).pattern(call)
        assert {at for at in known if pattern.blocks[at]} == {
            at for at, value in known.items() if math.exp(value) > tau
        }
        assert 0 < sum(bool(pattern.blocks[at]) for at in known) < len(known)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_off_by_half_a_step(bits):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(3)) * 3
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Half a step, and what rounding in float32 adds: some units in the last place of the largest number.
    assert bool(((coded(x, bits) - x).abs() <= step / 2 + 8 * EPS * x.abs().amax()).all())
    assert max(len(row.unique()) for row in coded(x, bits) / step) <= 2**bits - 1
    assert not torch.allclose(coded(x, bits), x, atol=1e-3)
    assert coded(torch.zeros(2, 4), bits).tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("bits", [4, 8])
def test_estimates_are_within_what_the_codes_lose(bits):
    """|s~ - s| <= scaling (|k~|_1 step_q / 2 + |q|_1 step_k / 2 + D step_q step_k / 4) for means taken out before."""
    call = random_call(90, seed=4)
    error = (estimated(call, bits) - logits(call)).abs()
    most = 2 ** (bits - 1) - 1
    q = (call.query - call.query.mean(1, keepdim=True)).double()
    k = (call.keys - call.keys.mean(1, keepdim=True)).double().repeat_interleave(2, dim=0)
    steps = [x.abs().amax(-1) / most for x in (q, k)]
    parts = [k.abs().sum(-1)[:, None] * steps[0][..., None], q.abs().sum(-1)[..., None] * steps[1][:, None]]
    bound = call.softmax.scaling * (parts[0] / 2 + parts[1] / 2 + 16 * steps[0][..., None] * steps[1][:, None] / 4)
    seen = ~error.isinf()
    assert bool((error <= bound + 1e-5)[seen].all())
    assert float((error / bound)[seen].max()) > 0.1


def test_a_vector_added_to_all_keys_changes_nothing():
    """Means are taken out before coding; without that, a large offset would swallow the steps."""
    call = random_call(150, seed=5, size=2.0)
    moved = replace(call, keys=call.keys + 8.0)
    method = Sale(keep=0.5, block=16, local=0)
    one, two = (method.pattern(each).blocks for each in (call, moved))
    assert (one != two).sum() <= 2  # float32 may swap equals
    uncentred = coded(moved.keys, 4) @ coded(call.query[:1], 4).mT
    assert not torch.allclose(uncentred, moved.keys @ call.query[:1].mT, atol=1.0)


def planted(row):
    """A key in block 3 has a logit of 9 for one row of block 7, all other logits are 0."""
    query, keys = torch.zeros(2, 128, 16), torch.zeros(1, 128, 16)
    query[1, row, 0], keys[0, 50, 0] = 9.0, 1.0
    return replace(random_call(128, heads=2, kv_heads=1), query=query, keys=keys, softmax=Softmax(1.0))


def test_one_row_is_enough_for_a_planted_block():
    """Its anchor holds 16 + 16 + 10 logits of 0: the weight is e^9 / 42 = 193; elsewhere at most 1 / 17 = 0.059."""
    for bits in (4, 16):
        method = Sale(keep=1.0, block=16, local=16, tau=0.06, estimate_bits=bits, stride=1)
        pattern = method.pattern(planted(121))
        extra = pattern.blocks & (method.pattern(random_call(128, heads=2, kv_heads=1, size=0.0)).blocks.logical_not())
        assert extra.nonzero().tolist() == [[1, 7, 3]]
        assert bool(replace(method, tau=190.0).pattern(planted(121)).blocks[1, 7, 3])
        assert not replace(method, tau=196.0).pattern(planted(121)).blocks[1, 7, 3]


def test_a_stride_sees_some_rows_only_and_the_last_one_always():
    method = Sale(keep=1.0, block=16, local=16, tau=0.06, stride=8)
    assert not method.pattern(planted(121)).blocks[1, 7, 3]
    assert method.pattern(planted(119)).blocks[1, 7, 3]
    call = planted(121)
    short = replace(call, query=call.query[:, :122], keys=call.keys[:, :122], values=call.values[:, :122])
    assert method.pattern(short).blocks[1, 7, 3]


def test_a_threshold_of_0_and_all_of_the_budget_are_dense():
    call = random_call(150, seed=6)
    for method in (Sale(keep=1.0, block=16, tau=0.0), Sale(keep=1.0, block=16)):
        assert method.pattern(call).pairs().tolist() == [150 * 151 // 2] * 4
        assert_faithful(method, call)
    assert Sale(keep=1.0).reads_all
    assert not Sale(keep=1.0, tau=0.008).reads_all
    window = Sale(keep=1.0, block=16, local=17, tau=math.inf).pattern(call)
    assert mask_of(window)[0, 100].nonzero().flatten().tolist() == [*range(16), *range(64, 101)]


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.8, 60])
@pytest.mark.parametrize(("count", "start"), [(150, 0), (131, 37), (160, 96)])
def test_faithful_and_within_budget(keep, count, start):
    call = random_call(count, start, seed=7, size=2.0)
    method = Sale(keep=keep, block=16, local=0)
    assert_faithful(method, call)
    assert_budget(method, call, unused=16 * 16)


def test_a_threshold_leaves_the_budget_unused():
    call = random_call(150, seed=8, size=2.0)
    ample, scarce = (Sale(keep=keep, block=16, local=0, tau=0.4).pattern(call) for keep in (0.9, 0.3))
    assert float(ample.density().mean()) < 0.85
    assert float(scarce.density().mean()) <= 0.3
    assert bool((ample.blocks | ~scarce.blocks).all())
    assert scarce.blocks.sum() < ample.blocks.sum()


def test_a_batch_is_its_rows_and_chunks_are_refused():
    method = Sale(keep=0.5, block=16, local=0)
    assert_batch_is_rows(method)
    ids = tokens(96)
    with pytest.raises(MethodRefusedError, match="sale"):
        said(method, ids, [48, 48])
    assert not torch.allclose(said(method, ids, [96]), said(Sale(keep=1.0), ids, [96]), atol=1e-3)


def measured(values):
    axes = ("layer", "head", "kind")[: values.dim()]
    return Scores(values, axes, "sale", ModelIdentity("x", "X", values.shape[0], 4, 2, 16, "x"))


def test_measured_thresholds_are_each_heads_own():
    call = replace(random_call(150, seed=9, size=2.0), attention_layer=1)
    taus = torch.tensor([[0.5] * 4, [4.0, 0.5, 1.5, 5e-5]])
    method = Sale(keep=1.0, block=16, local=0, scores=measured(-taus.log2()))
    assert not method.reads_all
    blocks = method.pattern(call).blocks
    for head, tau in enumerate([4.0, 0.5, 1.5, 0.0]):  # 5e-5 is not above 1e-4: that head reads all
        alone = Sale(keep=1.0, block=16, local=0, tau=tau).pattern(call)
        assert torch.equal(blocks[head], alone.blocks[head])
    assert len({int(each.sum()) for each in blocks}) > 1
    scarce = replace(method, keep=0.5)
    assert_budget(scarce, call, unused=16 * 16)
    assert int(scarce.pattern(call).blocks[3].sum()) == int(blocks[3].sum())


def test_thresholds_are_those_that_keep_the_error_small():
    """The definition on dense maps in float64: the first halving whose error is below what is allowed."""
    call = random_call(150, seed=10, size=2.0)
    scorer = SaleThresholds(block=16, local=0, start=2.0, error=0.9)
    dense = logits(call).softmax(-1) @ call.values.double().repeat_interleave(2, dim=0)
    for head, count in enumerate(scorer._halvings(call).tolist()):
        errors = []
        for halvings in range(int(count) + 1):
            mask = mask_of(Sale(keep=1.0, block=16, local=0, tau=2.0 / 2**halvings).pattern(call))[head]
            out = logits(call)[head].masked_fill(~mask, -torch.inf).softmax(-1) @ call.values[head // 2].double()
            errors.append(float((out - dense[head]).abs().sum()))
        assert errors[-1] < 0.9 * 150 <= min([*errors[:-1], math.inf])
    assert len(scorer._halvings(call).unique()) > 1
    never = SaleThresholds(block=16, local=0, start=0.008, error=0.0)._halvings(call)
    assert never.tolist() == [7.0] * 4  # 0.008 / 2^7 = 6.25e-5, not above 1e-4


def test_calibrated_end_to_end(tmp_path):
    model = tiny_model("gemma3")  # its first layer slides: measurements count it, sparse layers don't
    samples = [PasskeySample(tuple(tokens(count, seed=count)[0].tolist()), (), ()) for count in (100, 80)]
    found = score(model, SaleThresholds(block=16, local=0), data=samples)
    assert found.axes == ("layer", "head")
    assert found.values.shape == (3, 4)
    alone = score(model, SaleThresholds(block=16, local=0), data=samples[1:])
    assert torch.equal(score(model, SaleThresholds(block=16, local=0), data=samples[::-1]).values, found.values)
    assert bool((alone.values >= -math.log2(0.008)).all())
    file = found.save(tmp_path / "sale.safetensors")
    method = parse_method(f"sale(scores={file},block=16)", 0.5)
    assert method.measurements == (found,)
    assert needed_by("sale") == ("sale",)
    with torch.no_grad(), sparing.use(model, replace(method, dispatch="always")):
        model(tokens(90))
    with pytest.raises(ScoresMismatchError), sparing.use(tiny_model("llama"), method):
        pass


def test_scores_that_do_not_fit_are_refused():
    good = measured(torch.ones(2, 4))
    with pytest.raises(InvalidInputError, match="tau"):
        Sale(scores=good, tau=0.1)
    with pytest.raises(InvalidInputError, match="scores"):
        Sale(scores=(good, good))
    with pytest.raises(InvalidInputError, match="scores"):
        Sale(scores="a file")
    with pytest.raises(ScoresMismatchError):
        Sale(scores=measured(torch.ones(2, 4, 2)))
    for bad in ({"start": 1e-4}, {"error": -1.0}, {"stride": 5}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            SaleThresholds(**bad)


def test_the_papers_numbers_and_what_is_refused():
    method = Sale()
    assert (method.block, method.local, method.first, method.estimate_bits, method.tau) == (64, 128, 1, 4, None)
    for bad in ({"first": -1}, {"local": -1}, {"tau": -0.1}, {"estimate_bits": 1}, {"stride": 0}, {"stride": 7}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            Sale(**bad)
    with pytest.raises(MethodRefusedError, match="not made of a scorer"):
        method.block_parts()
