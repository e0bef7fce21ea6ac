"""Checks that how a prompt arrives does not matter: in a batch, in chunks, in turns."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.budget import Keep
from sparing.session import use
from sparing.testing.checks.common import MethodFactory, assert_close, assert_same_kept
from sparing.testing.driving import Driver, Run, random_prompt, run_method
from sparing.testing.inspection import held_positions
from sparing.testing.models import TINY_MODELS, tiny_model

TOLERANCE = 1e-5
# Recurrent layers compute in float32 and see pads as zeros, in transformers itself.
RECURRENT_TOLERANCE = 1e-3


def _planned(run: Run) -> dict[int, list[list[Tensor]]]:
    return {layer.layer: layer.kept for layer in run.cache.plan.layers} if run.cache.plan is not None else {}


def check_padded_rows_equal_single_rows(make: MethodFactory, name: str) -> None:
    """A row of a left-padded batch keeps what it keeps alone, and says the same at every step (promise 4)."""
    keeps: tuple[Keep, ...] = (0.5, 24)
    prompt = random_prompt(64, 41, 17, steps=3)
    tolerance = RECURRENT_TOLERANCE if TINY_MODELS[name].recurrent else TOLERANCE
    for keep in keeps:
        together = run_method(tiny_model(name, torch.float64), make(keep=keep), prompt)
        held = held_positions(together.cache)
        for row, pad in enumerate(prompt.pads):
            alone = run_method(tiny_model(name, torch.float64), make(keep=keep), prompt.row(row))
            what = f"keep={keep!r}, row {row} of a padded batch"
            for layer, heads in _planned(alone).items():
                mine = [[positions - pad for positions in _planned(together)[layer][row]]]
                assert_same_kept(mine, heads, f"{what}, layer {layer}")
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
    prompt = random_prompt(48, 29, steps=2)
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
    prompt = random_prompt(50, 31)
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
            wanted = method.budget.tokens_per_head(seen, 1) * lanes
            assert plan.tokens_kept == wanted, f"turn {turn} keeps {plan.tokens_kept} entries, the budget is {wanted}"
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
            wanted = method.budget.tokens_per_head(seen, 1) * lanes
            assert plan.tokens_kept == wanted, f"turn {turn} keeps {plan.tokens_kept} entries, the budget is {wanted}"
            driver.decode(prompt)
            seen += 3
