"""Checks of how much is kept: counts, and bytes measured from outside."""

from __future__ import annotations

import dataclasses

import torch
from transformers.cache_utils import DynamicCache

from sparing.core.allocate import Uniform
from sparing.core.budget import Keep
from sparing.core.method import Evict, Method, Moment
from sparing.errors import MethodRefusedError
from sparing.session import use
from sparing.testing.checks.common import MethodFactory, least_held
from sparing.testing.driving import Driver, Prompt, random_prompt, run_method
from sparing.testing.inspection import held_positions, measured_bytes
from sparing.testing.models import tiny_model

KEEPS: tuple[Keep, ...] = (1e-3, 0.25, 0.5, 0.99, 1.0, 7, 10_000, "3KiB")
LENGTHS = (1, 2, 33, 64)
# The window of slack behind every head must not be what a byte check measures, so its prompt is long.
LONG = 320


def check_kept_counts_match_the_budget(make: MethodFactory, name: str) -> None:
    """Exactly what `core.budget` says is kept: for ratios from tiny to 1, counts and bytes, and one-token prompts."""
    model = tiny_model(name)
    for keep in KEEPS:
        for length in LENGTHS:
            method = dataclasses.replace(make(keep=keep), min_prompt=0)
            prompt = random_prompt(length)
            with use(model, method) as session:
                cache = session.new_cache()
                driver = Driver(model, cache)
                driver.read(prompt)
                dense = held_positions(cache)
                per_token = _bytes_per_token(cache.bytes_full, dense, length)
                plan = cache.report().plan
                held = held_positions(cache)
            lanes = sum(len(rows[0]) for rows in held.values())
            wanted = method.budget.tokens_per_head(length, per_token) * lanes
            kept = sum(len(head) for rows in held.values() for head in rows[0])
            assert kept == wanted, f"keep={keep!r} of {length} tokens: {kept} are held, {wanted} are in the budget"
            if plan is not None:
                planned = {layer.layer: layer.kept for layer in plan.layers}
                _assert_plan_is_held(planned, held, f"keep={keep!r} of {length} tokens")


def check_short_prompts_lose_nothing(make: MethodFactory, name: str) -> None:
    """A prompt shorter than `min_prompt` is kept whole whatever the ratio, and the report says so."""
    method, model = make(keep=0.1), tiny_model(name)
    for length, is_whole in ((method.min_prompt - 1, True), (2 * method.min_prompt, False)):
        with use(model, method) as session:
            cache = session.new_cache()
            Driver(model, cache).read(random_prompt(length))
            report = cache.report()
        shares = {len(head) / length for rows in held_positions(cache).values() for row in rows for head in row}
        assert (shares == {1.0}) == is_whole, f"of {length} tokens the heads hold {shares}"
        assert any("min_prompt" in note for note in report.notes) == is_whole, f"the report says {report.notes}"


def _bytes_per_token(full: int, dense: dict[int, list[list[torch.Tensor]]], length: int) -> int:
    """Bytes of one token in all compressed layers, from a model whose layers are all compressed."""
    return full // length if dense else 0


def _assert_plan_is_held(
    planned: dict[int, list[list[torch.Tensor]]], held: dict[int, list[list[torch.Tensor]]], what: str
) -> None:
    for layer, rows in planned.items():
        for row, heads in enumerate(rows):
            for head, kept in enumerate(heads):
                real = held[layer][row][head].tolist()
                assert sorted(set(real)) == real, f"{what}: a position is held twice in layer {layer}"
                assert kept.tolist() == real, f"{what}: layer {layer} head {head} holds {real}, not its plan"


def check_size_while_decoding(make: MethodFactory, name: str) -> None:
    """An every-step method never exceeds its budget while decoding; the others keep every token that is decoded.

    One that drops many tokens at once never falls below what it drops down to, either.
    """
    model, steps = tiny_model(name), 24
    for keep in (0.5, 36):
        method = make(keep=keep)
        every_step = method.parts().moment == "every_step"
        prompt = random_prompt(33, steps=steps)
        with use(model, method) as session:
            cache = session.new_cache()
            driver = Driver(model, cache)
            driver.read(prompt)
            cache.report()
            for step in range(1, steps + 1):
                driver.feed(prompt.forced[:, [step - 1]])
                held = held_positions(cache)
                lanes = sum(len(rows[0]) for rows in held.values())
                total = sum(len(head) for rows in held.values() for head in rows[0])
                budget = method.budget.tokens_per_head(33 if keep == 0.5 or not every_step else 33 + step, 1)
                wanted = (budget if every_step else budget + step) * lanes
                least = least_held(method, budget) * lanes if every_step and budget < 33 + step else wanted
                what = f"keep={keep!r} after {step} decoded tokens: {total} are held"
                assert least <= total <= wanted, f"{what} instead of {wanted}"


def check_chunks_bound_memory(make: MethodFactory, name: str) -> None:
    """With moment="chunk_end" a prompt in chunks never holds more than the budget and one chunk, in tokens and bytes.

    The method's scorer, allocator and action are tried; they may refuse, if the scorer needs the whole prompt.
    """
    keep, chunk, length = 24, 32, LONG
    method = _at_moment(make(keep=keep), "chunk_end")
    if method is None:
        return
    model, prompt = tiny_model(name), random_prompt(length)
    dense = DynamicCache(config=model.config)
    Driver(model, dense).read(prompt)
    sizes = []
    with use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        cache.expect_prompt(length)
        for ids in prompt.ids.split(chunk, dim=1):
            driver.feed(ids)
            held = [head for rows in held_positions(cache).values() for head in rows[0]]
            most = (keep + chunk) * len(held)
            total = sum(len(head) for head in held)
            assert total <= most, f"{total} tokens are held in the middle of a prompt, budget and chunk are {most}"
            sizes.append(measured_bytes(cache))
    assert max(sizes[4:]) <= 1.01 * max(sizes[:4]), f"bytes grow with the prompt: {sizes}"
    assert max(sizes) < measured_bytes(dense) / 2, f"{max(sizes)} bytes are held for {most} tokens"


def check_any_scorer_decodes_at_its_size(make: MethodFactory, name: str) -> None:
    """With moment="every_step" the method's scorer holds no more than its budget, however much is decoded.

    Four tokens are dropped at once. The scorer may refuse, if it can neither follow decoding nor score again.
    """
    keep, steps = 24, 80
    method = _at_moment(make(keep=keep), "every_step")
    if method is None:
        return
    model, prompt = tiny_model(name), random_prompt(40, steps=steps)
    sizes = []
    with use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        cache.report()
        for step in range(steps):
            driver.feed(prompt.forced[:, [step]])
            held = [head for rows in held_positions(cache).values() for head in rows[0]]
            total = sum(len(head) for head in held)
            assert total <= keep * len(held), f"{total} tokens are held, the budget is {keep * len(held)}"
            sizes.append(measured_bytes(cache))
    half = steps // 2
    assert max(sizes[half:]) <= 1.01 * max(sizes[:half]), f"bytes grow with what is decoded: {sizes}"


def _at_moment(method: Method, moment: Moment) -> Evict | None:
    """The method's parts at another moment; None where that is refused, which must have a reason."""
    parts = method.parts()
    scorer = parts.scorer
    can = scorer.state_outlives_eviction or scorer.accumulates
    can |= moment == "every_step" and scorer.follows_decoding
    refused: MethodRefusedError | None = None
    for allocator in (parts.allocator, Uniform()):  # by-step updates are defined for equal budgets only
        try:
            return Evict(method.keep, scorer, allocator, moment, 4 if moment == "every_step" else 1, parts.action)
        except MethodRefusedError as error:
            refused = error
    assert not can or not parts.frees, f"refused without a reason: {refused}"
    return None


def check_bytes_are_real(make: MethodFactory, name: str) -> None:
    """The bytes reported as held, and as freed, are those of the tensors that are alive, within 1 % (promise 2)."""
    model = tiny_model(name)
    padded = random_prompt(LONG, LONG // 2).split(make(keep=0.25))
    for prompt in (random_prompt(LONG), *padded):
        for keep in (1.0, 0.25):
            _assert_bytes(make(keep=keep), name, prompt, freed=keep != 1.0)
    run = run_method(model, make(keep=0.25), random_prompt(LONG, steps=20))
    _assert_reported(run.cache.bytes_kept, measured_bytes(run.cache), "bytes held after 20 decoded tokens")


def _assert_bytes(method: Method, name: str, prompt: Prompt, freed: bool) -> None:
    model = tiny_model(name)
    dense = DynamicCache(config=model.config)
    Driver(model, dense).read(prompt)
    full = measured_bytes(dense)
    with use(model, method) as session:
        cache = session.new_cache()
        Driver(model, cache).read(prompt)
        report = cache.report()
    held = measured_bytes(cache)
    _assert_reported(report.bytes_kept, held, "bytes held")
    _assert_reported(report.bytes_full, full, "bytes that transformers' cache holds")
    if freed:
        assert held < full, f"nothing was freed: {held} bytes of {full} are held"
        _assert_reported(report.bytes_full - report.bytes_kept, full - held, "bytes freed")


def _assert_reported(reported: int, measured: int, what: str) -> None:
    assert abs(reported - measured) <= 0.01 * measured, f"{what}: {reported} are reported, {measured} were measured"
