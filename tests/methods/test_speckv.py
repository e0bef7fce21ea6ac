"""SpecKV against its equation, with a draft model that is the model itself, and with none."""

import dataclasses

import pytest
import torch
from oracles import attention_error, dense_attention, random_case

from sparing import SpecKV, parse_method, use
from sparing.core.scorer import KeyValues, Queries, Replay
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.kv.speckv import LookaheadAttention
from sparing.testing import Driver, random_prompt, run_method, tiny_model

torch.set_num_threads(1)


def drafted(case, count, seed=3):
    """Queries and keys of drafted tokens behind the case, and everything stored with them."""
    g = torch.Generator().manual_seed(seed)
    stored, last = case.stored, case.tokens
    shape = (1, stored.keys.shape[1], count, stored.keys.shape[3])
    keys, values = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    positions = torch.arange(last, last + count)
    states = torch.randn(1, case.queries.states.shape[1], count, shape[3], generator=g)
    valid = torch.ones(1, shape[1], count, dtype=torch.bool)
    longer = KeyValues(
        torch.cat([stored.keys, keys], 2), torch.cat([stored.values, values], 2), torch.cat([stored.valid, valid], 2),
        torch.cat([stored.positions, positions.expand_as(valid)], 2), stored.pads, 0, 2, None,
    )  # fmt: skip
    return Queries(states, positions, torch.ones(1, count, dtype=torch.bool), case.queries.softmax), longer


def slow(case, ahead, window, kernel_size):
    """Maxima over the last rows and the drafted ones, then over neighbours before the window."""
    heads, tokens = case.stored.keys.shape[1], case.tokens
    group = case.queries.states.shape[1] // heads
    own = dense_attention(case.queries, case.stored)[0]
    rows = dense_attention(*ahead)[0] if ahead else [[] for _ in own]
    first = tokens - window
    result = torch.zeros(heads, tokens, dtype=torch.float64)
    for h in range(heads):
        votes = [row for q in range(group) for row in own[h * group + q][first:] + rows[h * group + q]]
        best = [max(row[j] for row in votes) for j in range(tokens)]
        half = kernel_size // 2
        for j in range(tokens):
            near = [best[i] for i in range(max(j - half, 0), min(j + half + 1, first))]
            result[h, j] = max(near) if j < first else best[j]
    return result


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_equation(count, kernel_size):
    case = random_case(seed=4).alone(0)
    scorer = LookaheadAttention(tiny_model("llama"), lookahead=4, window=5, kernel_size=kernel_size)
    state = scorer.observe(None, case.queries, case.stored)
    ahead = drafted(case, count) if count else None
    if ahead:
        state = scorer.observe_replay(state, *ahead, Replay(tuple(range(count)), 0, case.tokens))
    found = scorer.score(state, case.stored)[0].double()
    torch.testing.assert_close(found, slow(case, ahead, 5, kernel_size), atol=attention_error(case), rtol=0)


def test_a_key_that_only_a_drafted_row_looks_at_is_kept():
    """Key 2 is orthogonal to every row of the prompt; the one drafted row is parallel to it: A = e^6 / (e^6 + 13)."""
    case = random_case(seed=5, kv_heads=1, group=1).alone(0)
    keys, states = case.stored.keys.clone(), case.queries.states.clone()
    keys[..., 0], states[..., 0] = 0.0, 0.0
    keys[0, 0, 2] = torch.eye(8)[0] * 8**0.5
    case = dataclasses.replace(
        case,
        stored=dataclasses.replace(case.stored, keys=keys),
        queries=dataclasses.replace(case.queries, states=states),
    )
    queries, longer = drafted(case, 1)
    longer.keys[0, 0, -1, 0] = 0.0
    queries.states[0, 0, 0] = torch.eye(8)[0] * 6
    scorer = LookaheadAttention(tiny_model("llama"), window=4, kernel_size=1)
    state = scorer.observe_replay(
        scorer.observe(None, case.queries, case.stored), queries, longer, Replay((1,), 0, case.tokens)
    )
    found = scorer.score(state, case.stored)[0, 0]
    assert float(found[2]) == pytest.approx(403.4288 / (403.4288 + 13), abs=1e-5)
    assert int(found.argmax()) == 2


def test_the_pass_is_what_the_draft_model_writes():
    model, prompt = tiny_model("llama"), random_prompt(30)
    scorer = LookaheadAttention(model, lookahead=6)
    (each,) = scorer.replay(prompt.ids[0].tolist())
    said = model.generate(prompt.ids, max_new_tokens=6, do_sample=False)[0, 30:].tolist()
    assert list(each.ids) == said
    assert LookaheadAttention(None, lookahead=0).replay([1, 2]) == []


def test_with_itself_as_the_draft_model_nothing_that_the_answer_looks_at_is_lost():
    """The kept tokens of every head are its window and the best of the others, by the answer's own attention."""
    model = tiny_model("llama", torch.float64)
    twin = tiny_model("llama", torch.float64)
    prompt, window, steps = random_prompt(60), 8, 5
    method = SpecKV(keep=24, draft=twin, lookahead=steps, window=window, kernel_size=1)
    answer = model.generate(prompt.ids, max_new_tokens=steps, do_sample=False)
    with use(model, method) as session:
        cache = session.new_cache()
        Driver(model, cache).read(prompt)
        plan = cache.report().plan
    maps = tiny_model("llama", torch.float64, attn_implementation="eager")(answer, output_attentions=True).attentions
    for layer in plan.layers:
        for head, kept in enumerate(layer.kept[0]):
            rows = maps[layer.layer][0, 2 * head : 2 * head + 2, 60 - window :, : 60 - window].detach()
            best = rows.amax((0, 1))
            threshold = best.sort(descending=True).values[24 - window - 1]
            assert {j for j in range(60 - window) if best[j] > threshold} <= set(kept.tolist())
            assert set(range(60 - window, 60)) <= set(kept.tolist())
            assert len(kept) == 24


def test_without_drafted_tokens_it_needs_no_model():
    prompt = random_prompt(60)
    run = run_method(tiny_model("llama"), SpecKV(keep=20, lookahead=0, window=8), prompt)
    assert run.cache.plan.tokens_kept == 20 * 4


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(InvalidInputError, match="draft: got None"):
        SpecKV()
    with pytest.raises(InvalidInputError, match="draft: got None"):
        parse_method("speckv")
    with pytest.raises(MethodRefusedError, match="very model"), use(model, SpecKV(draft=model)) as session:
        session.new_cache()
    other = tiny_model("llama", vocab_size=65)
    with use(model, SpecKV(draft=other)), pytest.raises(MethodRefusedError, match="of 65 tokens, this one of 64"):
        model.generate(random_prompt(40).ids, max_new_tokens=2)
    for wrong in ({"window": 0}, {"kernel_size": 4}, {"lookahead": -1}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            SpecKV(draft=other, **wrong)
