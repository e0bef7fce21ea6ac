"""Each check of methods that free nothing goes red on something broken in the way that it is there to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from sparing import DeltaLLM, LongHeads, Quest, RefreshKV
from sparing.adapters import reading
from sparing.adapters.cache import EvictingCache
from sparing.adapters.reading import Reading
from sparing.core.method import Method, Parts
from sparing.core.reader import Choice, Reader
from sparing.methods.kv.deltallm import Differences
from sparing.methods.kv.quest import PageBounds
from sparing.methods.kv.refreshkv import RecycledAttention
from sparing.testing import CHECKS, run_check
from sparing.testing.checks import whole
from sparing.testing.contract import fitting


class OneTooMany(PageBounds):
    def choose(self, state, step):
        return super().choose(state, replace(step, counts=step.counts + 1))


class MissesTheNewest(Reader):
    def choose(self, state, step):
        tokens = step.stored.keys.shape[2]
        slots = torch.arange(tokens - 1 - int(step.counts.max()), tokens - 1).clamp_min(0)
        return state, Choice(slots.expand(*step.counts.shape, -1))


class NeverForgets(PageBounds):
    def crop(self, state, tokens):
        return state


def using(reader: Callable[[], Reader]) -> Callable[..., Method]:
    @dataclass(frozen=True)
    class Specimen(Method):
        def parts(self):
            return Parts.reading(reader())

    return lambda *, keep: Specimen(keep)


def drops_a_token(patch):
    append = Reading.append

    def worse(self, keys, values):
        append(self, keys, values)
        self.length -= self.length % 7 == 0

    patch.setattr(Reading, "append", worse)


def claims_half_the_bytes(patch):
    held = EvictingCache.bytes_kept.fget
    patch.setattr(EvictingCache, "bytes_kept", property(lambda self: held(self) // 2))


def holds_everything_twice(patch):
    patch.setattr(reading, "SLACK", 2000)


def harms_short_prompts(patch):
    patch.setattr(EvictingCache, "_tokens_per_head", lambda self, seen: self.method.budget.tokens_per_head(seen, 10**6))


def reads_prompts_in_part(patch):
    real = reading.attend_and_read

    def careless(layer, query, softmax):
        held, layer.cache.is_reading = layer.cache.is_reading, False
        try:
            return real(layer, query, softmax)
        finally:
            layer.cache.is_reading = held

    patch.setattr("sparing.adapters.layers.attend_and_read", careless)


def never_waits_for_the_prompt(patch):
    patch.setattr(EvictingCache, "expect_prompt", lambda self, length: None)


def reads_the_neighbour(patch):
    attend = Reading._attend_choice

    def wrong(self, query, softmax, choice, slots):
        return attend(self, query, softmax, choice, (slots - 1).clamp_min(0))

    patch.setattr(Reading, "_attend_choice", wrong)


def careless_attention(patch):
    lane = reading._lane
    patch.setattr(reading, "_lane", lambda *args: lane(*args) * 1.2)


def forgets_the_last_differences(patch):
    apply = Differences.apply

    def worse(self, kept, stored, scores):
        folded = apply(self, kept, stored, scores)
        return replace(folded, kept=[[slots[:-1] for slots in row] for row in folded.kept])

    patch.setattr(Differences, "apply", worse)


def nothing(patch):
    pass


# check → (the method, what else is broken)
SPECIMENS: list[tuple[str, Callable[..., Method], Callable[[Any], None]]] = [
    ("kept_counts_match_the_budget", using(OneTooMany), nothing),
    ("kept_counts_match_the_budget", using(MissesTheNewest), nothing),
    ("kept_counts_match_the_budget", DeltaLLM, forgets_the_last_differences),
    ("size_while_decoding", Quest, drops_a_token),
    ("short_prompts_lose_nothing", Quest, harms_short_prompts),
    ("bytes_are_real", Quest, claims_half_the_bytes),
    ("bytes_are_real", Quest, holds_everything_twice),
    ("every_turn_is_compressed", Quest, reads_prompts_in_part),
    ("turns_by_hand", RefreshKV, reads_prompts_in_part),
    ("generate_in_chunks", RefreshKV, never_waits_for_the_prompt),
    ("misused_caches_are_refused", using(NeverForgets), nothing),
    ("output_is_faithful", Quest, reads_the_neighbour),
    ("output_is_faithful", lambda *, keep: LongHeads(keep, chunk=8), reads_the_neighbour),
    ("bfloat16_error_is_bounded", Quest, careless_attention),
]


def test_there_is_a_specimen_for_every_check():
    assert {name for name, _, _ in SPECIMENS} == set(whole.FREES_NOTHING) | set(whole.READS_A_PART)
    assert set(whole.FREES_NOTHING) | set(whole.READS_A_PART) <= set(CHECKS)


@pytest.mark.parametrize(("name", "make", "break_something"), SPECIMENS, ids=lambda x: getattr(x, "__name__", x))
def test_check_goes_red(name, make, break_something, monkeypatch):
    break_something(monkeypatch)
    with pytest.raises(AssertionError):
        run_check(CHECKS[name], make)


def test_methods_that_free_memory_run_the_usual_checks():
    from sparing import SnapKV

    for name, check in CHECKS.items():
        assert fitting(check, SnapKV) is check.run
        instead = {**whole.FREES_NOTHING, **whole.READS_A_PART}.get(name, check.run)
        assert fitting(check, Quest) is instead
    assert fitting(CHECKS["output_is_faithful"], DeltaLLM) is CHECKS["output_is_faithful"].run
    assert RecycledAttention().crop({"at": torch.tensor([3])}, 2) is None
