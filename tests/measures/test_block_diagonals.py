"""Diagonals of attention and of blocks: against plain loops over pairs."""

import pytest
import torch
from methods.prefill.sparse_calls import logits, random_call

from sparing.core.pattern import Pattern
from sparing.measures import blocks as measured
from sparing.measures.blocks import (
    best_offsets,
    best_that_fit,
    column_costs,
    diagonal_sums,
    diagonals_of,
    last_means,
)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 9), (4, 9), (9, 9), (5, 32)])
def test_diagonal_sums_are_a_loop_over_pairs(rows, tokens):
    table = torch.rand(2, rows, tokens, generator=torch.Generator().manual_seed(0)).tril(tokens - rows)
    wanted = torch.zeros(2, tokens, dtype=torch.float64)
    for head in range(2):
        for row in range(rows):
            for key in range(tokens - rows + row + 1):
                wanted[head, tokens - rows + row - key] += float(table[head, row, key])
    torch.testing.assert_close(diagonal_sums(table).double(), wanted, rtol=0, atol=rows * 2.0**-23)


@pytest.mark.parametrize(("tokens", "start", "count"), [(50, 0, 7), (50, 0, 64), (50, 45, 7), (33, 20, 13)])
def test_means_of_the_last_rows(tokens, start, count, monkeypatch):
    """Of columns and of offsets; a few heads at a time are all heads."""
    call = random_call(tokens, start, size=2.0)
    attention = logits(call).softmax(-1)[:, -count:]
    columns, offsets = last_means(call, count)
    wanted = torch.zeros(4, tokens, dtype=torch.float64)
    rows = attention.shape[1]
    for row in range(rows):
        at = tokens - rows + row
        for key in range(at + 1):
            wanted[:, at - key] += attention[:, row, key] / rows
    torch.testing.assert_close(columns.double(), attention.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(offsets.double(), wanted, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(measured, "ROWS_HELD", 1)
    for few, all_heads in zip(last_means(call, count), (columns, offsets), strict=True):
        torch.testing.assert_close(few, all_heads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 4, 9, 12, 15])
def test_a_diagonal_of_blocks_has_the_best_offset_of_any_of_its_pairs(tokens):
    size = 4
    scores = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1))
    wanted = torch.full((2, -(-tokens // size)), -torch.inf)
    for row in range(tokens + 2 * size):  # a row that could lie anywhere in its block
        for offset in range(min(row + 1, tokens)):
            number = row // size - (row - offset) // size
            if number < wanted.shape[1]:
                wanted[:, number] = wanted[:, number].maximum(scores[:, offset])
    assert torch.equal(best_offsets(scores, size), wanted)


@pytest.mark.parametrize(("tokens", "start"), [(64, 0), (75, 0), (75, 21), (70, 64)])
def test_what_a_column_costs_is_what_it_adds(tokens, start):
    """To the pairs of a pattern, one column after another."""
    call = random_call(tokens, start, heads=2)
    grid = call.grid(16)
    on = torch.rand(grid.blocks.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    on = Pattern(tokens, start, 16, on).blocks  # own ones included
    costs = column_costs(on, grid.areas() * (diagonals_of(grid) > 0), 16)
    before = Pattern(tokens, start, 16, on).pairs()
    for column in range(tokens):
        columns = torch.zeros(2, 1, tokens, dtype=torch.bool)
        columns[..., column] = True
        added = Pattern(tokens, start, 16, on, columns).pairs() - before
        assert torch.equal(added, costs[:, column // 16])


def test_numbers_of_diagonals():
    grid = random_call(50, 20, heads=1, kv_heads=1).grid(16)
    assert diagonals_of(grid).tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 0]]


def test_the_best_that_fit_are_the_first_until_one_does_not():
    """By falling score 5, 5, 3, 2 cost 2, 3, 4, 1: of 6, the first two fit, and nothing after what did not."""
    scores, costs = torch.tensor([[3.0, 5.0, -torch.inf, 5.0, 2.0]]), torch.tensor([[4, 2, 0, 3, 1]])
    assert best_that_fit(scores, costs, 6).tolist() == [[False, True, False, True, False]]
    assert best_that_fit(scores, costs, 10).tolist() == [[True, True, False, True, True]]
    assert best_that_fit(scores, costs, -1).any().item() is False
