"""The filter of document scores and graded nDCG, by hand and as slow loops."""

from __future__ import annotations

import math
import random

import pytest
import torch

from sparing.errors import InvalidInputError
from sparing.measures.documents import document_scores, graded_ndcg, ndcg


def test_the_deviation_is_the_unbiased_one():
    """Mean -0.208; deviation 0.400 (with n - 1) or 0.366 (with n): -1 is above -1.01 and below -0.94, so it stays."""
    tokens = torch.tensor([0.0, 0.0, 0.0, 0.0, -0.25, -1.0])
    assert document_scores(tokens, [(0, 6)]).tolist() == [-1.25]


def slow_ndcg(scores, grades, at):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:at]
    gain = sum(grades[document] / math.log2(rank + 1) for rank, document in enumerate(order, 1))
    best = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades, reverse=True)[:at], 1))
    return gain / best


def test_graded_ndcg_worked_by_hand():
    """Ranked 2, 0, 1 with grades 3, 0, 2 there: (2 + 3 / log2 3) / (3 + 2 / log2 3)."""
    expected = (2 + 3 / math.log2(3)) / (3 + 2 / math.log2(3))
    assert float(graded_ndcg(torch.tensor([0.5, 0.1, 0.9]), [3, 0, 2])) == pytest.approx(expected)
    assert float(graded_ndcg(torch.tensor([0.9, 0.1, 0.5]), [3, 0, 2])) == 1
    assert float(graded_ndcg(torch.tensor([0.9, 0.1, 0.5]), [0, 1, 0], at=2)) == 0


@pytest.mark.parametrize("at", [1, 3, 10])
def test_graded_ndcg_is_the_definition(at):
    rng = random.Random(at)
    for _ in range(20):
        count = rng.randrange(1, 15)
        scores = [rng.random() for _ in range(count)]
        grades = [rng.choice([0, 0, 1, 2, 0.5]) for _ in range(count - 1)] + [1]
        found = float(graded_ndcg(torch.tensor(scores, dtype=torch.float64), grades, at))
        assert found == pytest.approx(slow_ndcg(scores, grades, at), abs=1e-12)
        assert 0 <= found <= 1 + 1e-12


def test_binary_grades_are_gold_documents_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.4, 0.3, 0.2, 0.1]])
    assert torch.equal(ndcg(scores, [1, 3]), graded_ndcg(scores, [0, 1, 0, 1]))
    assert float(graded_ndcg(torch.zeros(3), [0, 0, 1])) == pytest.approx(1 / math.log2(4))


@pytest.mark.parametrize("grades", [[0, 0], [-1, 1], [math.nan, 1], [math.inf, 1], []])
def test_grades_that_say_nothing_are_refused(grades):
    with pytest.raises(InvalidInputError, match="grades"):
        graded_ndcg(torch.zeros(len(grades)), grades)
