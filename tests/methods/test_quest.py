"""Quest: bounds that hold, pages by hand, metadata that grows as it would be rebuilt."""

import math

import pytest
import torch
from oracles import build, random_case

from methods.reading import best_of_blocks, decode
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.methods.kv.quest import PageBounds, Quest

PADS = (0, 3, 7)


def bound(case, row, query_head, page, size, tokens):
    """Σ_c max(q_c m_c, q_c M_c) of one page, a number at a time."""
    kv = query_head // (case.queries.states.shape[1] // case.stored.keys.shape[1])
    start = PADS[row] + page * size
    keys = case.stored.keys[row, kv, start : min(start + size, tokens)].double()
    query = case.queries.states[row, query_head, tokens - 1].double()
    return sum(max(float(q * keys[:, c].min()), float(q * keys[:, c].max())) for c, q in enumerate(query))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_reads_what_the_equation_says(size):
    case = random_case(seed=3, tokens=17)
    compared = 0
    for read in decode(PageBounds(size), case, prompt=11, count=6):
        tokens = read.step.stored.keys.shape[2]
        for row, pad in enumerate(PADS):
            pages = -(-(tokens - pad) // size)
            for head in range(2):
                scores = [sum(bound(case, row, 2 * head + g, p, size, tokens) for g in (0, 1)) for p in range(pages)]
                scores[-1] = math.inf
                wanted = best_of_blocks(scores, size, tokens, pad, min(6, tokens - pad))
                assert read.slots(row, head) == wanted
                compared += len(wanted) < tokens - pad
    assert compared > 20


def test_the_bound_is_one():
    """No key of a page has a larger logit than the page's bound."""
    case = random_case(seed=4, tokens=17)
    for row, pad in enumerate(PADS):
        for query_head in range(4):
            logits = case.stored.keys[row, query_head // 2].double() @ case.queries.states[row, query_head, 16].double()
            for page in range((17 - pad) // 4):
                inside = logits[pad + 4 * page : pad + 4 * page + 4]
                assert bound(case, row, query_head, page, 4, 17) >= float(inside.max()) - 1e-12


def test_pages_of_one_token_are_exact_top_k():
    case = random_case(seed=5, tokens=14)
    read = decode(PageBounds(1), case, prompt=13, count=5)[0]
    for row, pad in enumerate(PADS):
        for head in range(2):
            query = case.queries.states[row, 2 * head : 2 * head + 2, 13].double().sum(0)
            logits = (case.stored.keys[row, head].double() @ query)[pad:13]
            best = (logits.topk(4).indices + pad).tolist()
            assert read.slots(row, head) == sorted([*best, 13])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_growing_is_rebuilding(size):
    case = random_case(seed=6, tokens=25)
    reader = PageBounds(size)
    for read in decode(reader, case, prompt=11, count=2):
        fresh = reader._rebuilt(read.step.stored)
        for name in ("low", "high", "covered"):
            assert torch.equal(read.state[name], fresh[name]), f"{name} at {read.step.stored.keys.shape[2]} tokens"


def test_a_page_of_large_negative_keys_has_no_zero_in_it():
    """Keys of −9 with a query of 1: the bound is −9, not 0, so the page of −1 is read before it."""
    keys = torch.full((1, 1, 7, 2), -9.0)
    keys[0, 0, 2:4] = -1.0
    case = build(torch.ones(1, 1, 7, 2), keys, softmax=Softmax(1.0))
    reads = decode(PageBounds(2), case, prompt=5, count=3)
    assert [read.slots(0, 0) for read in reads] == [[3, 4, 5], [2, 3, 6]]


def test_planted_page_is_read():
    """A page with 8 in a channel bounds a query of 1 there by 8; all others by at most 1."""
    keys = torch.ones(1, 1, 41, 4)
    keys[0, 0, 18, 2] = 8.0
    queries = torch.zeros(1, 1, 41, 4)
    queries[..., 2] = 1.0
    case = build(queries, keys)
    assert decode(PageBounds(4), case, prompt=40, count=5)[0].slots(0, 0) == [16, 17, 18, 19, 40]


def test_enough_room_and_dense_layers_read_everything():
    case = random_case(tokens=15)
    for reader, count in ((PageBounds(4), 15), (PageBounds(4, dense_layers=1), 3)):
        assert all(read.choice.slots is None for read in decode(reader, case, prompt=13, count=count))


def test_the_papers_numbers_and_what_is_refused():
    assert (Quest().page, Quest().dense_layers) == (16, 0)
    assert Quest().parts().reader == PageBounds(16, 0)
    for bad in ({"page": 0}, {"dense_layers": -1}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            Quest(**bad)
