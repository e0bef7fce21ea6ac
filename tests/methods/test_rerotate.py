"""Kept keys that close ranks: positions as in the paper of StreamingLLM, refusals, and generation without end."""

import dataclasses
import functools

import pytest
import torch
from oracles import PlainRotary, random_case

from sparing import AdaptiveHeads, Evict, Rerotate, SnapKV, StreamingLLM, use
from sparing.core.actions import turn
from sparing.errors import MethodRefusedError
from sparing.methods.kv.expected_attention import ExpectedAttentionScore
from sparing.methods.kv.knorm import KeyNorm
from sparing.testing import CHECKS, Driver, held_positions, measured_bytes, random_prompt, run_check, tiny_model

torch.set_num_threads(1)
# Rotations are computed in float32 and keys are a few units large: what is left of float64 after one or two of them.
ROUNDING = 2e-5


def one_layer(**changes):
    return tiny_model("llama", torch.float64, num_hidden_layers=1, **changes)


def fresh(model, ids):
    """What the model says after these tokens alone."""
    with torch.no_grad():
        return model(ids).logits[:, -1]


def test_forth_and_back_is_where_it_was():
    case = random_case(seed=1)
    rotary, keys = PlainRotary(8), case.stored.keys
    steps = torch.arange(keys[..., 0].numel()).view(keys.shape[:3])
    there = turn(keys, steps, rotary)
    torch.testing.assert_close(turn(there, -steps, rotary), keys, atol=ROUNDING, rtol=0)
    assert float((there - keys).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
def test_a_turned_key_is_the_key_of_its_new_position(name):
    """The model's own embedding (partial, scaled): R(p + a) k and R(p) k turned by a are the same."""
    from sparing.adapters.structure import read_structure

    rotary = read_structure(tiny_model(name)).rotary
    raw = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[0, 1, 5, 9, 20]])
    steps = torch.tensor([7, 0, 3, 100, 1])
    turned = turn(rotary.rotate(raw, at), steps.expand(1, 2, 5), rotary)
    torch.testing.assert_close(turned, rotary.rotate(raw, at + steps), atol=ROUNDING, rtol=0)


def test_tokens_that_lose_nothing_behind_them_are_left_bit_for_bit():
    """Of tokens 0..9 of a lane 0, 1, 6, 8, 9 stay: they move up by 5, 5, 1, 0, 0."""
    case = random_case(seed=2, tokens=10, rotary=PlainRotary(8)).alone(0)
    kept = torch.tensor([0, 1, 6, 8, 9])
    folded = Rerotate().apply([[kept, kept]], case.stored, torch.zeros(1, 2, 10))
    assert torch.equal(folded.keys[:, :, 8:], case.stored.keys[:, :, 8:])
    for slot, steps in ((0, 5), (1, 5), (6, 1)):
        wanted = case.stored.rotary.rotate(case.stored.keys[:, :, [slot]], torch.tensor([[steps]]))
        torch.testing.assert_close(folded.keys[:, :, [slot]], wanted, atol=ROUNDING, rtol=0)
    assert torch.equal(folded.positions, case.stored.positions)


@pytest.mark.parametrize("period", [1, 4])
def test_one_layer_says_what_it_says_after_the_kept_tokens_alone(period):
    """While decoding, at every step, also once positions are far beyond what is held."""
    model, prompt = one_layer(), random_prompt(40, steps=30)
    tokens = torch.cat([prompt.ids, prompt.forced], dim=1)[0]
    with use(model, StreamingLLM(keep=12, rerotate=True, period=period)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        cache.report()
        for step in range(30):
            held = held_positions(cache)[0][0][0].tolist()
            logits = driver.feed(prompt.forced[:, [step]])[:, -1]
            visible = torch.tensor([*held, 40 + step])
            assert held[:4] == [0, 1, 2, 3]
            torch.testing.assert_close(logits, fresh(model, tokens[visible][None]), atol=ROUNDING, rtol=0)
    far = fresh(model, tokens[None])
    assert float((far - logits).abs().max()) > 100 * ROUNDING  # so the comparison says something


def test_a_chunk_sees_what_the_last_left_as_if_it_stood_right_before_it():
    model = one_layer()
    prompt = random_prompt(60)
    tokens = prompt.ids[0]
    with use(model, StreamingLLM(keep=10, rerotate=True, moment="chunk_end")) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        cache.expect_prompt(60)
        for start in range(0, 60, 15):
            logits = driver.feed(prompt.ids[:, start : start + 15])[:, -1]
            left = [*range(4), *range(start - 6, start)] if start else []
            visible = torch.tensor([*left, *range(start, start + 15)])
            torch.testing.assert_close(logits, fresh(model, tokens[visible][None]), atol=ROUNDING, rtol=0)


def test_ragged_heads_and_drafted_tokens_behind_the_prompt():
    """Each head closes its own ranks; tokens that came together with the prompt's end stay where they are."""
    model = one_layer(num_attention_heads=2, num_key_value_heads=2)
    prompt = random_prompt(50, steps=3)
    with use(model, Evict(keep=0.4, scorer=KeyNorm(recent=0), action=Rerotate())) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        cache.expect_prompt(47)
        driver.feed(prompt.ids)
        before = cache.evicting[0].keys.clone()
        cache.report()
        stored = cache.evicting[0].stored_tokens()
    rotary = cache.structure.rotary
    for head in range(2):
        held = stored.positions[0, head].tolist()
        assert held[-3:] == [47, 48, 49]
        assert torch.equal(stored.keys[0, head, -3:], before[0, head, 47:50])
        for slot, position in enumerate(held[:-3]):
            raw = rotary.unrotate(before[:, [head], position : position + 1], torch.tensor([[position]]))
            wanted = rotary.rotate(raw, torch.tensor([[50 - len(held) + slot]]))[0, 0, 0]
            torch.testing.assert_close(stored.keys[0, head, slot].float(), wanted, atol=ROUNDING, rtol=0)


def test_generation_far_beyond_the_trained_length_at_a_fixed_size():
    model = tiny_model("llama", max_position_embeddings=64)
    prompt = random_prompt(50)
    sizes = set()
    with use(model, StreamingLLM(keep=24, rerotate=True)) as session:
        cache = session.new_cache()
        model.generate(prompt.ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
        for _ in range(4):
            ids = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.int64)
            model.generate(ids, past_key_values=cache, max_new_tokens=100, do_sample=False)
            sizes.add(measured_bytes(cache))
            lengths = {len(head) for rows in held_positions(cache).values() for head in rows[0]}
            assert lengths == {24}
    assert cache.get_seq_length() > 400
    assert max(sizes) <= 2 * 2 * (24 + 16 + 1) * (2 * 8 * 4 + 4) + 1000


@pytest.mark.parametrize("name", ["gpt2", "jamba", "deepseek_v3"])
def test_models_whose_keys_cannot_be_turned_are_refused_by_name(name):
    model = tiny_model(name)
    with (
        use(model, StreamingLLM(keep=24, rerotate=True)),
        pytest.raises(MethodRefusedError, match="other positions"),
    ):
        model.generate(random_prompt(50).ids, max_new_tokens=4)


def test_an_embedding_that_depends_on_the_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope)
    with use(model, SnapKV(keep=24)):
        model.generate(random_prompt(50).ids, max_new_tokens=2)
    with use(model, StreamingLLM(keep=24, rerotate=True)), pytest.raises(MethodRefusedError, match="other positions"):
        model.generate(random_prompt(50).ids, max_new_tokens=4)


def test_scorers_that_turn_keys_back_are_refused():
    with pytest.raises(MethodRefusedError, match="turns keys back"):
        Evict(keep=0.5, scorer=ExpectedAttentionScore(), action=Rerotate())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_thousand_turns_lose_no_more_than_one(dtype):
    """Sinks after 1000 decoded tokens are the first ones turned once. Turned step by step in bfloat16 they would be
    far off: steps of one position are smaller than its rounding in the slow channels.
    """
    model = tiny_model("llama", dtype, num_hidden_layers=1)
    prompt = random_prompt(40, 30)
    with use(model, StreamingLLM(keep=20, rerotate=True)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        first = cache.evicting[0].keys.clone()
        cache.report()
        token = prompt.forced[:, :1]
        for _ in range(1000):
            driver.feed(token)
        stored = cache.evicting[0].stored_tokens()
    for row, pad in enumerate((0, 10)):
        steps = torch.full((1, 2, 4), 1040 - 20 - pad)
        wanted = turn(first[[row], :, pad : pad + 4], steps, cache.structure.rotary)
        limit = 0.0 if dtype != torch.float32 else 1e-4 * float(first.abs().max())
        torch.testing.assert_close(stored.keys[[row], :, :4], wanted, atol=limit, rtol=0)


def test_originals_change_places_with_their_rows():
    model, prompt = tiny_model("llama", torch.bfloat16), random_prompt(40, 30)
    with use(model, StreamingLLM(keep=20, rerotate=True)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        cache.report()
        driver.decode(prompt)
        before = cache.evicting[0].originals.lanes
        cache.reorder_cache(torch.tensor([1, 0]))
        after = cache.evicting[0].originals.lanes
    assert all(torch.equal(a, before[i]) for a, i in zip(after, (2, 3, 0, 1), strict=True))
    assert {len(lane) for lane in before} == {4}


PROMISES = ("output_is_faithful", "padded_rows_equal_single_rows", "every_turn_is_compressed", "size_while_decoding",
            "bytes_are_real", "actions_stay_in_their_head", "bfloat16_error_is_bounded",
            "clones_are_independent")  # fmt: skip


@pytest.mark.parametrize("model", ["llama", "phi3"])
@pytest.mark.parametrize("promise", PROMISES)
def test_contract_while_decoding(promise, model):
    run_check(CHECKS[promise], functools.partial(StreamingLLM, rerotate=True), model)


@pytest.mark.parametrize("promise", PROMISES)
def test_contract_with_ragged_heads(promise):
    ragged = functools.partial(Evict, scorer=KeyNorm(), allocator=AdaptiveHeads(), action=Rerotate())
    run_check(CHECKS[promise], ragged, "llama")


def test_a_wrong_turn_is_found(monkeypatch):
    """The tests above would notice keys that are turned one position too far."""
    apply = Rerotate.apply

    def wrong(self, kept, stored, scores):
        folded = apply(self, kept, stored, scores)
        steps = torch.ones_like(stored.positions)
        return dataclasses.replace(folded, keys=turn(folded.keys, steps, stored.rotary))

    monkeypatch.setattr(Rerotate, "apply", wrong)
    with pytest.raises(AssertionError):
        test_one_layer_says_what_it_says_after_the_kept_tokens_alone(4)
    with pytest.raises(AssertionError):
        test_ragged_heads_and_drafted_tokens_behind_the_prompt()
