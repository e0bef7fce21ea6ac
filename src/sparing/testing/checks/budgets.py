"""Checks of how much is kept: counts, and bytes measured from outside."""

from __future__ import annotations

import dataclasses

import torch
from transformers.cache_utils import DynamicCache

from sparing.core.budget import Keep
from sparing.core.method import Method
from sparing.session import use
from sparing.testing.checks.common import MethodFactory
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
    """An every-step method stays at its budget while decoding; the others keep every token that is decoded."""
    model = tiny_model(name)
    for keep in (0.5, 36):
        method = make(keep=keep)
        every_step = method.parts().moment == "every_step"
        prompt = random_prompt(33, steps=8)
        run = run_method(model, method, prompt)
        budget = method.budget.tokens_per_head(33 if keep == 0.5 else 41, 1)
        held = held_positions(run.cache)
        lanes = sum(len(rows[0]) for rows in held.values())
        total = sum(len(head) for rows in held.values() for head in rows[0])
        wanted = (budget if every_step else min(budget, 33) + 8) * lanes
        assert total == wanted, f"keep={keep!r} after 8 decoded tokens: {total} are held instead of {wanted}"


def check_bytes_are_real(make: MethodFactory, name: str) -> None:
    """The bytes reported as held, and as freed, are those of the tensors that are alive, within 1 % (promise 2)."""
    model = tiny_model(name)
    for prompt in (random_prompt(LONG), random_prompt(LONG, LONG // 2)):
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
