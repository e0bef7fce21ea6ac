"""Blocks cut to the token, ends first, and methods that read."""

import pytest
import torch
from oracles import random_case

from sparing.core.actions import Rerotate
from sparing.core.allocate import Pyramid, Uniform
from sparing.core.method import Method, Parts, methods
from sparing.core.parsing import parse_method
from sparing.core.reader import Choice, Reader, Step, Watching, best_blocks, num_blocks, until, with_ends
from sparing.errors import MethodRefusedError, UnknownNameError

READERS = ["actqkv", "longheads", "quest", "refreshkv"]


def step(counts, tokens: int = 13):
    case = random_case(tokens=13)
    stored = until(case.stored, tokens)
    return Step(case.queries.states[:, :, tokens - 1], stored, case.queries.softmax, torch.tensor(counts))


def slots(choice, row, head):
    return choice.slots[row, head, choice.valid[row, head]].tolist()


def test_best_blocks_by_hand():
    """13 tokens, 0, 3 and 7 pads, blocks of 4: 4 blocks (the last of one token), 3 (of two) and 2 (of two)."""
    given = step([[6, 1], [5, 10], [3, 6]])
    assert num_blocks(given.stored, 4).tolist() == [4, 3, 2]
    scores = torch.tensor([[[1.0, 3, 2, 2.5], [0, 0, 0, 9]], [[5.0, 1, 4, 7], [1, 1, 1, 1]], [[1.0, 2, 9, 9]] * 2])
    choice = best_blocks(scores, 4, given)
    assert slots(choice, 0, 0) == [4, 5, 6, 7, 11, 12]  # block 1, block 3, and the newest of block 2
    assert slots(choice, 0, 1) == [12]
    assert slots(choice, 1, 0) == [3, 4, 5, 6, 12]  # blocks 0 and half of 2; there is no block 3
    assert slots(choice, 1, 1) == list(range(3, 13))
    assert slots(choice, 2, 0) == [10, 11, 12]
    assert slots(choice, 2, 1) == list(range(7, 13))


def test_equal_scores_go_to_the_earlier_block():
    choice = best_blocks(torch.zeros(3, 2, 4), 4, step([[5, 4]] * 3))
    assert slots(choice, 0, 0) == [0, 1, 2, 3, 7]
    assert slots(choice, 0, 1) == [0, 1, 2, 3]


def test_ends_come_first():
    given = step([[13, 13], [10, 10], [6, 6]])
    scores = with_ends(torch.ones(3, 2, 1), 4, given.stored)
    ranked = torch.argsort(scores, dim=-1, descending=True, stable=True)
    assert ranked[0, 0].tolist() == [3, 0, 2, 1]
    assert ranked[1, 1, :3].tolist() == [2, 0, 1]
    assert ranked[2, 0, :2].tolist() == [1, 0]


def test_reads_all_counts_without_pads():
    assert step([[13, 13], [10, 10], [6, 7]]).reads_all
    assert not step([[13, 13], [9, 10], [6, 6]]).reads_all


class Nothing(Reader):
    def choose(self, state, step):
        return state, Choice(None)


def test_the_base_knows_nothing():
    reader, case = Nothing(), random_case()
    assert reader.observe(None, case.queries, case.stored) is None
    assert reader.crop({"x": torch.zeros(3)}, 5) is None
    scores = Watching(reader).score(None, case.stored)
    assert scores.shape == case.stored.valid.shape
    assert not scores.any()
    with pytest.raises(NotImplementedError):
        Reader().choose(None, step([[1, 1]] * 3))


def test_the_parts_of_a_method_that_reads():
    reader = Nothing()
    parts = Parts.reading(reader)
    assert (parts.scorer, parts.allocator, parts.reader) == (Watching(reader), Uniform(), reader)
    assert Parts.reading(reader, Pyramid()).allocator == Pyramid()
    assert not parts.frees
    parts.check("x")
    for more in ({"moment": "every_step"}, {"moment": "chunk_end"}, {"action": Rerotate()}):
        with pytest.raises(MethodRefusedError, match="nothing is dropped"):
            Parts(Watching(reader), Uniform(), reader=reader, **more).check("x")


@pytest.mark.parametrize("name", [*READERS, "deltallm"])
def test_methods_that_free_nothing_say_so(name):
    assert "frees no memory" in methods()[name].summary
    assert not parse_method(name).parts().frees
    with pytest.raises(MethodRefusedError, match=f"use {name} alone"):
        parse_method(f"{name}+adaptive")
    with pytest.raises(UnknownNameError, match="unknown allocator"):
        parse_method(f"{name}+adaptve")


def test_all_others_free_memory():
    for name, info in methods().items():
        if name not in [*READERS, "deltallm"] and not info.needs and not info.needs_draft:
            assert info.recipe().parts().frees, name


@pytest.mark.parametrize("name", READERS)
def test_codes_are_refused(name):
    recipe: type[Method] = methods()[name].recipe
    with pytest.raises(MethodRefusedError, match="codes do not allow"):
        recipe(bits=8)
