"""Generated documents and queries: what is relevant, and what shared words tell."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sparing.errors import InvalidInputError
from sparing.tasks.ranking_sets import fact_set, pairing_set
from tests.tasks.letters import needles_in


def key_of(query):
    return re.search(r"number for ([a-z]+ [a-z]+)\?", query)[1]


def words(text):
    return Counter(re.findall(r"[a-z]+", text.lower()))


@pytest.mark.parametrize("seed", range(3))
def test_the_grades_of_facts(seed):
    made = fact_set(seed, documents=12, queries=4, words=15)
    assert len(made.documents) == len(set(made.documents)) == 12
    assert len(made.queries) == len(set(made.queries)) == len(made.grades) == 4
    for query, grades in zip(made.queries, made.grades, strict=True):
        assert sorted(grades) == [0] * 10 + [1, 2]
        for document, grade in zip(made.documents, grades, strict=True):
            assert needles_in(document), "a fact in each"
            assert grade == (key_of(query) in document) * (1 + ("magic number" in document))
    assert all(len(document.split()) >= 15 for document in made.documents)


@pytest.mark.parametrize("seed", range(3))
def test_documents_of_pairs_have_the_same_words_and_one_answers(seed):
    made = pairing_set(seed, documents=5, queries=7)
    assert all(words(document) == words(made.documents[0]) for document in made.documents)
    assert len(set(made.documents)) == 5
    for query, grades in zip(made.queries, made.grades, strict=True):
        assert sorted(grades) == [0, 0, 0, 0, 1]
        told = [key_of(query) in dict(needles_in(document)) for document in made.documents]
        assert list(grades) == told


def test_a_set_of_facts_has_other_words_in_other_documents():
    """The check above can fail."""
    made = fact_set()
    assert any(words(document) != words(made.documents[0]) for document in made.documents)


def test_seeds_and_places():
    assert fact_set(3) == fact_set(3) != fact_set(4)
    assert pairing_set(3) == pairing_set(3) != pairing_set(4)
    for make in (fact_set, pairing_set):
        places = {grades.index(max(grades)) for seed in range(10) for grades in make(seed).grades}
        assert len(places) > 5, "the relevant document may stand anywhere"


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (fact_set, {"documents": 1}), (fact_set, {"documents": 8, "queries": 5}), (fact_set, {"queries": 0}),
        (fact_set, {"documents": 5}),
        (fact_set, {"documents": 102}), (pairing_set, {"documents": 1}), (pairing_set, {"documents": 41}),
        (pairing_set, {"documents": 2, "queries": 5}),
    ],
)  # fmt: skip
def test_numbers_out_of_range(make, given):
    with pytest.raises(InvalidInputError):
        make(**given)
