"""DHSA: chunks, scores and choices by the equation, the predictor's features and labels, files, refusals."""

from dataclasses import replace

import pytest
import torch

import sparing
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
from sparing.adapters.lens import ModelLens
from sparing.core.parsing import parse_method
from sparing.core.scorer import Softmax
from sparing.core.scores import ModelIdentity
from sparing.errors import InvalidInputError, MethodRefusedError, ScoresMismatchError
from sparing.methods.kv.snapkv import SnapKV
from sparing.methods.prefill.dhsa import DHSA, Chunked, DHSABlocks, DHSACosine, TokenChoice, WideQueries, chunk_scores
from sparing.testing import tiny_model
from sparing.testing.measurements import planted_scores

MODEL = ModelIdentity("mine", "LlamaForCausalLM", 2, 4, 2, 8, "abc")
CASES = [(256, 0), (250, 0), (301, 77)]
VARIANTS = [
    lambda keep, **more: DHSACosine(keep, block=32, **more),
    lambda keep, **more: DHSA(keep, block=32, scores=planted_scores("boundaries", MODEL), **more),
    lambda keep, **more: DHSABlocks(keep, block=32, key_block=16, **more),
]


def chosen(call, begins, block, most, sinks, recent):
    """The rule, a block of rows at a time: the set of columns of each, with `most` tokens or what is always read."""
    ends = [*begins[1:], call.tokens]
    q, k = call.query.double(), call.keys.double()
    result = []
    for number in range(call.start // block, -(-call.tokens // block)):
        edge, rows = number * block, range(max(number * block, call.start), min((number + 1) * block, call.tokens))
        read = {j for j in range(edge) if j < sinks or j >= edge - recent}
        scores = []
        for begin, end in zip(begins, ends, strict=True):
            products = [
                sum(q[h, i - call.start] for i in rows) / len(rows) @ k[h // call.group, begin:end].mean(0)
                for h in range(call.heads)
            ]
            scores.append(float(sum(products)) / call.heads * (end - begin) ** 0.5 * call.softmax.scaling)
        for c in sorted(range(len(begins)), key=lambda c: -scores[c]):
            for j in range(begins[c], min(ends[c], edge)):
                if len(read) < most and j not in read:
                    read.add(j)
        result.append(read)
    return result


@pytest.mark.parametrize(("count", "start"), [(150, 0), (170, 45)])
@pytest.mark.parametrize("most", [10, 40, 77])
@pytest.mark.parametrize(("sinks", "recent"), [(4, 16), (0, 0), (20, 40)])
def test_tokens_are_chosen_by_the_rule(count, start, most, sinks, recent):
    call, begins = random_call(count, start), [0, 5, 18, 50, 51, 99, 120]
    grid, cuts = call.grid(32), torch.tensor(begins)
    choice = TokenChoice(grid, sinks, recent)
    room = choice.own + int((torch.maximum(choice.before.clamp_max(most), choice.always) * choice.rows).sum())
    found = choice.best(chunk_scores(call, cuts, 32), cuts, room)[0]
    wanted = chosen(call, begins, 32, most, sinks, recent)
    assert [set(row.nonzero()[:, 0].tolist()) for row in found] == wanted


def test_choosing_a_few_rows_at_a_time_is_choosing_all(monkeypatch):
    call = random_call(300, 45)
    whole = DHSACosine(0.4, block=32).pattern(call).columns
    monkeypatch.setattr("sparing.methods.prefill.dhsa.ELEMENTS", 1)
    assert torch.equal(DHSACosine(0.4, block=32).pattern(call).columns, whole)


def test_chunks_of_one_token_are_scores_of_tokens():
    call = random_call(96)
    scores = chunk_scores(call, torch.arange(96), 32)
    keys = call.keys.double().repeat_interleave(2, dim=0)
    wanted = torch.stack([
        (call.query.double()[:, i : i + 32].mean(1)[:, None] @ keys.mT).mean((0, 1)) / 4 for i in (0, 32, 64)
    ])  # fmt: skip
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_root_of_the_length_keeps_the_variance():
    """Of independent keys, the variance of a chunk's score is that of one key's, whatever the length; a mean's is not.

    With 600 scores of each length, a variance is known to a factor of 1 ± 4 sqrt(2 / 600) = 1 ± 0.23 in 4 sigma.
    """
    g = torch.Generator().manual_seed(0)
    keys, query = torch.randn(1, 600 * 25, 16, generator=g), torch.ones(1, 600 * 25, 16)
    call = replace(random_call(heads=1, kv_heads=1), query=query, keys=keys, softmax=Softmax(0.25))
    begins = torch.cat([torch.arange(600) * 24, 600 * 24 + torch.arange(600)])
    scores = chunk_scores(call, begins, 600 * 25)[0]
    assert abs(float(scores[:600].var()) - 1) < 0.23  # 16 channels of variance 1 times 0.25²
    assert abs(float(scores[600:].var()) - 1) < 0.23
    assert float((scores[:600] * 24**-0.5).var()) < 0.1


def test_a_planted_chunk_is_read_whole_and_alone():
    """Keys 40 to 55 point one way, the others another; queries look for the first. Cuts lie exactly there."""
    keys = torch.zeros(2, 128, 8)
    keys[:, :, 1] = 1.0
    keys[:, 40:56, 1], keys[:, 40:56, 0] = 0.0, 1.0
    query = torch.zeros(4, 128, 8)
    query[:, :, 0] = 1.0
    call = replace(random_call(128, dim=8), query=query, keys=keys)
    method = DHSACosine(0.5, block=32, chunk=42, instruction=0, sinks=0, recent=0)
    assert method.begins(call).tolist() == [0, 40, 56]
    columns = method.pattern(call).columns
    counts = columns[0].sum(-1).tolist()
    assert bool(columns[:, 2:, 40:56].all())
    assert all(count >= 16 for count in counts[2:])
    # What is left goes to the chunks with equal scores, the earlier first.
    assert bool(columns[0, 3, : counts[3] - 16].all())


def test_the_instruction_begins_a_chunk():
    call = random_call(200)
    assert 136 in DHSACosine(block=32).begins(call).tolist()
    assert 0 in DHSACosine(block=32).begins(random_call(50)).tolist()
    begins = DHSACosine(block=32, instruction=0, chunk=20).begins(call)
    assert int(begins.diff().min()) >= 8  # of 200 tokens that are noise
    assert 8 <= len(begins) <= 10


@pytest.mark.parametrize("make", VARIANTS)
@pytest.mark.parametrize("keep", [0.4, 0.55, 0.9, 100])
@pytest.mark.parametrize(("count", "start"), CASES)
def test_the_budget_is_honoured_and_used(make, keep, count, start):
    call = random_call(count, start, size=2.0)
    method = make(keep, **({} if make is VARIANTS[2] else {"recent": 16}))
    # Unused: less than a column of a block of rows in each head; of dhsa_blocks less than two blocks of each, and what
    # is forced in the rows of earlier turns beyond their share.
    blocks = 2 * 16 * 16 + start * (start + 1) // 2
    assert_budget(method, call, unused=call.heads * (blocks if make is VARIANTS[2] else 32))
    assert_faithful(method, call)


def test_what_is_always_read_may_exceed_the_budget():
    call = random_call(256)
    pattern = DHSACosine(0.05, block=32).pattern(call)
    mask = mask_of(pattern)
    assert float(pattern.density().mean()) > 0.05
    for row in (40, 130, 255):
        edge = row // 32 * 32
        read = [j for j in range(row + 1) if j < min(4, edge) or j >= edge - 64]
        assert mask[:, row].nonzero()[:, 1].tolist() == read * 4


@pytest.mark.parametrize("make", VARIANTS)
def test_everything_is_read_at_one(make):
    call = random_call(150)
    assert bool((mask_of(make(1.0).pattern(call)) == (logits(call) > -torch.inf)).all())
    assert make(1.0).reads_all
    assert not make(0.5).reads_all


@pytest.mark.parametrize(("count", "start"), CASES)
def test_wide_queries_are_the_equation(count, start):
    call = random_call(count, start)
    scores = WideQueries(64).score(call, 16)
    first = start // 16
    assert scores.shape == (4, -(-count // 16) - first, -(-count // 16))
    for row in range(scores.shape[1]):
        wide = (first + row) * 16 // 64 * 64
        rows = slice(max(wide, start) - start, min(wide + 64, count) - start)
        for head in range(4):
            for j in range(first + row + 1):
                keys = call.keys[head // 2, j * 16 : (j + 1) * 16].double().mean(0)
                wanted = float(call.query[head, rows].double().mean(0) @ keys) / 4
                assert abs(float(scores[head, row, j]) - wanted) < 1e-5


def test_the_future_takes_no_part_of_the_budget():
    """Later keys fit better: of those that it may see, each row reads the last ones, and the whole budget is used."""
    call = random_call(256, heads=1, kv_heads=1)
    ramp = torch.zeros(1, 256, 16)
    ramp[..., 0] = torch.arange(256.0) + 1
    pattern = DHSABlocks(0.5, block=32, key_block=16).pattern(replace(call, query=ramp, keys=ramp))
    assert 0.5 - 2 * 256 / (256 * 257 / 2) < float(pattern.density()) <= 0.5
    for row, blocks in enumerate(pattern.blocks[0]):
        read = blocks.nonzero()[:, 0].tolist()
        last = len(read) - (1 if row else 0)  # besides block 0
        assert read == sorted({0, *range(row + 1 - last, row + 1)})


@pytest.mark.parametrize("make", VARIANTS[:2])
def test_chunks_are_refused(make):
    method, ids = make(0.4, recent=8), tokens(100)
    if isinstance(method, DHSA):
        model = ModelLens(tiny_model("llama")).identity
        method = replace(method, scores=planted_scores("boundaries", model))
    assert float((said(method, ids, [100]) - said(DHSACosine(1.0), ids, [100])).abs().max()) > 0.01
    with pytest.raises(MethodRefusedError, match="read the prompt at once"):
        said(method, ids, [32, 68])


def test_fixed_blocks_read_chunks_as_the_whole():
    method, ids = DHSABlocks(0.4, block=32, key_block=16), tokens(150)
    whole = said(method, ids, [150])
    assert float((whole - said(DHSACosine(1.0), ids, [150])).abs().max()) > 0.01
    torch.testing.assert_close(said(method, ids, [32, 96, 22]), whole, rtol=0, atol=2e-4)
    with pytest.raises(MethodRefusedError, match="multiple of 32"):
        said(method, ids, [48, 102])


@pytest.mark.parametrize("method", [DHSACosine(0.5, block=16, recent=16), DHSABlocks(0.5, block=32, key_block=16)])
def test_a_padded_batch_is_its_rows(method):
    assert_batch_is_rows(method)


def test_each_layer_has_its_predictor():
    scores = planted_scores("boundaries", MODEL)
    method = DHSA(0.5, block=32, scores=scores)
    call = random_call(200)
    first, second = (method.begins(replace(call, attention_layer=layer)) for layer in (0, 1))
    assert first.tolist() != second.tolist()
    with pytest.raises(ScoresMismatchError, match="no predictor for the 2 KV heads of layer 2"):
        method.begins(replace(call, attention_layer=2))
    with pytest.raises(ScoresMismatchError, match="no predictor for the 1 KV heads"):
        method.begins(random_call(200, kv_heads=1))
    with pytest.raises(ScoresMismatchError, match="sparing calibrate --method dhsa"):
        DHSA(0.5, scores=planted_scores("duo", MODEL)).begins(call)


def test_another_models_predictors_are_refused_before_anything_runs():
    method = DHSA(0.5, scores=planted_scores("boundaries", replace(MODEL, num_layers=3)))
    for whole in (method, SnapKV(0.5, prefill=method)):
        with pytest.raises(ScoresMismatchError, match="measured on"):
            sparing.use(tiny_model("llama"), whole)


def test_the_numbers_text_and_what_is_refused():
    method = DHSACosine()
    assert (method.chunk, method.distance, method.instruction, method.recent, method.window) == (32, 8, 64, 64, 4)
    assert (DHSABlocks().block, DHSABlocks().key_block) == (128, 32)
    assert DHSA(scores=planted_scores("boundaries", MODEL)).keep == 0.25
    assert parse_method("dhsa_cosine(chunk=16,block=32)", 0.5) == DHSACosine(0.5, 32, 16)
    assert parse_method("dhsa_blocks+layer", 0.5).scorer == WideQueries(128)
    for bad in ({"chunk": 0}, {"distance": 0}, {"window": 0}, {"recent": -1}, {"sinks": -1}, {"instruction": -1}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            DHSACosine(**bad)
    assert DHSABlocks(block=16).key_size == 16
    for bad in (8, 24, 96):
        with pytest.raises(InvalidInputError, match="key_block"):
            DHSABlocks(key_block=bad)
    with pytest.raises(InvalidInputError, match="calibrate --method dhsa"):
        DHSA()
    with pytest.raises(NotImplementedError):
        Chunked(0.5).pattern(random_call(200))
