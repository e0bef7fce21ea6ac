"""Answers that do not depend on the order of segments: whole models in float64, and nothing left behind."""

from __future__ import annotations

import itertools

import pytest
import torch
from segment_oracle import BASE, attention_of_a_head
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

import sparing.segments
from sparing.core.segments import SegmentedPrompt
from sparing.errors import CacheStateError, InvalidInputError, UnsupportedModelError
from sparing.models import BUNDLED
from sparing.segments import position_invariant
from sparing.session import use
from sparing.testing import tiny_model
from sparing.testing.inspection import assert_same_trace, trace

MODELS = ["llama", "mistral", "mixtral", "phi3", "qwen3"]
CLOSE = 1e-9
PREFIX, SUFFIX = [1, 2, 3], [20, 21, 22]
SEGMENTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 5, 6, 40, 41]]


def of(segments, suffix=SUFFIX):
    return SegmentedPrompt.of(PREFIX, segments, suffix)


@torch.no_grad()
def logits_as_ordered(session, segments, suffix=SUFFIX):
    """Logits of the suffix with the segments stored and computed in the order given, not the canonical one."""
    prompt = of(segments, suffix)
    output = session.model(torch.tensor([prompt.ids]), past_key_values=session._new_cache(prompt), use_cache=True)
    return output.logits[0, -len(suffix) :]


@torch.no_grad()
def plain_logits(model, segments, suffix=SUFFIX):
    return model(torch.tensor([of(segments, suffix).ids])).logits[0, -len(suffix) :]


# -- orders ----------------------------------------------------------------------------------------------------------


def assert_same_for_all_orders(logits, segments):
    expected = logits(segments)
    for order in itertools.permutations(segments):
        assert (logits(list(order)) - expected).abs().max() < CLOSE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_orders_give_the_same_logits(name, count):
    """24, 6 and 2 orders, each computed in its own order."""
    with position_invariant(tiny_model(name, torch.float64)) as session:
        assert_same_for_all_orders(lambda segments: logits_as_ordered(session, segments), SEGMENTS[:count])


@pytest.mark.parametrize("name", MODELS)
def test_the_check_of_orders_sees_a_plain_model(name):
    model = tiny_model(name, torch.float64)
    with pytest.raises(AssertionError):
        assert_same_for_all_orders(lambda segments: plain_logits(model, segments), SEGMENTS)
    changes = [plain_logits(model, list(order)) - plain_logits(model, SEGMENTS) for order in
               itertools.permutations(SEGMENTS)]  # fmt: skip
    assert max(change.abs().max() for change in changes) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_session_gives_the_same_bits_for_all_orders(dtype):
    with position_invariant(tiny_model("qwen3", dtype)) as session:
        first = session.logits(PREFIX, SEGMENTS, SUFFIX)
        assert first.shape == (3, 64)
        for order in itertools.permutations(SEGMENTS):
            assert torch.equal(session.logits(PREFIX, list(order), SUFFIX), first)


def written_as_ordered(session, prompt, count):
    """What is written after a prompt that is stored and computed in the order given."""
    ids = torch.tensor([prompt.ids])
    output = session.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=session._new_cache(prompt), max_new_tokens=count,
        do_sample=False,
    )  # fmt: skip
    return output[:, ids.shape[1] :]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_generated_tokens_are_the_same_for_all_orders(name):
    with position_invariant(tiny_model(name, torch.float64)) as session:
        written = session.generate(PREFIX, SEGMENTS, SUFFIX, max_new_tokens=8, do_sample=False)
        assert written.shape == (1, 8)
        for order in itertools.permutations(SEGMENTS):
            assert torch.equal(written_as_ordered(session, of(list(order)), 8), written)


def test_segments_of_the_same_tokens_are_tied_and_still_order_free():
    """Without positions the first layer cannot tell them apart: rounding would decide, were it not always the same."""
    segments = [[5, 6, 7], [7, 6, 5], [6, 5, 7], [5, 6, 7]]
    with position_invariant(tiny_model("llama")) as session:
        first = session.logits(PREFIX, segments, SUFFIX)
        for order in itertools.permutations(segments):
            assert torch.equal(session.logits(PREFIX, list(order), SUFFIX), first)


def test_segments_with_the_same_content_are_interchangeable():
    with position_invariant(tiny_model("llama", torch.float64)) as session:
        assert_same_for_all_orders(lambda given: logits_as_ordered(session, given), [[5, 6], [7, 8, 9], [5, 6]])


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_single_segment_is_the_model_itself(name, implementation):
    model = tiny_model(name, torch.float64, attn_implementation=implementation)
    with position_invariant(model) as session:
        mine = session.logits(PREFIX, SEGMENTS[:1], SUFFIX)
        written = session.generate(PREFIX, SEGMENTS[:1], SUFFIX, max_new_tokens=10, do_sample=False)
    # Eager attention takes its softmax in float32: 2^-24 per layer, times what the next ones make of it.
    assert (mine - plain_logits(model, SEGMENTS[:1])).abs().max() < (1e-5 if implementation == "eager" else CLOSE)
    ids = torch.tensor([of(SEGMENTS[:1]).ids])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert torch.equal(written, plain[:, ids.shape[1] :])


def test_two_segments_are_not_the_model_itself():
    model = tiny_model("llama", torch.float64)
    with position_invariant(model) as session:
        mine = session.logits(PREFIX, SEGMENTS[:2], SUFFIX)
    for order in (SEGMENTS[:2], SEGMENTS[1::-1]):
        assert (mine - plain_logits(model, order)).abs().max() > 1e-3


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (3, 4)])
def test_every_token_matters(place):
    segments = [list(segment) for segment in SEGMENTS]
    segments[place[0]][place[1]] = 50
    with position_invariant(tiny_model("llama", torch.float64)) as session:
        change = session.logits(PREFIX, segments, SUFFIX) - session.logits(PREFIX, SEGMENTS, SUFFIX)
        swapped = session.logits(PREFIX, [SEGMENTS[0][::-1], *SEGMENTS[1:]], SUFFIX)
        assert change.abs().max() > 1e-3
        assert (swapped - session.logits(PREFIX, SEGMENTS, SUFFIX)).abs().max() > 1e-3  # order inside counts


def exact_angles(model):
    """Angles in float64, as the definition has them; transformers takes them in float32."""

    def forward(x, position_ids, **kwargs):
        dim = model.config.head_dim
        frequencies = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = (position_ids.double()[..., None] * frequencies).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    model.model.rotary_emb.forward = forward


@torch.no_grad()
def defined_logits(model, segments):
    """The model's layers one after the other, with attention by the definition."""
    prompt = of(segments)
    hidden = model.model.embed_tokens(torch.tensor([prompt.ids]))
    for layer in model.model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            projection(normed)[0].view(len(prompt.ids), -1, attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        group = q.shape[1] // k.shape[1]
        heads = [
            attention_of_a_head(q[:, h], k[:, h // group], v[:, h // group], len(PREFIX), prompt.layout.lengths,
                                attention.scaling)
            for h in range(q.shape[1])
        ]  # fmt: skip
        hidden = hidden + attention.o_proj(torch.cat(heads, dim=-1))[None]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))[0, -len(SUFFIX) :]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_whole_model_is_the_definition(name, count):
    model = tiny_model(name, torch.float64)
    exact_angles(model)
    with position_invariant(model) as session:
        mine = session.logits(PREFIX, SEGMENTS[:count], SUFFIX)
    assert (mine - defined_logits(model, SEGMENTS[:count])).abs().max() < CLOSE
    if count > 1:  # the comparison sees an ordinary model
        assert (plain_logits(model, SEGMENTS[:count]) - defined_logits(model, SEGMENTS[:count])).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_decoding_token_by_token_is_reading_at_once(name):
    with position_invariant(tiny_model(name, torch.float64)) as session, torch.no_grad():
        output = session.generate(
            PREFIX, SEGMENTS, SUFFIX, max_new_tokens=8, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        answer = output.sequences[0].tolist()
        at_once = session.logits(PREFIX, SEGMENTS, SUFFIX + answer)[len(SUFFIX) - 1 : -1]
        ids, cache = session._begin(PREFIX, SEGMENTS, SUFFIX)
        steps = [ids, *torch.tensor(answer)[:-1].view(-1, 1, 1)]
        by_token = torch.stack([session.model(step, past_key_values=cache).logits[0, -1] for step in steps])
    assert len(answer) == 8
    assert (by_token - at_once).abs().max() < CLOSE
    # `generate` hands its logits out in float32: 2^-24 of numbers below 16.
    assert (torch.cat(output.logits) - at_once).abs().max() < 16 * 2.0**-24


# -- ways of generating -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"do_sample": True, "temperature": 2.0}, 1),
        ({"do_sample": True, "num_return_sequences": 3}, 3),
        ({"num_beams": 3, "do_sample": False}, 1),
        ({"num_beams": 4, "num_return_sequences": 2, "do_sample": False}, 2),
    ],
)
def test_sampling_and_beams(options, rows):
    with position_invariant(tiny_model("qwen3", torch.float64)) as session:
        said = []
        for order in (SEGMENTS, SEGMENTS[::-1]):
            torch.manual_seed(3)
            said.append(session.generate(PREFIX, order, SUFFIX, max_new_tokens=10, **options))
    assert said[0].shape == (rows, 10)
    assert torch.equal(*said)


def test_beams_are_the_best_of_all_sequences():
    """Two beams for two tokens, against the probabilities of all pairs of them."""
    with position_invariant(tiny_model("qwen3", torch.float64)) as session:
        said = session.generate(PREFIX, SEGMENTS, SUFFIX, max_new_tokens=2, num_beams=64, do_sample=False)
        first = session.logits(PREFIX, SEGMENTS, SUFFIX)[-1].log_softmax(-1)
        second = [session.logits(PREFIX, SEGMENTS, [*SUFFIX, token])[-1].log_softmax(-1) for token in range(64)]
    pairs = first[:, None] + torch.stack(second)
    assert said[0].tolist() == list(divmod(int(pairs.argmax()), 64))


def test_drafted_tokens_change_nothing():
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": 63}
    model, read = tiny_model("qwen3", torch.float64), []
    with position_invariant(model) as session:
        plain = session.generate(PREFIX, SEGMENTS, SUFFIX, **options)
        model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]),
                                        with_kwargs=True)  # fmt: skip
        drafted = session.generate(PREFIX, SEGMENTS, SUFFIX, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, drafted)
    assert max(read[1:]) > 1
    assert len(read) < 15  # some of what was drafted was taken


def test_calls_of_the_model_itself_are_as_ever():
    model = tiny_model("qwen3")
    ids = torch.tensor([of(SEGMENTS).ids, [*of(SEGMENTS).ids[2:], 4, 4]])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # pads
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    outside = (model(ids, attention_mask=mask).logits, model.generate(ids, **options))
    with position_invariant(model) as session:
        session.generate(PREFIX, SEGMENTS, SUFFIX, max_new_tokens=2)
        inside = (model(ids, attention_mask=mask).logits, model.generate(ids, **options))
    assert all(torch.equal(one, other) for one, other in zip(outside, inside, strict=True))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sparing.segments._OWN)
def test_what_the_session_sets_is_refused(name):
    with position_invariant(tiny_model("llama")) as session, pytest.raises(InvalidInputError, match=name):
        session.generate(PREFIX, SEGMENTS, SUFFIX, **{name: None})


def test_tokens_that_the_model_does_not_know_are_refused():
    with position_invariant(tiny_model("llama")) as session, pytest.raises(InvalidInputError, match="below 64"):
        session.logits(PREFIX, [[5, 64]], SUFFIX)


def test_a_closed_session_is_refused():
    session = position_invariant(tiny_model("llama"))
    with pytest.raises(CacheStateError, match="not open"):
        session.generate(PREFIX, SEGMENTS, SUFFIX)
    with session:
        session.logits(PREFIX, SEGMENTS, SUFFIX)
    with pytest.raises(CacheStateError, match="not open"):
        session.logits(PREFIX, SEGMENTS, SUFFIX)


def test_its_cache_outside_the_block_is_refused():
    """Its keys are not rotated, so what the model itself would read from it is nonsense."""
    model = tiny_model("llama")
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    with position_invariant(model) as session:
        cache = session.generate(PREFIX, SEGMENTS, SUFFIX, **options).past_key_values
    with pytest.raises(CacheStateError, match="outside its session"):
        model(torch.tensor([[5]]), past_key_values=cache)


def test_two_sessions_on_a_model_are_refused():
    model = tiny_model("llama")
    before = trace(model)
    with position_invariant(model) as session:
        said = session.logits(PREFIX, SEGMENTS, SUFFIX)
        with pytest.raises(UnsupportedModelError, match="already in use"):
            position_invariant(model)
        with pytest.raises(UnsupportedModelError, match="already in use"):
            session.__enter__()
        with pytest.raises(UnsupportedModelError, match="already in use"), use(model, sparing.Knorm(keep=0.5)):
            pass
        assert torch.equal(session.logits(PREFIX, SEGMENTS, SUFFIX), said)
    assert_same_trace(before, trace(model))


def test_two_models_at_once_do_not_meet():
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    alone = []
    for model in models:
        with position_invariant(model) as session:
            alone.append(session.logits(PREFIX, SEGMENTS, SUFFIX))
    with position_invariant(models[0]) as first, position_invariant(models[1]) as second:
        both = [session.logits(PREFIX, SEGMENTS, SUFFIX) for session in (first, second)]
    assert all(torch.equal(one, other) for one, other in zip(alone, both, strict=True))


# -- nothing is left behind -------------------------------------------------------------------------------------------


class _Interruption(Exception):
    pass


def warmed(name):
    """A model that has run once, so that what transformers itself installs on first use is there."""
    model = tiny_model(name)
    model.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2), max_new_tokens=2, do_sample=False)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_no_trace(name):
    model = warmed(name)
    before = trace(model)
    session = position_invariant(model)
    assert_same_trace(before, trace(model))
    for _ in range(2):  # a session can be opened again
        with session:
            session.generate(PREFIX, SEGMENTS, SUFFIX, max_new_tokens=3, do_sample=False)
        assert_same_trace(before, trace(model))


def in_the_block(model):
    with position_invariant(model) as session:
        session.logits(PREFIX, SEGMENTS, SUFFIX)
        raise _Interruption


def between_cache_and_attention(model):
    def fail(*args, **kwargs):
        raise _Interruption

    with position_invariant(model) as session:
        AttentionInterface._global_mapping[model.config._attn_implementation] = fail
        session.logits(PREFIX, SEGMENTS, SUFFIX)


@pytest.mark.parametrize("interrupted", [in_the_block, between_cache_and_attention])
def test_no_trace_after_an_exception(interrupted):
    model = warmed("llama")
    plain, before = plain_logits(model, SEGMENTS), trace(model)
    with pytest.raises(_Interruption):
        interrupted(model)
    assert_same_trace(before, trace(model))
    assert torch.equal(plain_logits(model, SEGMENTS), plain)
    with position_invariant(model) as session, position_invariant(tiny_model("llama")) as fresh:
        assert torch.equal(session.logits(PREFIX, SEGMENTS, SUFFIX), fresh.logits(PREFIX, SEGMENTS, SUFFIX))


def test_the_trace_check_sees_a_session_that_is_open():
    model = warmed("llama")
    before = trace(model)
    with position_invariant(model), pytest.raises(AssertionError, match="left behind"):
        assert_same_trace(before, trace(model))


# -- a model that was trained -----------------------------------------------------------------------------------------


def test_the_bundled_model_answers_alike_in_all_orders():
    """Four documents with a fact in each; every order is computed in its own order."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    fact = " The special magic number for {} is: {}."
    filler = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    facts = {"amber river": "48213", "frozen lantern": "90571", "hollow garden": "36428", "silver anchor": "71960"}
    documents = [encode(filler + fact.format(key, value) + filler) for key, value in facts.items()]
    prefix = tokenizer.encode("")
    with position_invariant(AutoModelForCausalLM.from_pretrained(BUNDLED)) as session:
        for key, value in facts.items():
            question = encode(f"\nWhat is the special magic number for {key}? The special magic number for {key} is:")
            said = session.generate(prefix, documents, question, max_new_tokens=6, do_sample=False)
            assert tokenizer.decode(said[0]).strip() == f"{value}."
            for order in itertools.islice(itertools.permutations(documents), 0, None, 4):
                prompt = SegmentedPrompt.of(prefix, list(order), question)
                assert torch.equal(written_as_ordered(session, prompt, 6), said)
