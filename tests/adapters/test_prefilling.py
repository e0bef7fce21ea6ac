"""Sparse prefill inside models: against the model's own attention under the same pattern, and what is refused."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache

from sparing import BlockTopK, HyperAttention, SnapKV, SpAtten, StreamingLLM, VerticalSlash, use
from sparing.core.pattern import Pattern
from sparing.core.prefill import PromptCall, SparsePrefill
from sparing.errors import CacheStateError, InvalidInputError, MethodRefusedError, UnsupportedModelError
from sparing.testing import TINY_MODELS, Driver, random_prompt, run_method, run_untouched, tiny_model

SIZE = 16


@dataclass(frozen=True)
class Fixed(SparsePrefill):
    """Blocks by a rule of their numbers; `odd`: blocks of an even distance only."""

    block: int = SIZE
    odd: bool = False
    chunks = "any"

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        grid = call.grid(self.block)
        numbers = torch.arange(grid.num_key_blocks)
        apart = numbers[grid.first_block :, None] - numbers
        on = (apart % 2 == 0) if self.odd else (apart >= 0)
        return Pattern(call.tokens, call.start, self.block, on.expand_as(grid.blocks))


EVERYTHING, EVEN = Fixed(0.5, dispatch="always"), Fixed(0.5, odd=True, dispatch="always")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_pattern_of_everything_is_dense_attention(name):
    """Softcaps, sinks, latent attention, sliding layers beside it, pads: all as the model does it."""
    prompt = random_prompt(70, 41)
    try:
        run = run_method(tiny_model(name, torch.float64), EVERYTHING, prompt)
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))
    wanted = run_untouched(tiny_model(name, torch.float64), prompt)
    for step, (mine, theirs) in enumerate(zip(run.logits, wanted, strict=True)):
        real = prompt.mask.bool() if step == 0 else slice(None)
        torch.testing.assert_close(mine[real], theirs[real], atol=TINY_MODELS[name].tolerance, rtol=0)
    assert run.cache.report().prefill.density == 1.0


def even_mask(tokens):
    rows, keys = torch.arange(tokens)[:, None], torch.arange(tokens)
    return ((rows // SIZE - keys // SIZE) % 2 == 0) & (keys <= rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_pattern_is_the_models_attention_under_its_mask(name):
    """The untouched model, given the pattern as a mask of four dimensions; then decoded tokens read everything."""
    prompt = random_prompt(70)
    run = run_method(tiny_model(name, torch.float64), EVEN, prompt)
    model, cache = tiny_model(name, torch.float64), DynamicCache()
    with torch.no_grad():
        logits = [model(prompt.ids, attention_mask=even_mask(70)[None, None], past_key_values=cache).logits]
        logits += [model(prompt.forced[:, [step]], past_key_values=cache).logits[:, -1] for step in range(4)]
    for mine, theirs in zip(run.logits, logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
    density = run.cache.report().prefill.density
    assert density == pytest.approx(even_mask(70).sum().item() / (70 * 71 / 2))


def test_chunks_and_turns_lie_on_one_grid():
    prompt, model = random_prompt(90), tiny_model("llama", torch.float64)
    whole = run_method(model, EVEN, prompt)
    for chunks in ((7, 50, 33), (1, 89)):
        parts = run_method(model, EVEN, prompt, chunks)
        torch.testing.assert_close(parts.logits[0][:, 1:], whole.logits[0][:, 1:], atol=1e-9, rtol=0)
    with use(model, EVEN) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        cache.expect_prompt(40)
        driver.feed(prompt.ids[:, :40])
        cache.expect_prompt(90)
        last = driver.feed(prompt.ids[:, 40:])
    torch.testing.assert_close(last, whole.logits[0][:, 40:], atol=1e-9, rtol=0)


def test_unannounced_tokens_after_the_prompt_read_everything():
    """A question asked of a cache, as the comparison does it."""
    prompt, model = random_prompt(70), tiny_model("llama", torch.float64)
    with use(model, EVEN) as session:
        driver = Driver(model, session.new_cache())
        driver.feed(prompt.ids[:, :60])
        together = driver.feed(prompt.ids[:, 60:])
        single = Driver(model, session.new_cache())
        single.feed(prompt.ids[:, :60])
        alone = torch.cat([single.feed(token) for token in prompt.ids[:, 60:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


def test_drafts_behind_a_prompt_read_everything():
    """Assisted decoding says what greedy decoding says."""
    model, prompt = tiny_model("llama", torch.float64), random_prompt(60)
    said = []
    for more in ({}, {"prompt_lookup_num_tokens": 4}):
        with use(model, EVEN):
            # Early transformers 5 look the end token up even where a model has none.
            ids = model.generate(prompt.ids, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0, **more)
            said.append(ids.tolist())
    assert said[0] == said[1]


@pytest.mark.parametrize("kv", [SnapKV(keep=0.5, window=8), StreamingLLM(keep=30)], ids=lambda m: m.label)
def test_any_kv_method_goes_with_it(kv):
    prompt, model = random_prompt(70, 50), tiny_model("llama")
    run = run_method(model, replace(kv, prefill=EVEN), prompt)
    dense = run_method(model, kv, prompt)
    report = run.cache.report()
    assert report.prefill.density < 0.7
    assert report.plan.tokens_kept == dense.cache.report().plan.tokens_kept
    assert report.bytes_kept == dense.cache.report().bytes_kept
    assert "prompt read by Fixed" in str(report)


def test_readings_do_not_mix():
    model = tiny_model("llama")
    with use(model, SnapKV()) as session:
        with pytest.raises(InvalidInputError, match="read the prompt alike"):
            session.watching_cache([SnapKV(), replace(SnapKV(), prefill=EVEN)])
        cache = session.watching_cache([SnapKV()])
        Driver(model, cache).feed(random_prompt(40).ids)
        with pytest.raises(CacheStateError, match="was not read as"):
            cache.fork(replace(SnapKV(), prefill=EVEN))


def test_what_a_prefill_method_is_not():
    with pytest.raises(MethodRefusedError, match="not what is stored"):
        BlockTopK(bits=4)
    with pytest.raises(MethodRefusedError, match="not what is stored"):
        BlockTopK(prefill=BlockTopK())


def test_masks_that_are_more_than_causal_are_refused():
    model, ids = tiny_model("llama"), random_prompt(40).ids
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    with use(model, EVEN), pytest.raises(UnsupportedModelError, match="more than causal"):
        model(ids, attention_mask=mask)


def test_short_prompts_are_read_densely_where_that_is_faster():
    """With dispatch="auto" two blocks are never worth it, and the report says that everything was computed."""
    prompt, model = random_prompt(30), tiny_model("llama")
    run = run_method(model, replace(EVEN, dispatch="auto"), prompt)
    report = run.cache.report().prefill
    assert report.density == 1.0
    assert report.dense_calls == len(run.cache.evicting)
    for mine, theirs in zip(run.logits, run_untouched(model, prompt), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "method",
    [
        BlockTopK(0.4, block=SIZE, dispatch="always"),
        VerticalSlash(0.4, block=SIZE, dispatch="always"),
        HyperAttention(0.4, block=SIZE, dispatch="always"),
        SpAtten(0.4),
    ],
    ids=lambda method: method.label,
)
def test_gradients_are_those_of_what_is_computed(method):
    """Against differences of the loss, in float64 on a model that falls back to nothing less."""
    model, ids = tiny_model("gpt2", torch.float64), random_prompt(100).ids
    weight = model.transformer.h[0].attn.c_attn.weight
    step = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1)) * 1e-7

    def loss():
        with use(model, method):
            return model(ids).logits.pow(2).mean()

    model.zero_grad()
    loss().backward()
    found = float((weight.grad * step).sum())
    with torch.no_grad():
        weight.add_(step)
        above = loss()
        weight.sub_(2 * step)
        below = loss()
        weight.add_(step)
    torch.testing.assert_close(found, float(above - below) / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", ["xattention", SnapKV()], ids=["a name", "a KV method"])
def test_what_does_not_read_prompts_is_refused(wrong):
    """Otherwise a KV method in this place would be left out without a word."""
    with pytest.raises(InvalidInputError, match="prefill: got"):
        SnapKV(prefill=wrong)


@pytest.mark.parametrize("block", [16.0, "16", 17, 0])
def test_blocks_that_are_none_are_refused(block):
    with pytest.raises(InvalidInputError, match="a multiple of 16"):
        BlockTopK(block=block)


def test_what_is_read_after_a_crop_into_the_prompt_is_dense():
    """It was not announced; a method that reads whole prompts only must not refuse it as a chunk."""
    model, prompt = tiny_model("llama"), random_prompt(70)
    whole = replace(VerticalSlash(0.4, block=SIZE), dispatch="always")
    with torch.no_grad(), use(model, whole) as session:
        cache = session.new_cache()
        cache.expect_prompt(70)
        model(prompt.ids, past_key_values=cache)
        before = cache.report().prefill.density
        cache.crop(50)
        model(prompt.ids[:, 50:60], past_key_values=cache)
    assert cache.get_seq_length() == 60
    assert cache.report().prefill.density == before
