"""KVzip against its equation, on a planted induction head, and the replay that leaves nothing behind."""

import dataclasses
import math

import pytest
import torch
from oracles import attention_error, build, dense_attention, random_case

from sparing import Evict, KVzip, score, use
from sparing.adapters.replaying import replay
from sparing.core.samples import TextSample
from sparing.core.scorer import KeyValues, Queries
from sparing.errors import CacheStateError, InvalidInputError, MethodRefusedError
from sparing.methods.heads.kvzip_heads import KVzipHeads
from sparing.methods.kv.kvzip import Reconstruction
from sparing.testing import Driver, measured_bytes, random_prompt, run_method, run_untouched, tiny_model

torch.set_num_threads(1)


def with_replay(case, places):
    """The case with tokens appended that are copies of the given ones, and the queries of these."""
    stored, last = case.stored, case.tokens
    count = len(places)
    positions = torch.arange(last, last + count)
    longer = KeyValues(
        torch.cat([stored.keys, stored.keys[:, :, places]], dim=2),
        torch.cat([stored.values, stored.values[:, :, places]], dim=2),
        torch.cat([stored.valid, torch.ones_like(stored.valid[:, :, :count])], dim=2),
        torch.cat([stored.positions, positions.expand_as(stored.valid[:, :, :count])], dim=2),
        stored.pads, 0, 2, None,
    )  # fmt: skip
    there = torch.ones(1, count, dtype=torch.bool)
    return Queries(case.queries.states[:, :, places], positions, there, case.queries.softmax), longer


def slow(case, scorer, pad):
    """The equation, chunk by chunk, one number at a time: dense attention over the members of each chunk only."""
    tokens = case.tokens
    heads = case.stored.keys.shape[1]
    group = case.queries.states.shape[1] // heads
    found = [[0.0] * tokens for _ in range(heads)]
    real = tokens - pad
    for start in range(0, real, scorer.chunk):
        end = min(start + scorer.chunk, real)
        before = [pad + t for t in (scorer.continuation if start else scorer.instruction)]
        before += [pad + t for t in range(max(start - scorer.overlap, 0), start)]
        queries, longer = with_replay(case, before + [pad + t for t in range(start, end)])
        place = torch.arange(longer.keys.shape[2]) - pad
        member = ((place >= start) & (place < end)) | ((place >= 0) & (place < scorer.sinks)) | (place >= real)
        rows = dense_attention(queries, dataclasses.replace(longer, valid=longer.valid & member))
        for h in range(heads):
            for j in range(start, end):
                seen = [row[pad + j] for q in range(group) for row in rows[0][h * group + q]]
                found[h][pad + j] = max(found[h][pad + j], *seen)
    return torch.tensor(found)


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(
    "scorer",
    [Reconstruction(chunk=5, sinks=2, overlap=2), Reconstruction(chunk=100),
     Reconstruction(chunk=3, sinks=0, overlap=0),
     Reconstruction(chunk=4, overlap=1, instruction=(2, 3), continuation=(1,))],
    ids=["chunks", "one chunk", "no sinks", "instructions"],
)  # fmt: skip
def test_the_equation(scorer, row):
    whole = random_case(seed=7)
    part, pad = slice(row, row + 1), [0, 3, 7][row]
    stored = whole.stored
    names = ("keys", "values", "valid", "positions", "pads")
    case = dataclasses.replace(
        whole,
        stored=dataclasses.replace(stored, **{name: getattr(stored, name)[part] for name in names}),
        queries=dataclasses.replace(
            whole.queries, states=whole.queries.states[part], valid=whole.queries.valid[part]
        ),
    )  # fmt: skip
    torch.testing.assert_close(
        case.score(scorer)[0].double(), slow(case, scorer, pad).double(), atol=attention_error(case), rtol=0
    )


def test_an_induction_head_scores_what_it_copies():
    """Token i's replayed query looks for token i + 1. In its row it sees 12 keys and i + 1 replayed ones, one of which
    has the logit 6: A = e^6 / (e^6 + 11 + i + 1). Token 0 is predicted by nobody; the last row, which finds no match,
    spreads evenly over 24 keys and gives it the most: 1 / 24.
    """
    tokens, dim, beta = 12, 16, 6.0
    codes = torch.eye(dim)
    keys = codes[:tokens] * math.sqrt(dim)
    queries = beta * codes[1 : tokens + 1]
    case = build(queries[None, None], keys[None, None])
    found = case.score(Reconstruction(sinks=0))[0, 0]
    wanted = [1 / 24] + [math.exp(beta) / (math.exp(beta) + 11 + j) for j in range(1, tokens)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)
    assert float(found[1:].min()) > 0.94
    assert float(found[0]) < 1 / tokens


def test_what_is_replayed():
    scorer = Reconstruction(chunk=4, overlap=2, instruction=(91, 92), continuation=(93,))
    passes = scorer.replay(list(range(9)))
    assert [p.ids for p in passes] == [(91, 92, 0, 1, 2, 3), (93, 2, 3, 4, 5, 6, 7), (93, 6, 7, 8)]
    assert [(p.start, p.end) for p in passes] == [(0, 4), (4, 8), (8, 9)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "jamba", "qwen3_next"])
def test_a_replay_leaves_nothing_behind(name):
    """Nothing is dropped here, so every logit must be the untouched model's, bit for bit, and the bytes as well."""
    prompt = random_prompt(64)
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Counting(Reconstruction):
        def observe_replay(self, *args):
            calls.append(1)
            return super().observe_replay(*args)

    class Keeps(KVzip):
        def parts(self):
            return dataclasses.replace(super().parts(), scorer=Counting(chunk=20))

    model = tiny_model(name)
    run = run_method(model, Keeps(keep=10_000), prompt)
    assert len(calls) == 4 * len(run.cache.evicting)
    for mine, theirs in zip(run.logits, run_untouched(tiny_model(name), prompt), strict=True):
        assert torch.equal(mine, theirs)
    assert run.cache.get_seq_length() == 64 + prompt.forced.shape[1]
    with use(model, Keeps(keep=10_000)) as session:
        cache = session.new_cache()
        Driver(model, cache).read(prompt)
        before = measured_bytes(cache)
        cache.report()
        states = sum(s.nbytes for layer in cache.evicting for s in layer.states.values())
        assert measured_bytes(cache) <= before + states


def test_the_budget_is_one_for_all_layers_and_heads():
    """Half of 100 tokens, in two layers of two heads: 200 entries, of which each head may have any number."""
    with use(tiny_model("llama"), KVzip(keep=0.5, chunk=30)) as session:
        session.model(random_prompt(100).ids)
        plan = session.report().plan
    counts = [len(head) for layer in plan.layers for head in layer.kept[0]]
    assert sum(counts) == 200
    assert len(set(counts)) > 1
    assert all(head[:4].tolist() == [0, 1, 2, 3] for layer in plan.layers for head in layer.kept[0])


def test_the_score_is_of_the_context_and_not_of_what_was_asked_before():
    """Chunks of the prompt's reading do not matter, only those of the replay."""
    kept = []
    for chunks in ((), (7,) * 10):
        run = run_method(tiny_model("llama", torch.float64), KVzip(keep=0.4, chunk=30), random_prompt(70), chunks)
        kept.append([head.tolist() for layer in run.cache.plan.layers for head in layer.kept[0]])
    assert kept[0] == kept[1]


def test_refusals():
    model, prompt = tiny_model("llama"), random_prompt(50, 40)
    with use(model, KVzip()), pytest.raises(MethodRefusedError, match="one sequence at a time"):
        model.generate(prompt.ids, attention_mask=prompt.mask, max_new_tokens=2)
    embeddings = model.get_input_embeddings()(prompt.ids[:1]).detach()
    with use(model, KVzip()) as session:
        model(inputs_embeds=embeddings)
        with pytest.raises(CacheStateError, match="whose tokens are not known"):
            session.report()
    short = tiny_model("gpt2", max_position_embeddings=100)
    with use(short, KVzip()), pytest.raises(MethodRefusedError, match=r"position 120, and GPT2LMHeadModel has 100"):
        short.generate(random_prompt(60).ids, max_new_tokens=2)
    with use(short, KVzip(chunk=30)):
        short.generate(random_prompt(60).ids, max_new_tokens=2)
    for wrong in ({"chunk": 0}, {"sinks": -1}, {"overlap": -1}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            KVzip(**wrong)
    with pytest.raises(MethodRefusedError, match="dropped in parts"):
        Evict(scorer=Reconstruction(), moment="chunk_end")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_score_as_much_as_their_best_token(name):
    """The head scorer reads text and replay at once, the method replays on a cache: the same maxima."""
    model, prompt = tiny_model(name, torch.float64), random_prompt(60)
    settings = {"chunk": 25, "sinks": 3, "overlap": 4}
    with use(model, KVzip(keep=10_000, **settings)) as session:
        cache = session.new_cache()
        Driver(model, cache).read(prompt)
        replay(cache, cache.scorers[0], 60)
        tokens = torch.stack([layer.states[cache.scorers[0]][0] for layer in cache.evicting])[..., 3:]
    data = [TextSample(tuple(prompt.ids[0].tolist()))]
    for reduce, wanted in (("max", tokens.amax(-1)), ("mean", tokens.mean(-1))):
        found = score(model, KVzipHeads(**settings, reduce=reduce), data=data)
        assert found.axes == ("layer", "kv_head")
        torch.testing.assert_close(found.values, wanted.float(), atol=1e-5, rtol=0)
