"""For authors of sparse prefill methods: the promises that every method keeps, on random calls and on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.core.budget import Keep
from sparing.core.pattern import Partial, Pattern
from sparing.core.prefill import PromptCall, SparsePrefill
from sparing.core.scorer import Softmax
from sparing.errors import MethodRefusedError, SparingError
from sparing.kernels.sparse.gather import attend_gathered
from sparing.methods.kv.snapkv import SnapKV
from sparing.session import use
from sparing.testing.checks.common import assert_close, assert_raises
from sparing.testing.driving import random_prompt, run_method, run_untouched
from sparing.testing.inspection import assert_same_trace, trace
from sparing.testing.models import TINY_MODELS, tiny_model

BLOCK = 16
# (tokens, first query row): whole prompts, one that is no multiple of the block, and later turns.
SHAPES = ((128, 0), (203, 0), (203, 64), (150, 87))
KEEPS: tuple[Keep, ...] = (0.15, 0.4, 0.7, 60)
# What rounding may leave of a budget: whole blocks, in every row of blocks at most one.
LEAST_USED = 0.75
DEFAULT_MODEL = "llama"
# Plain, learned positions, sliding layers, sinks, latent attention.
SOME_MODELS = ("llama", "gpt2", "gemma3", "gpt_oss", "deepseek_v3")


class PrefillFactory(Protocol):
    """Makes the method under test: its class, or any function with this signature."""

    def __call__(self, *, keep: Keep, block: int, dispatch: str) -> SparsePrefill:
        """The method with that budget."""
        ...


def random_call(tokens: int, start: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0) -> PromptCall:
    """An attention call of random states: 4 query heads, 2 KV heads, 16 dimensions, some of them larger than others."""
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, count: int) -> Tensor:
        return torch.randn(heads, count, 16, generator=generator, dtype=torch.float64).to(dtype)

    sizes = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=dtype)[:, None, None]
    query = random(4, tokens - start) * sizes
    return PromptCall(query, random(2, tokens), random(2, tokens), Softmax(0.25), _run)


def _run(call: PromptCall, pattern: Pattern) -> Partial:
    return attend_gathered(call.query, call.keys, call.values, pattern, call.softmax)


def _made(make: PrefillFactory, keep: Keep) -> SparsePrefill:
    return make(keep=keep, block=BLOCK, dispatch="always")


def check_budgets(make: PrefillFactory) -> None:
    """No more pairs are read than the budget allows, unless more is always on; and most of it is used."""
    for tokens, start in SHAPES:
        call = random_call(tokens, start)
        always = float(_made(make, 1e-6).attend(call).pattern.pairs().double().mean())
        for keep in KEEPS:
            method = _made(make, keep)
            computed = float(method.attend(call).pattern.pairs().double().mean())
            what = f"keep={keep} of {tokens} tokens from {start}"
            # A row's share may depend on its position alone, so that later rows round for those before them.
            allowed = method.pairs(call) + (BLOCK**2 if start else 0)
            assert computed <= max(allowed, always), f"{what}: {computed:.0f} pairs a head, {allowed} are allowed"
            budget = method.pairs(call)
            if budget > 2 * always:
                assert computed >= LEAST_USED * budget, f"{what}: only {computed:.0f} of {budget} pairs are used"


def check_patterns_are_causal(make: PrefillFactory) -> None:
    """No row reads what is after it, and every row reads itself."""
    for tokens, start in SHAPES:
        pattern = _made(make, 0.3).attend(random_call(tokens, start)).pattern
        rows = torch.arange(start, tokens)
        for head in range(pattern.heads):
            reads = pattern.may_read(head, rows)
            assert not bool(reads.triu(start + 1).any()), f"head {head} reads after a row of {tokens} tokens"
            assert bool(reads[torch.arange(len(rows)), rows].all()), f"head {head}: a row does not read itself"


def check_attention_is_that_of_the_pattern(make: PrefillFactory) -> None:
    """Output is dense attention under the pattern that is reported, per row and head, in float64 (promise 3)."""
    for tokens, start in SHAPES:
        for keep in (0.2, 0.6):
            call, method = random_call(tokens, start), _made(make, keep)
            if not method.is_masked_softmax:
                continue
            attended = method.attend(call)
            wanted, lse = dense_under(attended.pattern, call)
            assert_close(attended.part.out, wanted, 1e-12, f"keep={keep} of {tokens} tokens from {start}")
            assert_close(attended.part.lse, lse, 1e-12, "log-sum-exp")


def dense_under(pattern: Pattern, call: PromptCall) -> tuple[Tensor, Tensor]:
    """Dense attention with everything that the pattern leaves out at -inf, head by head: outputs and log-sum-exps."""
    outs, sums = [], []
    rows = torch.arange(call.start, call.tokens)
    for head in range(call.heads):
        keys, values = call.keys[head // call.group].double(), call.values[head // call.group].double()
        logits = call.query[head].double() @ keys.T * call.softmax.scaling
        logits = logits.masked_fill(~pattern.may_read(head, rows), -torch.inf)
        outs.append(logits.softmax(-1) @ values)
        sums.append(logits.logsumexp(-1))
    return torch.stack(outs), torch.stack(sums)


def check_same_call_same_pattern(make: PrefillFactory) -> None:
    """The same call is read in the same way each time, and its tensors are left as they are."""
    call = random_call(203)
    before = [x.clone() for x in (call.query, call.keys, call.values)]
    first, second = (_made(make, 0.3).attend(call) for _ in range(2))
    assert torch.equal(first.pattern.blocks, second.pattern.blocks), "blocks differ from one time to the next"
    assert torch.equal(first.part.out, second.part.out), "outputs differ from one time to the next"
    for was, now in zip(before, (call.query, call.keys, call.values), strict=True):
        assert torch.equal(was, now), "a tensor of the call was changed"


def check_wrong_fields_are_refused(make: PrefillFactory) -> None:
    """Wrong budgets, blocks and ways are refused by name."""
    for keep in (0.0, -0.5, 1.5, float("nan"), "64MiB"):
        assert_raises(SparingError, partial(_made, make, keep), f"keep={keep}")
    for block in (0, 7, -16):
        assert_raises(SparingError, partial(make, keep=0.5, block=block, dispatch="always"), f"block={block}")
    assert_raises(SparingError, lambda: make(keep=0.5, block=16, dispatch="never"), "dispatch='never'")


def check_keeping_all_is_exact(make: PrefillFactory, name: str) -> None:
    """At keep = 1 the logits are those of the untouched model, bit for bit (promise 1)."""
    prompt = random_prompt(40, 29)
    run = run_method(tiny_model(name), _made(make, 1.0), prompt)
    for mine, theirs in zip(run.logits, run_untouched(tiny_model(name), prompt), strict=True):
        assert torch.equal(mine, theirs), "keep=1 changes logits"


def check_padded_rows_equal_single_rows(make: PrefillFactory, name: str) -> None:
    """A row of a left-padded batch gives what it gives alone (promise 4)."""
    prompt = random_prompt(90, 61)
    together = run_method(tiny_model(name, torch.float64), _made(make, 0.4), prompt)
    for row, pad in enumerate(prompt.pads):
        alone = run_method(tiny_model(name, torch.float64), _made(make, 0.4), prompt.row(row))
        for step, (mine, single) in enumerate(zip(together.logits, alone.logits, strict=True)):
            got = mine[[row], pad:] if step == 0 else mine[[row]]
            assert_close(got, single, TINY_MODELS[name].tolerance, f"row {row}, logits at call {step}")


def check_chunks(make: PrefillFactory, name: str) -> None:
    """A prompt in chunks is read as the whole is, or refused by name (promise 5)."""
    prompt, model = random_prompt(90), tiny_model(name, torch.float64)
    method = _made(make, 0.4)
    whole = run_method(model, method, prompt).logits
    for chunks in ((32, 32, 26), (13, 50, 27)):
        is_aligned = all(sum(chunks[:i]) % BLOCK == 0 for i in range(len(chunks)))
        if method.chunks == "any" or (method.chunks == "blocks" and is_aligned):
            for mine, wanted in zip(run_method(model, method, prompt, chunks).logits, whole, strict=True):
                assert_close(mine, wanted, TINY_MODELS[name].tolerance, f"logits after chunks of {chunks}")
        else:
            read = partial(run_method, model, method, prompt, chunks)
            assert_raises(MethodRefusedError, read, f"chunks of {chunks}")


def check_generates(make: PrefillFactory, name: str) -> None:
    """generate() works, alone and with a KV method, and the report says what was computed; nothing stays behind."""
    model: Any = tiny_model(name)
    before, prompt = trace(model), random_prompt(90, 61)
    alone = _made(make, 0.4)
    # What only simulates computes all; so do windows that are as long as the prompt.
    least = run_method(model, _made(make, 1e-6), prompt).cache.report().prefill
    always = 1.0 if least is None else least.density
    for method in (alone, replace(SnapKV(keep=0.5, window=8), prefill=alone)):
        with use(model, method) as session:
            ids = model.generate(prompt.ids, attention_mask=prompt.mask, max_new_tokens=4, do_sample=False)
            report = session.report()
        assert ids.shape == (2, 94), "tokens are missing"
        assert report.prefill is not None, "the report does not say how the prompt was read"
        density = report.prefill.density
        assert 0 < density <= 1, f"{density:.1%} of the attention was computed"
        assert density < 1 or always > 0.4, "all of the attention was computed"
        assert (report.plan is not None) == (method is not alone), "something else was stored"
    assert_same_trace(before, trace(model))


def check_bfloat16(make: PrefillFactory, name: str) -> None:
    """In bfloat16 everything works and is finite."""
    run = run_method(tiny_model(name, torch.bfloat16), _made(make, 0.4), random_prompt(90))
    for logits in run.logits:
        assert bool(torch.isfinite(logits).all()), "logits are not finite"


ON_CALLS: tuple[Callable[[PrefillFactory], None], ...] = (
    check_budgets, check_patterns_are_causal, check_attention_is_that_of_the_pattern, check_same_call_same_pattern,
    check_wrong_fields_are_refused,
)  # fmt: skip
ON_MODELS: tuple[Callable[[PrefillFactory, str], None], ...] = (
    check_keeping_all_is_exact, check_padded_rows_equal_single_rows, check_chunks, check_generates, check_bfloat16,
)  # fmt: skip


def check_prefill_method(make: PrefillFactory, models: Iterable[str] = SOME_MODELS) -> None:
    """Run every check on a sparse prefill method, stopping at the first broken promise.

    Args:
        make: the method's class, or a function with the same keywords.
        models: tiny models for the checks where models matter.

    Raises:
        AssertionError: a promise is broken; the message begins with the check's name.
    """
    runs: list[tuple[str, Callable[[], None]]] = [(check.__name__, partial(check, make)) for check in ON_CALLS]
    names = list(models)
    runs += [(f"{check.__name__} on {name}", partial(check, make, name)) for check in ON_MODELS for name in names]
    for what, run in runs:
        try:
            run()
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
