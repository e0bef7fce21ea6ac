"""Checks that nothing is left behind, and that two users of the library do not meet."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from sparing.adapters.cache import EvictingCache
from sparing.errors import SparingError
from sparing.session import use
from sparing.testing.checks.common import MethodFactory, assert_close, assert_raises, assert_same_kept
from sparing.testing.driving import Driver, random_prompt, run_method, run_untouched
from sparing.testing.inspection import assert_same_trace, held_positions, trace
from sparing.testing.models import tiny_model


class _Interruption(Exception):
    """Raised on purpose inside a block."""


def _warmed(name: str) -> Any:
    """A model that has run once, so that what transformers itself installs on first use is there."""
    model = tiny_model(name)
    model.generate(random_prompt(5).ids, max_new_tokens=2, do_sample=False)
    return model


def _assert_as_before(model: Any, name: str, before: dict[str, Any]) -> None:
    assert_same_trace(before, trace(model))
    prompt = random_prompt(33, 20)
    for mine, theirs in zip(run_untouched(model, prompt), run_untouched(tiny_model(name), prompt), strict=True):
        assert torch.equal(mine, theirs), "the model says something else than before the session"


def check_leaves_no_trace(make: MethodFactory, name: str) -> None:
    """After the block everything is as found: hooks, attributes, configuration, weights, transformers (promise 6)."""
    model = _warmed(name)
    model.note = "of the user's own"
    before = trace(model)
    with use(model, make(keep=0.5)):
        model.generate(random_prompt(40).ids, max_new_tokens=3, do_sample=False)
    _assert_as_before(model, name, before)


def check_keeps_the_users_generate(make: MethodFactory, name: str) -> None:
    """A `generate` that the user has put on the model is called inside the block and is there after it (promise 6)."""
    model = _warmed(name)
    calls = []
    original = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    model.generate = generate
    before = trace(model)
    with use(model, make(keep=0.5)):
        model.generate(random_prompt(40).ids, max_new_tokens=2, do_sample=False)
    assert calls, "the user's own generate was not called"
    _assert_as_before(model, name, before)


def check_leaves_no_trace_after_an_exception(make: MethodFactory, name: str) -> None:
    """The same when the block is left by an exception, also by one in the middle of a forward (promise 6)."""
    model = _warmed(name)
    before = trace(model)

    def in_the_block() -> None:
        with use(model, make(keep=0.5)):
            model.generate(random_prompt(40).ids, max_new_tokens=3, do_sample=False)
            raise _Interruption

    assert_raises(_Interruption, in_the_block, "an exception in the block")
    _assert_as_before(model, name, before)
    for step in (1, 2):
        assert_raises(_Interruption, partial(_interrupted_forward, model, make, step), "one in a forward")
        _assert_as_before(model, name, before)
    run = run_method(model, make(keep=0.5), random_prompt(40))
    fresh = run_method(tiny_model(name), make(keep=0.5), random_prompt(40))
    assert torch.equal(run.logits[-1], fresh.logits[-1]), "a session after an interrupted one says something else"


def _interrupted_forward(model: Any, make: MethodFactory, step: int) -> None:
    """Raise inside the given forward, between a layer's cache update and its attention."""
    from transformers import AttentionInterface

    calls = 0
    with use(model, make(keep=0.5)) as session:
        driver = Driver(model, session.new_cache())
        if step == 2:
            driver.read(random_prompt(40))

        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            raise _Interruption

        name = model.config._attn_implementation
        held = AttentionInterface._global_mapping[name]
        AttentionInterface._global_mapping[name] = fail
        try:
            driver.feed(random_prompt(1).ids if step == 2 else random_prompt(40).ids)
        finally:
            AttentionInterface._global_mapping[name] = held


def check_nested_use_is_refused(make: MethodFactory, name: str) -> None:
    """A second session on the same model is refused by name, and harms neither the first nor the model."""
    model = _warmed(name)
    before = trace(model)
    prompt = random_prompt(40)
    with use(model, make(keep=0.5)) as session:

        def nested() -> None:
            with use(model, make(keep=0.25)):
                pass

        assert_raises(SparingError, nested, "a second session on the same model")
        driver = Driver(model, session.new_cache())
        logits = [driver.read(prompt)]
        assert isinstance(driver.cache.get_seq_length(), int)
        session.report()
        logits += driver.decode(prompt)
    alone = run_method(tiny_model(name), make(keep=0.5), prompt).logits
    for mine, theirs in zip(logits, alone, strict=True):
        assert torch.equal(mine, theirs), "a refused second session has changed the first"
    _assert_as_before(model, name, before)


def check_caches_do_not_meet(make: MethodFactory, name: str) -> None:
    """Two conversations alive at once, and two models in use at once, do not disturb each other (promise 6)."""
    prompts = [random_prompt(50, seed=1), random_prompt(37, seed=2)]
    alone = [run_method(tiny_model(name), make(keep=0.5), prompt) for prompt in prompts]
    model = tiny_model(name)
    with use(model, make(keep=0.5)) as session:
        _interleave(prompts, alone, [Driver(model, session.new_cache()) for _ in prompts])
    models = [tiny_model(name), tiny_model(name)]
    with use(models[0], make(keep=0.5)) as first, use(models[1], make(keep=0.5)) as second:
        _interleave(prompts, alone, [Driver(models[0], first.new_cache()), Driver(models[1], second.new_cache())])


def _interleave(prompts: list[Any], alone: list[Any], drivers: list[Driver]) -> None:
    logits: list[list[Tensor]] = [[driver.read(prompt)] for driver, prompt in zip(drivers, prompts, strict=True)]
    for step in range(prompts[0].forced.shape[1]):
        for prompt, driver, said in zip(prompts, drivers, logits, strict=True):
            said.append(driver.feed(prompt.forced[:, [step]])[:, -1])
    for number, (driver, run, said) in enumerate(zip(drivers, alone, logits, strict=True)):
        for mine, theirs in zip(said, run.logits, strict=True):
            assert torch.equal(mine, theirs), f"conversation {number} says something else beside another one"
        for layer, heads in held_positions(run.cache).items():
            assert_same_kept(held_positions(cast(EvictingCache, driver.cache))[layer], heads, f"conversation {number}")


def check_clones_are_independent(make: MethodFactory, name: str) -> None:
    """A cloned cache goes its own way: what either decodes is unknown to the other."""
    model, prompt = tiny_model(name), random_prompt(50)
    other = random_prompt(50, seed=5).forced.flip(1)
    with use(model, make(keep=0.5)) as session:
        driver = Driver(model, session.new_cache())
        driver.read(prompt)
        session.report()
        copy = Driver(model, driver.cache.clone())  # type: ignore[attr-defined]
        copy.mask = driver.mask
        for token in other.split(1, dim=1):
            copy.feed(token)
        logits = driver.decode(prompt)
    for mine, theirs in zip(logits, run_method(model, make(keep=0.5), prompt).logits[1:], strict=True):
        assert_close(mine, theirs, 1e-6, "logits of a cache whose clone has decoded something else")
