"""Each contract check goes red on something that is deliberately broken in the way that it is there to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from sparing import TOVA, Evict, Knorm, SnapKV
from sparing.adapters.attach import Attachment
from sparing.adapters.cache import EvictingCache
from sparing.adapters.layers import EvictingLayer
from sparing.core.allocate import Uniform
from sparing.core.budget import round_to_total
from sparing.core.method import Method, Parts
from sparing.core.scorer import Scorer
from sparing.errors import SparingError, UnsupportedModelError
from sparing.kernels.ragged import RaggedStore
from sparing.session import Session
from sparing.testing import CHECKS, check_method, run_check
from sparing.testing.checks import refusals

# -- broken scorers, allocators and methods -------------------------------------------------------------------------


@dataclass(frozen=True)
class DoublePrecision(Scorer):
    def score(self, state, stored):
        return -stored.keys.double().norm(dim=-1)


@dataclass(frozen=True)
class HalvesTheKeys(Scorer):
    def score(self, state, stored):
        return -stored.keys.mul_(0.5).norm(dim=-1)


class GlobalDice(Scorer):
    def score(self, state, stored):
        return torch.rand(stored.valid.shape)


class ScoresPads(Scorer):
    def score(self, state, stored):
        return (stored.keys - stored.keys.mean(2, keepdim=True)).norm(dim=-1)


class FavoursHeads(Scorer):
    def score(self, state, stored):
        return -stored.keys.norm(dim=-1) * torch.arange(1, stored.keys.shape[1] + 1)[:, None]


class Remembers(Scorer):
    """State on the scorer instead of the cache."""

    calls: ClassVar[list[int]] = []

    def score(self, state, stored):
        self.calls.append(1)
        return (stored.positions * (7 + len(self.calls)) % 13).float()


@dataclass(frozen=True)
class OneTooMany:
    def allocate(self, scores, tokens_per_head):
        counts = Uniform().allocate(scores, tokens_per_head)
        return [torch.minimum(c + 1, s.valid.sum(-1)) for c, s in zip(counts, scores, strict=True)]


@dataclass(frozen=True)
class PunishesHighScores:
    def allocate(self, scores, tokens_per_head):
        result = []
        for layer in scores:
            shares = (layer.values.amax(-1) < 6).float()  # a head with a very high score gets nothing
            high = layer.valid.sum(-1)
            rows = [
                round_to_total(shares[row], tokens * shares.shape[1], high=high[row])
                for row, tokens in enumerate(tokens_per_head)
            ]
            result.append(torch.stack(rows))
        return result


def using(scorer: type[Scorer]) -> Callable[..., Method]:
    return lambda *, keep: Evict(keep=keep, scorer=scorer())


@dataclass(frozen=True)
class RoundsItsBudget(Method):
    scorer: Scorer = field(default_factory=lambda: Knorm().parts().scorer)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.keep, int):
            object.__setattr__(self, "keep", float(self.keep) / 1024)

    def parts(self):
        return Parts(self.scorer, Uniform())


def forgiving(*, keep):
    try:
        return SnapKV(keep=keep)
    except SparingError:
        return SnapKV(keep=0.5)


def never_keeps_all(*, keep):
    return SnapKV(keep=0.9 if keep == 1.0 else keep)


# -- broken caches, stores and sessions -----------------------------------------------------------------------------


def grows_while_decoding(patch):
    limits = EvictingCache._limits
    patch.setattr(EvictingCache, "_limits", lambda self, counts: limits(self, counts) + 100)


def careless_attention(patch):
    from sparing.adapters import layers

    attend = layers.attend
    patch.setattr(layers, "attend", lambda *args: attend(*args) * 1.2)


def never_waits_for_the_prompt(patch):
    patch.setattr(EvictingCache, "expect_prompt", lambda self, length: None)


def compresses_the_first_turn_only(patch):
    expect = EvictingCache.expect_prompt
    patch.setattr(EvictingCache, "expect_prompt", lambda self, n: expect(self, n) if self.plan is None else None)


def on_exit(patch, act: Callable[[Session, Any], None]) -> None:
    leave = Session.__exit__

    def exit(self, kind, error, trace):
        leave(self, kind, error, trace)
        act(self, kind)

    patch.setattr(Session, "__exit__", exit)


def leaves_a_hook(session, kind):
    session.model.lm_head.register_forward_hook(lambda *args: None)


def leaves_a_hook_after_an_error(session, kind):
    if kind is not None:
        leaves_a_hook(session, kind)


def allows_nesting(patch):
    class Lenient:
        def __init__(self, model, registration):
            try:
                self.real: Attachment | None = Attachment(model, registration)
            except UnsupportedModelError:
                self.real = None

        def detach(self):
            if self.real is not None:
                self.real.detach()

    patch.setattr("sparing.session.Attachment", Lenient)


def clones_share_storage(patch):
    def clone(self):
        child = self._copy(self.method)
        for mine, new in zip(self.evicting, child.evicting, strict=True):
            new.store = mine.store
        return child

    patch.setattr(EvictingCache, "clone", clone)


def replaces_foreign_caches(patch):
    patch.setattr("sparing.session.Cache", EvictingCache)


def crops_what_it_can(patch):
    crop = EvictingLayer.crop
    patch.setattr(EvictingLayer, "crop", lambda self, n: crop(self, max(n, -self.tail)))


def answers_without_attention(patch):
    before = Session._before_forward

    def lenient(self, module, args, kwargs):
        kwargs = {**kwargs, "output_attentions": None}
        return before(self, module, args, kwargs) or (args, kwargs)

    patch.setattr(Session, "_before_forward", lenient)


def keeps_the_wrong_slot(patch):
    pack = RaggedStore.pack.__func__

    def wrong(cls, kept, keys, *others):
        return pack(cls, kept, keys.roll(1, dims=2), *others)

    patch.setattr(RaggedStore, "pack", classmethod(wrong))


def claims_half_the_bytes(patch):
    held = EvictingCache.bytes_kept.fget
    patch.setattr(EvictingCache, "bytes_kept", property(lambda self: held(self) // 2))


def forgets_the_pads(patch):
    patch.setattr(EvictingCache, "pads", lambda self, rows: torch.zeros(rows, dtype=torch.int64))


def takes_any_model(patch):
    patch.setattr(refusals, "use", lambda model, method: None)


def refuses_nothing(patch):
    patch.setattr(Session, "_refuse", lambda self, kwargs: None)


def nothing(patch):
    pass


# check → (the method, what else is broken)
SPECIMENS: dict[str, tuple[Callable[..., Method], Callable[[Any], None]]] = {
    "fields_are_stored_unchanged": (RoundsItsBudget, nothing),
    "scores_are_well_formed": (using(DoublePrecision), nothing),
    "inputs_are_untouched": (using(HalvesTheKeys), nothing),
    "same_seed_same_scores": (using(GlobalDice), nothing),
    "rows_do_not_mix": (using(ScoresPads), nothing),
    "kv_heads_are_interchangeable": (using(FavoursHeads), nothing),
    "raising_a_score_keeps_the_token": (
        lambda *, keep: Evict(keep, Knorm(recent=0).parts().scorer, PunishesHighScores()),
        nothing,
    ),
    "wrong_budgets_are_refused": (forgiving, nothing),
    "unsupported_models_are_refused": (SnapKV, takes_any_model),
    "kept_counts_match_the_budget": (lambda *, keep: Evict(keep, Knorm().parts().scorer, OneTooMany()), nothing),
    "size_while_decoding": (TOVA, grows_while_decoding),
    "bfloat16_error_is_bounded": (SnapKV, careless_attention),
    "generate_in_chunks": (SnapKV, never_waits_for_the_prompt),
    "turns_by_hand": (SnapKV, compresses_the_first_turn_only),
    "keeps_the_users_generate": (
        SnapKV,
        lambda patch: on_exit(patch, lambda session, kind: session.model.__dict__.pop("generate", None)),
    ),
    "leaves_no_trace_after_an_exception": (SnapKV, lambda patch: on_exit(patch, leaves_a_hook_after_an_error)),
    "nested_use_is_refused": (SnapKV, allows_nesting),
    "caches_do_not_meet": (using(Remembers), nothing),
    "clones_are_independent": (SnapKV, clones_share_storage),
    "foreign_caches_are_refused": (SnapKV, replaces_foreign_caches),
    "misused_caches_are_refused": (SnapKV, crops_what_it_can),
    "drafting_with_every_step_is_refused": (TOVA, refuses_nothing),
    "attention_weights_are_refused": (SnapKV, answers_without_attention),
    "keeping_all_is_exact": (never_keeps_all, nothing),
    "output_is_faithful": (SnapKV, keeps_the_wrong_slot),
    "bytes_are_real": (SnapKV, claims_half_the_bytes),
    "padded_rows_equal_single_rows": (SnapKV, forgets_the_pads),
    "chunks_equal_one_prompt": (SnapKV, never_waits_for_the_prompt),
    "every_turn_is_compressed": (SnapKV, compresses_the_first_turn_only),
    "leaves_no_trace": (SnapKV, lambda patch: on_exit(patch, leaves_a_hook)),
}


def test_there_is_a_specimen_for_every_check():
    assert set(SPECIMENS) == set(CHECKS)


@pytest.mark.parametrize("name", SPECIMENS)
def test_check_goes_red(name, monkeypatch):
    make, break_something = SPECIMENS[name]
    break_something(monkeypatch)
    with pytest.raises(AssertionError):
        run_check(CHECKS[name], make)


def test_an_undeclared_refusal_goes_red():
    from sparing.errors import MethodRefusedError

    class Moody(Scorer):
        def score(self, state, stored):
            raise MethodRefusedError("moody", "does not feel like it")

    with pytest.raises(AssertionError, match="without a declared reason"):
        run_check(CHECKS["every_turn_is_compressed"], using(Moody))


def test_check_method_names_the_broken_promise():
    with pytest.raises(AssertionError, match=r"inputs_are_untouched on llama: .*HalvesTheKeys"):
        check_method(using(HalvesTheKeys), models=["llama"])


def test_check_method_passes_a_sound_method_and_lists_refusals():
    assert check_method(Knorm, models=["llama"]) == []
