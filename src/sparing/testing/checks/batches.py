"""Checks that how a prompt arrives does not matter: in a batch, in chunks, in turns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparing.core.budget import Keep
from sparing.core.method import Method
from sparing.errors import MethodRefusedError
from sparing.session import use
from sparing.testing.checks.common import MethodFactory, assert_close, assert_raises, assert_same_kept, least_held
from sparing.testing.driving import Driver, Prompt, Run, random_prompt, run_method
from sparing.testing.inspection import held_positions
from sparing.testing.models import TINY_MODELS, tiny_model

TOLERANCE = 1e-5
# Recurrent layers compute in float32 and see pads as zeros, in transformers itself.
RECURRENT_TOLERANCE = 1e-3


def _planned(run: Run) -> dict[int, list[list[Tensor]]]:
    return {layer.layer: layer.kept for layer in run.cache.plan.layers} if run.cache.plan is not None else {}


def check_padded_rows_equal_single_rows(make: MethodFactory, name: str) -> None:
    """A row of a left-padded batch keeps what it keeps alone, and says the same at every step (promise 4).

    Methods that replay the prompt take one sequence at a time: a batch is refused by name, and a row with pads in front
    of it is compared with the row without them.
    """
    keeps: tuple[Keep, ...] = (0.5, 24)
    batch = random_prompt(64, 41, 17, steps=3)
    for keep in keeps:
        method = make(keep=keep)
        for number, prompt in enumerate(batch.split(method)):
            together = run_method(tiny_model(name, torch.float64), method, prompt)
            for row in range(len(prompt.pads)):
                alone = run_method(tiny_model(name, torch.float64), method, prompt.row(row))
                _assert_row_is(together, alone, row, prompt.pads[row], f"keep={keep!r}, row {number + row}", name)
        if method.parts().scorer.replays:
            run = partial(run_method, tiny_model(name, torch.float64), method, batch)
            assert_raises(MethodRefusedError, run, "a batch whose rows would need replays of their own")


def _assert_row_is(together: Run, alone: Run, row: int, pad: int, what: str, name: str) -> None:
    """A row of a batch has kept, holds and says what it does alone."""
    tolerance = RECURRENT_TOLERANCE if TINY_MODELS[name].recurrent else TOLERANCE
    for layer, heads in _planned(alone).items():
        mine = [[positions - pad for positions in _planned(together)[layer][row]]]
        assert_same_kept(mine, heads, f"{what}, layer {layer}")
    held = held_positions(together.cache)
    for layer, heads in held_positions(alone.cache).items():
        mine = [[positions - pad for positions in held[layer][row]]]
        assert_same_kept(mine, heads, f"{what}, layer {layer} after decoding")
    for step, (batch, single) in enumerate(zip(together.logits, alone.logits, strict=True)):
        got = batch[row : row + 1, pad:] if step == 0 else batch[row : row + 1]
        assert_close(got, single, tolerance, f"{what}, logits at step {step}")


def check_chunks_equal_one_prompt(make: MethodFactory, name: str) -> None:
    """A prompt in chunks keeps what it keeps at once, and says the same; also left-padded (promise 5)."""
    if TINY_MODELS[name].recurrent:
        return  # a state is not exact over chunks in transformers itself
    for prompt in random_prompt(48, 29, steps=2).split(make(keep=0.8)):
        _assert_chunks_agree(make, name, prompt)


def _assert_chunks_agree(make: MethodFactory, name: str, prompt: Prompt) -> None:
    length = prompt.length
    whole = run_method(tiny_model(name, torch.float64), make(keep=0.8), prompt)
    for chunks in ([1] * length, [7] * (length // 7) + [length % 7], [40, 7, 1]):
        what = f"chunks of {chunks[:2]}..."
        parts = run_method(tiny_model(name, torch.float64), make(keep=0.8), prompt, chunks)
        assert _planned(parts).keys() == _planned(whole).keys(), f"{what}: nothing was evicted"
        for layer, heads in _planned(whole).items():
            assert_same_kept(_planned(parts)[layer], heads, f"{what}, layer {layer}")
        for layer, heads in held_positions(whole.cache).items():
            assert_same_kept(held_positions(parts.cache)[layer], heads, f"{what}, layer {layer} after decoding")
        for mine, theirs in zip(parts.logits[1:], whole.logits[1:], strict=True):
            assert_close(mine, theirs, TOLERANCE, f"{what}, logits")


def check_generate_in_chunks(make: MethodFactory, name: str) -> None:
    """generate(prefill_chunk_size=...) says what generate() says, on the same budget (promise 5)."""
    for prompt in random_prompt(50, 31).split(make(keep=0.6)):
        _assert_chunk_sizes_agree(make, name, prompt)


def _assert_chunk_sizes_agree(make: MethodFactory, name: str, prompt: Prompt) -> None:
    said, kept = [], []
    for size in (None, 1, 7, 50):
        model = tiny_model(name, torch.float64)
        with use(model, make(keep=0.6)) as session:
            ids = model.generate(
                prompt.ids, attention_mask=prompt.mask, max_new_tokens=5, do_sample=False, prefill_chunk_size=size
            )
            assert isinstance(ids, Tensor)
            said.append(ids.tolist())
            plan = session.report().plan
            assert plan is not None, f"nothing was evicted with prefill_chunk_size={size}"
            kept.append(plan.tokens_kept)
    assert kept.count(kept[0]) == len(kept), f"tokens kept differ between chunk sizes: {kept}"
    assert said.count(said[0]) == len(said), "prefill_chunk_size changes what is generated"


def check_every_turn_is_compressed(make: MethodFactory, name: str) -> None:
    """Each turn of a conversation is compressed again, to the budget of all tokens so far (promise 5)."""
    model, method = tiny_model(name), make(keep=0.5)
    ids = random_prompt(64).ids
    with use(model, method) as session:
        cache = session.new_cache()
        for turn in range(3):
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, do_sample=False
            )
            assert isinstance(answer, Tensor)
            plan = session.report(cache).plan
            assert plan is not None, f"turn {turn} was not compressed"
            seen = ids.shape[1]
            lanes = sum(len(layer.kept[0]) for layer in plan.layers)
            _assert_budget(method, plan.tokens_kept, seen, lanes, f"turn {turn}")
            ids = torch.cat([answer, random_prompt(20, seed=turn).ids], dim=1)


def check_turns_by_hand(make: MethodFactory, name: str) -> None:
    """Turns fed by hand, announced to the cache, are compressed like those of generate (promise 5)."""
    model, method = tiny_model(name), make(keep=0.5)
    with use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        seen = 0
        for turn, length in enumerate((40, 9, 24)):
            prompt = random_prompt(length, steps=3, seed=turn)
            cache.expect_prompt(seen + length)
            driver.feed(prompt.ids)
            plan = cache.report().plan
            seen += length
            assert plan is not None
            lanes = sum(len(layer.kept[0]) for layer in plan.layers)
            _assert_budget(method, plan.tokens_kept, seen, lanes, f"turn {turn}")
            driver.decode(prompt)
            seen += 3


def _assert_budget(method: Method, kept: int, seen: int, lanes: int, what: str) -> None:
    """The budget is kept; less of it only where many tokens are dropped at once, so that fewer were there."""
    limit = method.budget.tokens_per_head(seen, 1)
    least = least_held(method, limit)
    assert least * lanes <= kept <= limit * lanes, f"{what} keeps {kept} entries, the budget is {limit * lanes}"
