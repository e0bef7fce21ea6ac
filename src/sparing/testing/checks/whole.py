"""Checks of methods that free nothing, in the place of those that count what is left: readers, and simulations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicCache

from sparing.adapters.accounting import bytes_alive
from sparing.adapters.cache import EvictingCache
from sparing.adapters.structure import read_structure
from sparing.core.method import Method
from sparing.errors import SparingError
from sparing.session import use
from sparing.testing.checks import logits
from sparing.testing.checks.budgets import KEEPS, LENGTHS, LONG
from sparing.testing.checks.common import MethodFactory, assert_close, assert_raises
from sparing.testing.driving import Driver, random_prompt, run_method, run_untouched
from sparing.testing.inspection import held_positions, measured_bytes
from sparing.testing.models import TINY_MODELS, tiny_model
from sparing.testing.reading import Note, Noted, check_note, noted
from sparing.testing.reference import DroppedKeysReference

# Slack for tokens to come, and positions: of a cache that is `LONG` tokens long.
OVERHEAD = 1.25


def _noted(method: Method) -> Method:
    return method if method.parts().reader is None else noted(method)


def _assert_all_held(cache: EvictingCache, pads: list[int], what: str) -> None:
    for layer, rows in held_positions(cache).items():
        for pad, heads in zip(pads, rows, strict=True):
            wanted = list(range(pad, cache.get_seq_length()))
            for head, positions in enumerate(heads):
                assert positions.tolist() == wanted, f"{what}: layer {layer}, head {head} does not hold all tokens"


def _assert_reads(method: Method, seen: int, what: str) -> None:
    """Of the notes since the last time: each is sound, and together they are the budget."""
    if not isinstance(method, Noted):
        return
    assert method.notes, f"{what}: nothing was chosen"
    for note in method.notes:
        check_note(note)
    heads = sum(note.counts.shape[1] for note in method.notes)
    given = sum(int(note.counts[0].sum()) for note in method.notes)
    if isinstance(method.keep, float):
        wanted = method.budget.tokens_per_head(seen, 1) * heads
        assert given == wanted, f"{what}: {given} tokens may be read in all, the budget is {wanted}"
    method.notes.clear()


def check_everything_is_held(make: MethodFactory, name: str) -> None:
    """All tokens stay, whatever the budget, prompts of one token included; a decoded token reads exactly the budget."""
    model = tiny_model(name)
    for keep in KEEPS:
        for length in LENGTHS:
            method = _noted(dataclasses.replace(make(keep=keep), min_prompt=0))
            prompt, what = random_prompt(length), f"keep={keep!r} of {length} tokens"
            with use(model, method) as session:
                driver = Driver(model, session.new_cache())
                driver.read(prompt)
                session.report()
                _assert_all_held(cast(EvictingCache, driver.cache), [0], what)
                driver.feed(prompt.forced[:, :1])
                if keep != 1.0:
                    _assert_reads(method, length + 1, what)


def check_decoded_tokens_are_held(make: MethodFactory, name: str) -> None:
    """Every token that is decoded stays as well."""
    for keep in (0.5, 36):
        prompt = random_prompt(33, 20, steps=8)
        run = run_method(tiny_model(name), make(keep=keep), prompt)
        _assert_all_held(run.cache, prompt.pads, f"keep={keep!r} after 8 decoded tokens")


def check_short_prompts_are_named(make: MethodFactory, name: str) -> None:
    """The report says if a prompt is shorter than `min_prompt`; then all of it is read, and no key is changed."""
    method, model = make(keep=0.1), tiny_model(name, torch.float64)
    for length, is_whole in ((method.min_prompt - 2, True), (2 * method.min_prompt, False)):
        prompt = random_prompt(length, steps=1)
        run = run_method(model, method, prompt)
        report = run.cache.report()
        difference = float((run.logits[1] - run_untouched(model, prompt)[1]).abs().max())
        assert (difference < 1e-9) == is_whole, f"of {length} tokens the logits differ by {difference:.3g}"
        assert any("min_prompt" in note for note in report.notes) == is_whole, f"the report says {report.notes}"
        if report.read_share is not None:
            assert (report.read_share == 1.0) == is_whole, f"of {length} tokens {report.read_share:.1%} were read"


def check_nothing_is_freed(make: MethodFactory, name: str) -> None:
    """The bytes reported are those alive: the dense cache's, slack, and what the reader knows (promise 2)."""
    model = tiny_model(name)
    for prompt in (random_prompt(LONG, steps=20), random_prompt(LONG, LONG // 2, steps=20)):
        run, dense = run_method(model, make(keep=0.25), prompt), DynamicCache(config=model.config)
        driver = Driver(model, dense)
        driver.read(prompt)
        driver.decode(prompt)
        full, held, report = measured_bytes(dense), measured_bytes(run.cache), run.cache.report()
        known = bytes_alive([layer.reading.state for layer in run.cache.evicting if layer.reading is not None])
        for what, said, real in (("held", report.bytes_kept, held), ("full", report.bytes_full, full)):
            assert abs(said - real) <= 0.01 * real, f"{said} bytes are reported as {what}, {real} were measured"
        least = full * float(prompt.mask.float().mean())  # pads need not be held
        assert held >= least, f"{held} bytes are held, but all tokens take {least:.0f}"
        assert held - known <= OVERHEAD * full, f"{held} bytes are held, {known} of them known by the reader"


def check_turns_are_held(make: MethodFactory, name: str) -> None:
    """Announced turns are read densely; tokens after each read the budget of all tokens so far (promise 5)."""
    model, method = tiny_model(name, torch.float64), _noted(make(keep=0.5))
    notes = method.notes if isinstance(method, Noted) else []
    with use(model, method) as session:
        cache = session.new_cache()
        driver, seen = Driver(model, cache), 0
        for turn, length in enumerate((40, 9, 24)):
            prompt = random_prompt(length, steps=3, seed=turn)
            cache.expect_prompt(seen + length)
            notes.clear()
            for token in prompt.ids.split(1 if turn == 1 else length, dim=1):
                driver.feed(token)
            assert not notes, f"turn {turn}: a part of the prompt was read as if it were decoded"
            cache.report()
            seen += length
            for token in prompt.forced.split(1, dim=1):
                driver.feed(token)
                seen += 1
                _assert_reads(method, seen, f"turn {turn} at {seen} tokens")
            _assert_all_held(cache, [0], f"turn {turn}")


def check_chunks_of_generate(make: MethodFactory, name: str) -> None:
    """generate(prefill_chunk_size=...) says what generate() says, and reads as much (promise 5)."""
    said, read = [], []
    prompt = random_prompt(50, 31)
    for size in (None, 1, 7, 50):
        model: Any = tiny_model(name, torch.float64)
        with use(model, make(keep=0.6)) as session:
            ids = model.generate(
                prompt.ids, attention_mask=prompt.mask, max_new_tokens=5, do_sample=False, prefill_chunk_size=size
            )
            said.append(ids.tolist())
            read.append(session.report().read_share)
    assert read.count(read[0]) == len(read), f"what is read differs between chunk sizes: {read}"
    assert said.count(said[0]) == len(said), "prefill_chunk_size changes what is generated"


def check_cropping_takes_back(make: MethodFactory, name: str) -> None:
    """Tokens that are cropped leave no trace in what comes after; a cache outside its session is refused."""
    model, method = tiny_model(name, torch.float64), make(keep=0.5)
    # Long enough that what was taken back would be in the middle of what is chosen from.
    prompt, other = random_prompt(50, 31, steps=40), random_prompt(50, 31, seed=7)
    with use(model, method) as session:
        driver = Driver(model, session.new_cache())
        driver.read(prompt)
        session.report()
        driver.feed(prompt.forced[:, :1])
        copy = Driver(model, cast(EvictingCache, driver.cache).clone())
        copy.mask = driver.mask
        for token in other.forced[:, :2].split(1, dim=1):
            driver.feed(token)
        cast(EvictingCache, driver.cache).crop(-2)
        driver.mask = copy.mask
        for token in prompt.forced[:, 1:].split(1, dim=1):
            assert_close(driver.feed(token), copy.feed(token), 1e-12, "logits after a crop")
    assert_raises(SparingError, lambda: driver.feed(prompt.forced[:, :1]), "a cache after its session")


def check_reading_is_faithful(make: MethodFactory, name: str) -> None:
    """Each decoded token's output is that of dense attention with the keys that it did not read at -inf (promise 3).

    The choices are written down and played to an ordinary cache; replaced keys and queries stand in for the model's.
    """
    second_turn = 0 if TINY_MODELS[name].recurrent else 6
    for lengths, keep in (((64,), 0.3), ((64, 40), 0.7)):
        method = noted(make(keep=keep))
        calls = logits.record(tiny_model(name, torch.float64), method, random_prompt(*lengths), second_turn)
        wanted = _replayed(tiny_model(name, torch.float64), calls, method.notes)
        assert any(note.choice.slots is not None for note in method.notes), "everything was read"
        for step, (call, reference) in enumerate(zip(calls, wanted, strict=True)):
            real = call.mask[:, -call.ids.shape[1] :].bool()
            what = f"keep={keep}, logits at call {step}"
            assert_close(call.logits[real], reference[real], TINY_MODELS[name].tolerance, what)


def check_bfloat16_reading(make: MethodFactory, name: str) -> None:
    """In bfloat16 reading errs no more than the untouched model does, measured by float64 oracles."""
    prompt = random_prompt(64, steps=6)
    half, double = tiny_model(name, torch.bfloat16), tiny_model(name, torch.bfloat16).double()
    pairs = zip(run_untouched(half, prompt), run_untouched(double, prompt), strict=True)
    bound = max(float((a.double() - b).abs().max()) for a, b in pairs)
    method = noted(make(keep=0.5))
    calls = logits.record(half, method, prompt, 0)
    for step, (call, wanted) in enumerate(zip(calls, _replayed(double, calls, method.notes), strict=True)):
        assert_close(call.logits, wanted, 2 * bound, f"bfloat16 logits at call {step}")


def _replayed(model: Any, calls: list[logits.Call], notes: list[Note]) -> list[torch.Tensor]:
    """The calls through the dense reference; every call of one token reads what its layers' notes say."""
    layers, rest = sum(note.layer == 0 for note in notes), list(notes)
    each = len(notes) // layers
    with DroppedKeysReference(model) as reference:
        index = read_structure(model).full_layers
        said = []
        for call in calls:
            mine = rest[:each] if call.ids.shape[1] == 1 else []
            rest = rest[len(mine) :]
            reference.reads = {index[note.layer]: note.choice for note in mine if note.choice.slots is not None}
            said.append(reference(call.ids, call.mask, call.positions))
    assert not rest, "more was decoded than was written down"
    return said


# What runs in the place of a check: for every method that frees nothing, and for those of them that read a part.
FREES_NOTHING: dict[str, Callable[..., None]] = {
    "kept_counts_match_the_budget": check_everything_is_held,
    "size_while_decoding": check_decoded_tokens_are_held,
    "short_prompts_lose_nothing": check_short_prompts_are_named,
    "bytes_are_real": check_nothing_is_freed,
    "every_turn_is_compressed": check_turns_are_held,
    "turns_by_hand": check_turns_are_held,
    "generate_in_chunks": check_chunks_of_generate,
    "misused_caches_are_refused": check_cropping_takes_back,
}
READS_A_PART: dict[str, Callable[..., None]] = {
    "output_is_faithful": check_reading_is_faithful,
    "bfloat16_error_is_bounded": check_bfloat16_reading,
}
