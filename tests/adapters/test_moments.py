"""When something is dropped: after chunks, at every step, at the end of turns, and never below `min_prompt`."""

import pytest
import torch
from transformers.cache_utils import Cache

from sparing import AdaptiveHeads, Evict, KeyDiff, Pyramid, SnapKV, StreamingLLM, use
from sparing.core.actions import Action, Drop
from sparing.core.method import methods
from sparing.errors import InvalidInputError, MethodRefusedError, UnsupportedModelError
from sparing.methods.kv.expected_attention import ExpectedAttentionScore
from sparing.methods.kv.h2o import AccumulatedAttention
from sparing.methods.kv.keydiff import KeyDifference
from sparing.methods.kv.knorm import KeyNorm
from sparing.methods.kv.snapkv import WindowAttention
from sparing.testing import (
    TINY_MODELS,
    Driver,
    held_positions,
    measured_bytes,
    random_prompt,
    run_untouched,
    tiny_model,
)

torch.set_num_threads(1)
PER_TOKEN = 2 * 8 * 4 + 4  # a key and a value of 8 float32, and an int32 position
SLACK = 16 + 1  # places that every lane has to spare, and the token that was just appended


def held(cache):
    return [head for rows in held_positions(cache).values() for row in rows for head in row]


# -- chunk ends ------------------------------------------------------------------------------------------------------


def watched_bytes(model, cache):
    """Bytes alive after the attention of every layer, in the middle of forwards; and the handles to stop it."""
    sizes = []
    layers = [layer.self_attn for layer in model.model.layers]
    return sizes, [m.register_forward_hook(lambda *_: sizes.append(measured_bytes(cache))) for m in layers]


@pytest.mark.parametrize(
    "scorer", [KeyNorm(), KeyDifference(), WindowAttention(window=8), AccumulatedAttention()], ids=str
)
def test_no_more_than_budget_and_chunk_is_alive_in_the_middle_of_any_forward(scorer):
    """4 lanes of at most 24 + 32 tokens with as much room as one more chunk, or 16; and scores, rows and numbers."""
    model, prompt = tiny_model("llama"), random_prompt(40 * 32)
    with use(model, Evict(keep=24, scorer=scorer, moment="chunk_end")) as session:
        cache = session.new_cache()
        sizes, handles = watched_bytes(model, cache)
        session.prefill(prompt.ids, chunk_size=32, cache=cache)
        for handle in handles:
            handle.remove()
    assert len(sizes) == 80
    rows = 2 * 4 * 8 * 8 * 4  # queries of the window, in two layers
    most = 4 * (24 + 32 + 32) * (PER_TOKEN + 4) + rows + 4 * 8 * 4 + 4 * (24 + 32) * 4 * 2
    assert max(sizes) <= most
    assert max(sizes) < 0.1 * 4 * 40 * 32 * 64  # of the whole prompt's keys and values
    assert {len(head) for head in held(cache)} == {24}


def test_keydiff_block_by_block_is_the_papers_loop():
    """After every block: the anchor of what is left and the block, and the 20 keys farthest from it stay."""
    model, prompt = tiny_model("llama", torch.float64), random_prompt(90)
    dense = tiny_model("llama", torch.float64, num_hidden_layers=1)
    dense.load_state_dict(model.state_dict(), strict=False)
    with use(model, KeyDiff(keep=20, recent=0, moment="chunk_end")) as session:
        cache = session.prefill(prompt.ids, chunk_size=15)
        mine = held_positions(cache)[0][0]
    with torch.no_grad():
        keys = dense(prompt.ids, use_cache=True).past_key_values.layers[0].keys[0]  # the first layer's never change
    for head in range(2):
        left = []
        for start in range(0, 90, 15):
            left += range(start, start + 15)
            unit = [keys[head, j] / keys[head, j].norm() for j in left]
            anchor = sum(unit) / len(unit)
            near = {j: float(u @ anchor / anchor.norm()) for j, u in zip(left, unit, strict=True)}
            left = sorted(sorted(left, key=near.__getitem__)[:20])
        assert mine[head].tolist() == left


def test_streaming_llm_chunk_by_chunk_keeps_sinks_and_the_newest():
    with use(tiny_model("llama"), StreamingLLM(keep=10, moment="chunk_end")) as session:
        cache = session.prefill(random_prompt(61).ids, chunk_size=7)
    assert {tuple(head.tolist()) for head in held(cache)} == {(0, 1, 2, 3, 55, 56, 57, 58, 59, 60)}


def test_decoded_tokens_stay_and_the_next_turn_is_compressed_again():
    model, prompt = tiny_model("llama"), random_prompt(60)
    with use(model, KeyDiff(keep=20, moment="chunk_end")) as session:
        cache = session.prefill(prompt.ids, chunk_size=25)
        longer = torch.cat([prompt.ids, random_prompt(1, seed=3).ids], dim=1)
        said = model.generate(longer, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert {len(head) for head in held(cache)} == {25}
        assert said.shape[1] == 67
        again = torch.cat([said, random_prompt(30, seed=4).ids], dim=1)
        session.prefill(again, chunk_size=10, cache=cache)
        assert {len(head) for head in held(cache)} == {20}
        assert cache.get_seq_length() == 97


# -- every step ------------------------------------------------------------------------------------------------------

ENDLESS = [
    (WindowAttention(window=16), 48, 8), (KeyDifference(), "16KiB", 0.25), (ExpectedAttentionScore(n_future=8), 40, 32),
    (KeyNorm(), "12KiB", 4),
]  # fmt: skip


@pytest.mark.parametrize(("scorer", "keep", "period"), ENDLESS, ids=lambda x: str(x).split("(")[0])
def test_thousands_of_tokens_at_a_fixed_size(scorer, keep, period):
    """Keys and values are within the budget at every step, and all bytes within it, the slack and the scorer's rows."""
    model = tiny_model("llama", num_hidden_layers=1)
    prompt, steps = random_prompt(70), 1000
    budget = int(keep[:-3]) * 1024 if isinstance(keep, str) else 2 * keep * 64
    method = Evict(keep=keep, scorer=scorer, moment="every_step", period=period)
    with use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        cache.report()
        token, sizes, lengths = prompt.ids[:, -1:], [], []
        for step in range(steps):
            token = 1 + (driver.feed(token)[:, -1].argmax(-1, keepdim=True) + step) % 63
            store = cache.evicting[0].store
            lengths.append(int(store.lengths.max()))
            assert int(store.lengths.sum()) * 64 <= budget
            if 200 <= step < 300 or step >= steps - 100:
                sizes.append(measured_bytes(cache))
    most = max(lengths)
    dropped = max(int(period * most), 1) if isinstance(period, float) else period
    assert min(lengths[200:]) == most - dropped + 1
    pending = 32 * 4 * 8 * 4  # queries that wait
    state = 2 * (16 + 32) * 4 * 8 * 4 + 4 * (8 * 8 + 8) * 4
    assert max(sizes) <= 2 * (most + SLACK) * PER_TOKEN + pending + state + 2000
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[: len(sizes) // 2])


def test_budgets_of_an_allocator_are_kept_while_decoding():
    """A number of tokens is spread over heads by the allocator at the prompt's end, and stays so."""
    model, prompt = tiny_model("llama"), random_prompt(80, steps=12)
    for allocator in (AdaptiveHeads(floor=0.0), Pyramid(beta=4, window=8)):
        with use(model, Evict(24, WindowAttention(window=8), allocator, "every_step")) as session:
            cache = session.new_cache()
            driver = Driver(model, cache)
            driver.read(prompt)
            planned = [len(head) for layer in cache.report().plan.layers for head in layer.kept[0]]
            assert len(set(planned)) > 1
            driver.decode(prompt)
        assert [len(head) for head in held(cache)] == planned
        assert sum(planned) == 24 * 4


def test_sums_that_go_on_step_by_step_are_the_sums_of_asking_again():
    """H2O keeps its sums as tokens come, and is asked again where an action needs tokens in order: the same tokens."""

    class Plain(Action):
        """What is not kept is gone, in a way that the shortcut of single steps does not know."""

    prompt, found = random_prompt(60, 41, steps=30), []
    for action in (Drop(), Plain()):
        model = tiny_model("llama", torch.float64)
        method = Evict(24, AccumulatedAttention(), moment="every_step", action=action)
        assert method.parts().scores_again == (type(action) is Plain)
        with use(model, method) as session:
            cache = session.new_cache()
            driver = Driver(model, cache)
            driver.read(prompt)
            cache.report()
            driver.decode(prompt)
            found.append([head.tolist() for head in held(cache)])
    assert found[0] == found[1]


def test_decoded_queries_are_shown_before_those_of_the_next_turn():
    """Of the last 16 rows after 9 decoded tokens and a turn of 4, all are known, none twice."""
    model, prompt = tiny_model("llama"), random_prompt(60, steps=9)
    with use(model, Evict(40, WindowAttention(window=16), moment="every_step", period=20)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        cache.report()
        driver.decode(prompt)
        cache.expect_prompt(73)
        driver.feed(random_prompt(4, seed=5).ids)
        cache.report()
        for layer in cache.evicting:
            assert layer.states[cache.scorers[0]].positions.tolist() == list(range(57, 73))


@pytest.mark.parametrize("scorer", [WindowAttention(), AccumulatedAttention(), KeyNorm()], ids=str)
def test_beams_change_places_without_harm(scorer):
    """Nothing is dropped, so the beams must say what they say without sparing."""
    prompt = random_prompt(40)
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    wanted = tiny_model("llama").generate(prompt.ids, **settings)
    model = tiny_model("llama")
    with use(model, Evict(10_000, scorer, moment="every_step")):
        assert torch.equal(model.generate(prompt.ids, **settings), wanted)
    with use(model, Evict(20, scorer, moment="every_step")):
        model.generate(prompt.ids, **settings)


def test_a_short_prompt_may_fill_up_to_min_prompt_and_not_beyond():
    """A ratio fixes the size at the prompt's end: of 10 tokens none is lost, and 32 may be held from then on."""
    model, prompt = tiny_model("llama"), random_prompt(10, steps=40)
    with use(model, StreamingLLM(keep=0.25)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        assert cache.report().plan.share == 1.0
        sizes = []
        for step in range(40):
            driver.feed(prompt.forced[:, [step]])
            sizes.append({len(head) for head in held(cache)})
    assert sizes == [{min(11 + step, 32)} for step in range(40)]


def test_what_cannot_be_asked_again_is_refused_when_it_is_built():
    fixed = {name: info.recipe().parts() for name, info in methods().items() if not (info.needs or info.needs_draft)}
    can = {name: p.scorer.state_outlives_eviction or p.scorer.accumulates for name, p in fixed.items() if p.frees}
    for name in can:
        if can[name]:
            Evict(scorer=fixed[name].scorer, moment="chunk_end")
            continue
        with pytest.raises(MethodRefusedError, match="dropped in parts"):
            Evict(scorer=fixed[name].scorer, moment="chunk_end")
    assert can["snapkv"]
    assert not can["kvzip"]


# -- reading in chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 48, 1000])
def test_prefill_and_generate_say_what_generate_says(chunk_size):
    """Everything is kept, so only positions, masks and the cache's hand-over are tested: a padded batch, two turns."""
    prompt = random_prompt(48, 29)
    turn = random_prompt(12, 12, seed=2)
    plain = tiny_model("llama")
    model = tiny_model("llama")
    settings = {"max_new_tokens": 5, "do_sample": False}
    wanted = plain.generate(prompt.ids, attention_mask=prompt.mask, **settings)
    with use(model, SnapKV(keep=10_000)) as session:
        cache = session.prefill(prompt.ids[:, :-1], chunk_size, prompt.mask[:, :-1])
        assert cache is session.cache
        said = model.generate(prompt.ids, attention_mask=prompt.mask, past_key_values=cache, **settings)
        assert torch.equal(said, wanted)
        ids = torch.cat([said, turn.ids], dim=1)
        mask = torch.cat([prompt.mask, torch.ones_like(ids[:, 48:])], dim=1)
        session.prefill(ids[:, :-1], chunk_size, mask[:, :-1], cache)
        answer = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(answer, plain.generate(ids, attention_mask=mask, **settings))


def test_prefill_compresses_at_its_end_what_a_prompt_at_once_would_be():
    prompt = random_prompt(70)
    plans = []
    for chunk_size in (9, 70):
        with use(tiny_model("llama", torch.float64), SnapKV(keep=0.3)) as session:
            plans.append(session.report(session.prefill(prompt.ids, chunk_size)).plan)
    assert plans[0].tokens_kept == 21 * 4
    assert {share for layer in plans[0].overlap(plans[1]) for share in layer} == {1.0}


def test_prefill_refuses_what_it_cannot_read():
    model, prompt = tiny_model("llama"), random_prompt(20)
    with use(model, SnapKV()) as session:
        cache = session.prefill(prompt.ids)
        with pytest.raises(InvalidInputError, match="more than the 20 that the cache has read"):
            session.prefill(prompt.ids, cache=cache)
        with pytest.raises(InvalidInputError, match="chunk_size: got 0"):
            session.prefill(prompt.ids, chunk_size=0)
        with pytest.raises(InvalidInputError, match="more tokens than the cache has read"):
            model.generate(prompt.ids, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "deepseek_v3", "jamba"])
def test_prefill_on_other_structures(name):
    """What the model says after the same chunks through its own cache."""
    prompt = random_prompt(40)
    model = tiny_model(name)
    if TINY_MODELS[name].recurrent and not hasattr(Cache, "has_previous_state"):
        with pytest.raises(UnsupportedModelError, match="install a newer transformers"):
            use(model, SnapKV())
        return
    with use(model, SnapKV(keep=10_000)) as session:
        cache = session.prefill(prompt.ids, chunk_size=9)
        logits = Driver(model, cache)
        logits.mask = prompt.mask
        mine = [logits.feed(prompt.forced[:, [0]])[:, -1]]
    wanted = run_untouched(tiny_model(name), prompt, [9, 9, 9, 9, 4])[1]
    torch.testing.assert_close(mine[0], wanted, atol=1e-5, rtol=1e-5)
