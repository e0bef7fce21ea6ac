"""Checks of what a model says with a compressed cache, against the untouched model and the dense reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing.adapters.cache import EvictingCache
from sparing.core.method import Method
from sparing.core.scorer import KeyValues
from sparing.kernels.compact import CompactStore
from sparing.session import use
from sparing.testing.checks.common import MethodFactory, assert_close
from sparing.testing.driving import Driver, Prompt, random_prompt, run_method, run_untouched
from sparing.testing.inspection import held_positions, held_tokens, is_exact
from sparing.testing.models import TINY_MODELS, tiny_model
from sparing.testing.reference import DroppedKeysReference, Heads


def check_keeping_all_is_exact(make: MethodFactory, name: str) -> None:
    """At ratio 1 the logits are the untouched model's, bit for bit, at the prompt and each step (promise 1).

    A method that holds codes says so for the prompt only, and holds as many tokens.
    """
    if not make(keep=1.0).keeps_all:
        _assert_prompt_is_exact(make(keep=1.0), name)
        return
    for prompt in (random_prompt(64), random_prompt(48, 29)):
        wanted = run_untouched(tiny_model(name), prompt)
        got = run_method(tiny_model(name), make(keep=1.0), prompt).logits
        for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            assert torch.equal(mine, theirs), f"logits at step {step} are not those of the untouched model"
        ids = tiny_model(name).generate(prompt.ids, attention_mask=prompt.mask, max_new_tokens=4, do_sample=False)
        model = tiny_model(name)
        with use(model, make(keep=1.0)):
            same = model.generate(prompt.ids, attention_mask=prompt.mask, max_new_tokens=4, do_sample=False)
        assert torch.equal(ids, same), "generate() says something else than the untouched model"


def _assert_prompt_is_exact(method: Method, name: str) -> None:
    for prompt in (random_prompt(64), random_prompt(48, 29)):
        run = run_method(tiny_model(name), method, prompt)
        assert torch.equal(run.logits[0], run_untouched(tiny_model(name), prompt)[0]), "the prompt's logits changed"
        for rows in held_positions(run.cache).values():
            for row, pad in zip(rows, prompt.pads, strict=True):
                tokens = prompt.length - pad + prompt.forced.shape[1]
                assert all(len(head) == tokens for head in row), f"{[len(head) for head in row]} of {tokens} are held"


@dataclass(frozen=True)
class Call:
    """One forward of a recorded run: its inputs, what was visible of the past, and what came out.

    `held` is what stood for the tokens before `end`, for methods that change the tokens they keep.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    kept: dict[int, Heads]
    end: int
    logits: Tensor
    held: dict[int, KeyValues]


class Recorder:
    """Drives a model through a compressed cache and notes before each call which keys are visible."""

    def __init__(self, model: Any, cache: EvictingCache) -> None:
        self.model, self.cache = model, cache
        self.driver = Driver(model, cache)
        self.calls: list[Call] = []
        self._end = 0

    def feed(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """One forward; what is visible comes from the plan, or for every-step methods from what is held."""
        seen, plan = self.cache.get_seq_length(), self.cache.plan
        kept: dict[int, Heads] = {}
        if plan is not None:
            held = held_positions(self.cache)
            kept = held if self.cache.follows_decoding else {layer.layer: layer.kept for layer in plan.layers}
            if not self.cache.follows_decoding:
                _assert_held_is_planned(held, kept, self._end, seen)
        end = seen if self.cache.follows_decoding else self._end
        if plan is not None and self.cache.method is not None and self.cache.method.is_compact:
            kept, end = held, seen  # decoded tokens become codes too, the oldest before new ones come
            for layer in self.cache.evicting:
                if isinstance(layer.store, CompactStore):
                    layer.store.fill_pages()
        stands_in = {} if plan is None or is_exact(self.cache) else held_tokens(self.cache)
        logits = self.driver.feed(ids, mask)
        assert self.driver.mask is not None
        positions = (self.driver.mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        self.calls.append(Call(ids, self.driver.mask, positions, kept, end, logits, stands_in))

    def evict(self) -> None:
        """Carry out the eviction that is due, at the end of a prompt or turn."""
        self._end = self.cache.get_seq_length()
        self.cache.report()


def _assert_held_is_planned(held: dict[int, Heads], kept: dict[int, Heads], end: int, seen: int) -> None:
    later = list(range(end, seen))
    for layer, rows in held.items():
        for row, heads in enumerate(rows):
            for head, positions in enumerate(heads):
                planned = kept[layer][row][head if len(kept[layer][row]) > 1 else 0].tolist()
                assert positions.tolist() == planned + later, (
                    f"layer {layer} head {head} holds other tokens than planned"
                )


def record(model: Any, method: Method, prompt: Prompt, second_turn: int) -> list[Call]:
    """A prompt, decoded tokens, a second turn read at once, and decoded tokens again."""
    with use(model, method) as session:
        cache = session.new_cache()
        recorder = Recorder(model, cache)
        cache.expect_prompt(prompt.length)
        recorder.feed(prompt.ids, prompt.mask)
        recorder.evict()
        for token in prompt.forced.split(1, dim=1):
            recorder.feed(token)
        if second_turn:
            cache.expect_prompt(cache.get_seq_length() + second_turn)
            recorder.feed(prompt.ids[:, -second_turn:])
            recorder.evict()
            for token in prompt.forced[:, :2].split(1, dim=1):
                recorder.feed(token)
    return recorder.calls


def replay(model: Any, calls: list[Call]) -> list[Tensor]:
    """The same calls through the dense reference."""
    with DroppedKeysReference(model) as reference:
        logits = []
        for call in calls:
            reference.kept, reference.held, reference.end = call.kept, call.held, call.end
            logits.append(reference(call.ids, call.mask, call.positions))
    return logits


def check_output_is_faithful(make: MethodFactory, name: str) -> None:
    """Output after eviction is that of dense attention with the dropped keys at -inf, at every step (promise 3).

    In float64, batch of one and left-padded batch, one decoded token at a time and a second turn read at once. For
    actions that change tokens it is that of dense attention over what is held, biases included.
    """
    second_turn = 0 if TINY_MODELS[name].recurrent else 6
    cases = [(prompt, keep) for lengths, keep in (((64,), 0.3), ((64, 40), 0.7))
             for prompt in random_prompt(*lengths).split(make(keep=keep))]  # fmt: skip
    for prompt, keep in cases:
        calls = record(tiny_model(name, torch.float64), make(keep=keep), prompt, second_turn)
        assert len(calls) == 1 + prompt.forced.shape[1] + (3 if second_turn else 0)
        wanted = replay(tiny_model(name, torch.float64), calls)
        for step, (call, reference) in enumerate(zip(calls, wanted, strict=True)):
            real = call.mask[:, -call.ids.shape[1] :].bool()
            assert_close(
                call.logits[real], reference[real], TINY_MODELS[name].tolerance, f"keep={keep}, logits at call {step}"
            )


def check_bfloat16_error_is_bounded(make: MethodFactory, name: str) -> None:
    """In bfloat16 compressed decoding errs no more than the untouched model does, measured by float64 oracles.

    The bound is taken from the data: the error of the untouched model in bfloat16 against itself in float64. What
    the compressed run says is compared with the float64 reference for the very tokens that it held.
    """
    prompt = random_prompt(64, steps=6)
    half, double = tiny_model(name, torch.bfloat16), tiny_model(name, torch.bfloat16).double()
    pairs = zip(run_untouched(half, prompt), run_untouched(double, prompt), strict=True)
    bound = max(float((a.double() - b).abs().max()) for a, b in pairs)
    calls = record(half, make(keep=0.5), prompt, 0)
    for step, (call, wanted) in enumerate(zip(calls, replay(double, calls), strict=True)):
        assert_close(call.logits, wanted, 2 * bound, f"bfloat16 logits at call {step}")
