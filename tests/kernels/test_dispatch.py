"""Dense or sparse: by rates that are given here, not measured."""

import pytest
import torch

from sparing import BlockTopK, SpecPC
from sparing.kernels.sparse import dispatch
from sparing.kernels.sparse.dispatch import Rates, is_worth, note, rates
from sparing.testing import tiny_model


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """A machine on which a sparse pair costs twice a dense one, and nothing has been learned."""
    monkeypatch.setattr(dispatch, "rates", lambda shape: Rates(dense=1.0, sparse=2.0))
    monkeypatch.setattr(dispatch, "_paid", {})


def call(tokens, heads=2, rows=None):
    return [torch.zeros(heads, n, 8) for n in (rows or tokens, tokens, tokens)]


@pytest.mark.parametrize(
    ("keep", "worth"), [(0.3, True), (0.49, True), (0.51, False), (0.9, False), (100, True), (600, False)]
)
def test_a_first_call_is_decided_by_the_rates(keep, worth):
    assert is_worth(BlockTopK(keep=keep), *call(1000)) == worth


def test_two_blocks_are_never_worth_it():
    method = BlockTopK(keep=0.1, block=64)
    assert not is_worth(method, *call(128))
    assert is_worth(method, *call(129))


def test_later_calls_are_decided_by_how_long_the_first_took():
    slow, fast = BlockTopK(keep=0.1), BlockTopK(keep=0.2)
    pairs = 2 * 1000 * 1001 // 2
    note(slow, *call(1000), 1.1 * pairs)
    note(fast, *call(1000), 0.9 * pairs)
    assert not is_worth(slow, *call(1000))
    assert not is_worth(slow, *call(900)), "of about the same length"
    assert is_worth(slow, *call(5000)), "of another length"
    assert is_worth(fast, *call(1000))
    note(slow, *call(1000), 0.8 * pairs)
    assert is_worth(slow, *call(1000)), "the first was disturbed"


def test_rows_of_a_later_turn_count_what_they_see():
    method = BlockTopK(keep=0.1)
    pairs = 2 * (10 * 990 + 55)
    note(method, *call(1000, rows=10), 0.9 * pairs)
    assert is_worth(method, *call(1000, rows=10))
    note(method, *call(3000, rows=10), 1.1 * 2 * (10 * 2990 + 55))
    assert not is_worth(method, *call(3000, rows=10))


def test_rates_are_measured():
    shape = dispatch._shape(BlockTopK(), *call(1000))
    measured = rates.__wrapped__(shape) if hasattr(rates, "__wrapped__") else rates(shape)
    assert measured.dense > 0
    assert measured.sparse > 0


def test_what_was_learned_keeps_no_draft_model_alive():
    method = BlockTopK(keep=0.1, prompt=SpecPC(draft=tiny_model("llama")))
    note(method, *call(1000), 1.0)
    assert [known.prompt for known, *_ in dispatch._paid] == [None]
    assert is_worth(method, *call(1000))
