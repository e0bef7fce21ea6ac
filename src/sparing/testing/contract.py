"""The list of contract checks and the runner: every promise of the library, for any method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sparing.core.actions import Drop
from sparing.core.method import Method
from sparing.errors import MethodRefusedError
from sparing.testing.checks import actions, batches, budgets, logits, refusals, scoring, traces, whole
from sparing.testing.checks.common import MethodFactory
from sparing.testing.measurements import EXAMPLE, identity, with_measurements
from sparing.testing.models import TINY_MODELS

DEFAULT_MODEL = "llama"
SOME_MODELS = ("llama", "gemma3", "deepseek_v3")


class DeclaredRefusal(Exception):
    """A method refused a model by name, for a reason that it declares; the check did not run."""


@dataclass(frozen=True)
class Check:
    """One contract check.

    Attributes:
        name: the function's name without `check_`.
        run: asserts; never returns a verdict.
        models: "none" if it needs no model, "one" if one model says it all, "every" if every structure matters, and
            "some" if those of `SOME_MODELS` do: plain, with sliding layers, and with whole tokens only.
        promise: the first line of the function's docstring.
    """

    name: str
    run: Callable[..., None]
    models: str
    promise: str


def _checks(models: str, *functions: Callable[..., None]) -> list[Check]:
    return [
        Check(f.__name__.removeprefix("check_"), f, models, (f.__doc__ or "").strip().splitlines()[0])
        for f in functions
    ]


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        *_checks(
            "none",
            scoring.check_fields_are_stored_unchanged,
            scoring.check_scores_are_well_formed,
            scoring.check_inputs_are_untouched,
            scoring.check_same_seed_same_scores,
            scoring.check_rows_do_not_mix,
            scoring.check_kv_heads_are_interchangeable,
            scoring.check_raising_a_score_keeps_the_token,
            actions.check_actions_stay_in_their_head,
            refusals.check_wrong_budgets_are_refused,
            refusals.check_unsupported_models_are_refused,
        ),
        *_checks(
            "one",
            budgets.check_kept_counts_match_the_budget,
            budgets.check_size_while_decoding,
            budgets.check_short_prompts_lose_nothing,
            budgets.check_chunks_bound_memory,
            budgets.check_any_scorer_decodes_at_its_size,
            actions.check_weights_are_counts,
            logits.check_bfloat16_error_is_bounded,
            batches.check_generate_in_chunks,
            batches.check_turns_by_hand,
            traces.check_keeps_the_users_generate,
            traces.check_leaves_no_trace_after_an_exception,
            traces.check_nested_use_is_refused,
            traces.check_caches_do_not_meet,
            traces.check_clones_are_independent,
            refusals.check_foreign_caches_are_refused,
            refusals.check_misused_caches_are_refused,
            refusals.check_drafting_with_every_step_is_refused,
            refusals.check_attention_weights_are_refused,
        ),
        *_checks(
            "every",
            logits.check_keeping_all_is_exact,
            logits.check_output_is_faithful,
            budgets.check_bytes_are_real,
            batches.check_padded_rows_equal_single_rows,
        ),
        *_checks(
            "some",
            batches.check_chunks_equal_one_prompt,
            batches.check_every_turn_is_compressed,
            traces.check_leaves_no_trace,
        ),
    )
}


def models_for(check: Check, models: Iterable[str] = tuple(TINY_MODELS)) -> list[str]:
    """The tiny models, of those given, that a check is run on."""
    if check.models in ("none", "one"):
        return [DEFAULT_MODEL]
    return [name for name in models if check.models == "every" or name in SOME_MODELS]


def fitting(check: Check, make: MethodFactory) -> Callable[..., None]:
    """What runs for a method: methods that free nothing keep some promises in another way, which has its own check."""
    parts = make(keep=0.5).parts()
    if parts.frees:
        return check.run
    instead = whole.FREES_NOTHING | (whole.READS_A_PART if parts.reader is not None else {})
    return instead.get(check.name, check.run)


def run_check(check: Check, make: MethodFactory, model: str = DEFAULT_MODEL) -> None:
    """Run one check.

    A method may refuse a model by `MethodRefusedError` only for a reason that it declares: it needs keys before
    rotation (`Scorer.needs_rotary`), evicts at every step, changes tokens or holds codes, and the model evicts whole
    tokens (`TinyModel.whole_tokens`). Any other refusal fails the check.

    A registered method that needs measurements gets planted ones, of the model's shape.

    Raises:
        AssertionError: the promise is broken. DeclaredRefusal: the method declares that it refuses this model.
    """
    make = with_measurements(make, EXAMPLE if check.models == "none" else identity(model))
    run = fitting(check, make)
    run = run if check.models == "none" else functools.partial(run, name=model)
    try:
        run(make)
    except MethodRefusedError as error:
        if check.models != "none" and _declares_refusal(make(keep=0.5), model):
            raise DeclaredRefusal(str(error)) from error
        raise AssertionError(f"refused without a declared reason: {error}") from error


def _declares_refusal(method: Method, model: str) -> bool:
    parts = method.parts()
    if parts.action.needs_rotary and not TINY_MODELS[model].rotates:
        return True
    return TINY_MODELS[model].whole_tokens and (
        parts.scorer.needs_rotary
        or parts.moment != "prefill_end"
        or method.is_compact
        or type(parts.action) is not Drop
        or parts.reader is not None
    )


def check_method(make: MethodFactory, models: Iterable[str] = tuple(TINY_MODELS)) -> list[str]:
    """Run every check on a method, stopping at the first broken promise.

    Example:
        >>> from sparing.testing import check_method
        >>> check_method(MyMethod)

    Args:
        make: the method's class, or a function `make(*, keep) -> Method`.
        models: tiny models for the checks where models matter.

    Returns:
        What did not run, and why: one line for every refusal that the method declares.

    Raises:
        AssertionError: a promise is broken; the message begins with the check's name.
    """
    refused = []
    names = list(models)
    for check in CHECKS.values():
        for model in models_for(check, names):
            try:
                run_check(check, make, model)
            except DeclaredRefusal as refusal:
                refused.append(f"{check.name} on {model}: {refusal}")
            except AssertionError as error:
                raise AssertionError(f"{check.name} on {model}: {error}") from error
    return refused
