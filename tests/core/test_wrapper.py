"""A wrapper is what the wrapped scorer is, but for what it changes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from oracles import random_case

from sparing.core.scorer import Scorer
from sparing.core.wrapper import Wrapper


@dataclass(frozen=True)
class Plain(Scorer):
    def score(self, state, stored):
        return state + stored.keys[..., 0]

    def observe(self, state, queries, stored):
        return (0 if state is None else state) + len(queries.positions)

    def rank_heads(self, state, stored):
        return torch.ones(stored.keys.shape[:2])

    def protects(self, tokens_per_head):
        return (1, tokens_per_head)


class Capable(Plain):
    comparable_across_heads: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True
    state_outlives_eviction: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    follows_decoding: ClassVar[bool] = True
    refines: ClassVar[bool] = True

    def refine(self, values, contenders, room, stored):
        return values * 2


class NeedsOutput(Wrapper):
    needs_output: ClassVar[bool] = True


def test_it_watches_scores_and_protects_as_the_other_does():
    case, plain = random_case(), Plain()
    for sizes in ([13], [6, 7]):
        assert torch.equal(case.score(Wrapper(plain), sizes), case.score(plain, sizes))
    assert Wrapper(plain).protects(7) == (1, 7)
    assert torch.equal(Wrapper(plain).rank_heads(None, case.stored), torch.ones(3, 2))
    assert torch.equal(Wrapper(Capable()).refine(case.stored.keys, None, None, case.stored), case.stored.keys * 2)


def test_it_can_do_what_the_other_can_but_never_follows_token_by_token():
    for scorer in (Plain(), Capable()):
        mine = Wrapper(scorer)
        for name in ("comparable_across_heads", "needs_rotary", "state_outlives_eviction", "refines"):
            assert getattr(mine, name) is getattr(scorer, name), name
        assert (mine.accumulates, mine.follows_decoding) == (False, False)
    assert NeedsOutput(Plain()).needs_output
    assert not Wrapper(Plain()).needs_output
    assert NeedsOutput(Capable()).needs_rotary


def test_it_is_a_value():
    assert Wrapper(Plain()) == Wrapper(Plain())
    assert hash(Wrapper(Plain())) == hash(Wrapper(Plain()))
    assert Wrapper(Plain()) != NeedsOutput(Plain())
