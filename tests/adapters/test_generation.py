"""Every way in which transformers generates, with a compressed cache, against a slow replay token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

import sparing
from sparing.adapters.cache import EvictingCache
from sparing.core.method import Method
from sparing.errors import SparingError
from sparing.session import Session
from sparing.testing import random_prompt, tiny_model

MODELS = ("llama", "gemma3", "deepseek_v3")
STEPS = 10
NEVER = 10_000  # a token that does not exist: transformers 5.4 looks prompts up only if there is an end token
METHODS = {
    "snapkv": sparing.SnapKV(keep=0.4, window=8),
    "adakv": sparing.AdaKV(keep=0.4),
    "keydiff+global": sparing.Evict(keep=0.4, scorer=sparing.KeyDiff().parts().scorer, allocator=sparing.GlobalTopK()),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param).double()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    # With a mask given, a token that happens to be the pad token is a token.
    options = {"attention_mask": torch.ones_like(ids)} | options
    options = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    } | options
    return model.generate(ids, **options)


@torch.no_grad()
def replay(session: Session, sequence: Tensor, prompt_length: int) -> Tensor:
    """(steps, V) logits of a fresh cache that reads the prompt at once and then the sequence token by token."""
    cache = session.new_cache()
    cache.expect_prompt(prompt_length)
    rows = [session.model(sequence[None, :prompt_length], past_key_values=cache).logits[0, -1]]
    for token in sequence[prompt_length:-1]:
        rows.append(session.model(token[None, None], past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


def assert_replayed(session: Session, output: Any, prompt_length: int) -> None:
    expected = replay(session, output.sequences[0], prompt_length)
    assert torch.allclose(torch.stack(output.logits)[:, 0], expected.to(output.logits[0].dtype), atol=1e-6)


def test_greedy(model: Any, method: Method) -> None:
    ids = random_prompt().ids
    with sparing.use(model, method) as session:
        output = generate(model, ids)
        assert session.cache is not None
        assert session.cache.plan is not None
        assert session.cache.plan.share == pytest.approx(0.4, abs=0.02)
        assert_replayed(session, output, ids.shape[1])


def test_sampling_draws_what_the_replay_would(model: Any, method: Method) -> None:
    ids = random_prompt().ids
    with sparing.use(model, method) as session:
        torch.manual_seed(1)
        output = generate(model, ids, do_sample=True, temperature=1.5)
        torch.manual_seed(1)
        assert torch.equal(generate(model, ids, do_sample=True, temperature=1.5).sequences, output.sequences)
        assert_replayed(session, output, ids.shape[1])


def test_beam_scores_are_the_log_probabilities_of_the_replay(model: Any, method: Method) -> None:
    ids = random_prompt().ids
    with sparing.use(model, method) as session:
        output = generate(model, ids, num_beams=4, num_return_sequences=3, length_penalty=0.0, output_scores=True)
        for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
            logits = replay(session, sequence, ids.shape[1]).log_softmax(-1)
            chosen = logits.gather(-1, sequence[ids.shape[1] :, None]).sum()
            assert float(chosen) == pytest.approx(float(score), abs=1e-5)


@torch.no_grad()
def greedy_after(session: Session, ids: Tensor, sequence: Tensor, accepted: int) -> list[int]:
    """The greedy choices along a sequence whose first `accepted` tokens were drafted with the prompt itself.

    Those are verified in the forward that reads the prompt, before anything can be dropped.
    """
    length = ids.shape[1]
    cache = session.new_cache()
    cache.expect_prompt(length)
    rows = list(session.model(sequence[None, : length + accepted], past_key_values=cache).logits[0, length - 1 :])
    for token in sequence[length + accepted : -1]:
        rows.append(session.model(token[None, None], past_key_values=cache).logits[0, -1])
    return [int(row.argmax()) for row in rows]


def assert_greedy_for_some_draft(session: Session, ids: Tensor, sequence: Tensor) -> None:
    wanted = sequence[ids.shape[1] :].tolist()
    assert wanted in [greedy_after(session, ids, sequence, accepted) for accepted in range(STEPS)]


def test_prompt_lookup_is_greedy(model: Any, method: Method) -> None:
    if "gemma3" in model.config.model_type and not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"):
        pytest.skip("this version of transformers cannot take drafted tokens back from its sliding layers")
    ids = random_prompt().ids
    ids[:, -8:] = ids[:, :8]  # so that there is something to look up
    with sparing.use(model, method) as session:
        sequence = generate(model, ids, prompt_lookup_num_tokens=3, eos_token_id=NEVER).sequences[0]
        assert session.report().plan is not None
        assert_greedy_for_some_draft(session, ids, sequence)


def test_assisted_generation_is_greedy(method: Method) -> None:
    model, drafter = tiny_model("llama").double(), tiny_model("llama").double()
    ids = random_prompt().ids
    with sparing.use(model, method) as session:
        sequence = generate(model, ids, assistant_model=drafter).sequences[0]
        assert session.report().plan is not None
        assert_greedy_for_some_draft(session, ids, sequence)


def test_a_drafter_with_compressed_caches_leaves_the_answer_alone(method: Method) -> None:
    model, drafter = tiny_model("llama").double(), tiny_model("llama").double()
    ids = random_prompt().ids
    greedy = generate(model, ids).sequences
    caches: list[EvictingCache] = []
    with sparing.use(drafter, method) as session:
        make = session.new_cache
        session.new_cache = lambda: caches.append(make()) or caches[-1]  # type: ignore[method-assign, return-value]
        assert torch.equal(generate(model, ids, assistant_model=drafter).sequences, greedy)
    assert any(cache.plan is not None for cache in caches)


def test_a_padded_batch_gives_what_its_rows_give(model: Any, method: Method) -> None:
    prompt = random_prompt(64, 40)
    with sparing.use(model, method):
        batch = generate(model, prompt.ids, attention_mask=prompt.mask).sequences
        for row, pads in enumerate(prompt.pads):
            alone = generate(model, prompt.ids[row : row + 1, pads:]).sequences
            assert torch.equal(batch[row, pads:], alone[0])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_gives_the_same_answer_and_size(chunk: int, model: Any, method: Method) -> None:
    ids = random_prompt().ids
    with sparing.use(model, method) as session:
        whole = generate(model, ids).sequences
        size = session.report().bytes_kept
        assert torch.equal(generate(model, ids, prefill_chunk_size=chunk).sequences, whole)
        assert session.report().bytes_kept == size


def test_several_turns_on_one_cache(model: Any, method: Method) -> None:
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        ids = random_prompt().ids
        for turn in range(3):
            output = generate(model, ids, past_key_values=cache).sequences
            assert cache.get_seq_length() == output.shape[1] - 1
            assert cache.plan is not None
            held = cache.plan.tokens_kept / (ids.shape[1] * sum(len(p.kept[0]) for p in cache.plan.layers))
            assert held <= 0.4 + 0.02
            ids = torch.cat([output, random_prompt(20, seed=turn).ids], dim=1)


def test_two_caches_alive_at_once_do_not_meet(model: Any, method: Method) -> None:
    first, second = random_prompt(seed=1).ids, random_prompt(seed=2).ids

    def steps(cache: EvictingCache, ids: Tensor) -> Any:
        cache.expect_prompt(ids.shape[1])
        with torch.no_grad():
            token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            while True:
                yield int(token)
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    with sparing.use(model, method) as session:
        alone = [generate(model, ids).sequences[0, ids.shape[1] :].tolist() for ids in (first, second)]
        runs = [steps(session.new_cache(), ids) for ids in (first, second)]
        together = [(next(runs[0]), next(runs[1])) for _ in range(STEPS)]
    assert [list(run) for run in zip(*together, strict=True)] == alone


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])  # transformers' sliding layers cannot be cropped by hand
def test_cropping_behind_the_prompt_takes_tokens_back(name: str, method: Method) -> None:
    model = tiny_model(name).double()
    ids = random_prompt().ids
    extra = random_prompt(5, seed=3).ids
    with sparing.use(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        cache.expect_prompt(ids.shape[1])
        model(ids, past_key_values=cache)
        model(extra[:, :1], past_key_values=cache)
        expected = model(extra[:, 1:2], past_key_values=cache.clone()).logits
        model(extra[:, 1:], past_key_values=cache)
        cache.crop(-4)
        assert torch.allclose(model(extra[:, 1:2], past_key_values=cache).logits, expected, atol=1e-9)
        with pytest.raises(SparingError, match="newest lie behind"):
            cache.crop(-(ids.shape[1] // 2))


def test_keep_all_is_the_untouched_model_for_beams_too(model: Any) -> None:
    ids = random_prompt().ids
    plain = generate(model, ids, num_beams=3).sequences
    with sparing.use(model, sparing.SnapKV(keep=1.0)):
        assert torch.equal(generate(model, ids, num_beams=3).sequences, plain)


@pytest.mark.parametrize("name", ["h2o", "tova", "streaming_llm"])
def test_methods_that_follow_decoding_stay_at_their_size(name: str) -> None:
    model, ids = tiny_model("llama"), random_prompt().ids
    with sparing.use(model, sparing.parse_method(name, keep=24)) as session:
        generate(model, ids, max_new_tokens=40)
        assert session.cache is not None
        for layer in session.cache.evicting:
            assert layer.store is not None
            assert set(layer.store.lengths.tolist()) == {24}


def test_a_fork_that_keeps_all_holds_nothing_of_the_others() -> None:
    model, ids = tiny_model("llama"), random_prompt().ids
    full = sparing.SnapKV(keep=1.0)
    with sparing.use(model, full) as session, torch.no_grad():
        cache = session.watching_cache([sparing.H2O(), sparing.SnapKV()])
        cache.expect_prompt(ids.shape[1])
        model(ids, past_key_values=cache)
        fork = cache.fork(full)
        assert fork.bytes_kept == fork.bytes_full
        assert cache.fork(sparing.H2O(keep=0.5)).bytes_kept < fork.bytes_full
        with pytest.raises(SparingError, match="did not watch"):
            cache.fork(sparing.TOVA(keep=0.5))


def test_a_paused_session_leaves_the_model_as_it_was_and_goes_on() -> None:
    """In the pause the model is its own, also after an error; a cache that was filled before is read on afterwards."""
    model, prompt = tiny_model("llama", torch.float64), random_prompt(60).ids
    whole = model(prompt).logits
    with sparing.use(model, sparing.SnapKV(0.25)) as session:
        cache = session.prefill(prompt)
        expected = model(prompt[:, :1], past_key_values=cache.clone()).logits
        with session.paused():
            assert "generate" not in vars(model)
            assert torch.equal(model(prompt).logits, whole)
        with pytest.raises(KeyError), session.paused():
            raise KeyError
        assert torch.equal(model(prompt[:, :1], past_key_values=cache).logits, expected)
    assert torch.equal(model(prompt).logits, whole)
