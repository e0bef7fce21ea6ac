"""Samples for scorers of heads: exact lengths, answers where they are said to be, the same for the same seed."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from sparing.errors import InvalidInputError
from sparing.models import resolve
from sparing.scoring import MAKERS
from sparing.tasks import get, haystack, load_user_task
from sparing.tasks.encoding import Encoder
from sparing.tasks.probes import needle_samples, pair_samples, text_samples
from sparing.tasks.ranking_probes import NO_QUERY, ranking_sample, ranking_samples
from tests.tasks.conftest import LOSSLESS
from tests.tasks.letters import Letters, needles_in

LENGTH = 900

# The metaspace tokenizer merges the end of a word with the full stop behind it, so a value of words has no tokens of
# its own there; digits are never merged.
WITH_VALUES = [
    (family, kind) for family in LOSSLESS for kind in ("number", "word") if (family, kind) != ("metaspace_bpe", "word")
]


@pytest.fixture(scope="module")
def bundled():
    return AutoTokenizer.from_pretrained(resolve("bundled"))


def cut(ids, span):
    return ids[slice(*span)]


def front_of(tokenizer):
    return tuple(Encoder(tokenizer).front)


@pytest.mark.parametrize("kind", ["text", "needle", "pair", "ranking"])
def test_same_seed_same_samples_and_others_otherwise(kind):
    first, again, other = (MAKERS[kind](Letters(), 3, LENGTH, seed) for seed in (5, 5, 6))
    assert first == again
    assert len({repr(sample) for sample in [*first, *other]}) == 6, "no two samples are the same"
    assert MAKERS[kind](Letters(), 1, LENGTH, 5) == first[:1], "more samples do not change the first ones"


@pytest.mark.parametrize("kind", ["text", "needle", "pair", "ranking"])
def test_defaults_fit_the_bundled_model(bundled, kind):
    for sample in MAKERS[kind](bundled, 4, 512, 0):
        ids = sample.clean if kind == "pair" else sample.ids
        assert 400 < len(ids) <= 512


@pytest.mark.parametrize("family", LOSSLESS)
@pytest.mark.parametrize("length", [40, 333, 2000])
def test_texts_are_so_many_tokens_of_the_novel(tokenizers, family, length):
    tokenizer = tokenizers[family]
    for sample in text_samples(tokenizer, 2, length):
        assert len(sample.ids) == length
        front = front_of(tokenizer)
        assert sample.ids[: len(front)] == front
        assert sample.response == 0
        words = tokenizer.decode(list(sample.ids[len(front) :])).strip()
        assert words in " ".join(s.strip() for s in haystack.sentences())


@pytest.mark.parametrize(("family", "values_are"), WITH_VALUES)
@pytest.mark.parametrize("hay", ["text", "noise"])
def test_needles_hold_their_value_where_it_is_said(tokenizers, family, values_are, hay):
    tokenizer = tokenizers[family]
    for sample in needle_samples(tokenizer, 3, LENGTH, task=get("needle_single", values_are=values_are, haystack=hay)):
        assert len(sample.ids) + sample.max_new_tokens == LENGTH
        assert cut(sample.ids, sample.value) == sample.answer_ids
        assert sample.needle[0] <= sample.value[0] < sample.value[1] <= sample.needle[1]
        [(key, value)] = needles_in(tokenizer.decode(list(cut(sample.ids, sample.needle))))
        assert sample.answers == (value,)
        assert tokenizer.decode(list(sample.answer_ids)).strip() == value
        # The question comes last, and ends with the words in front of the value.
        question = tokenizer.decode(list(sample.ids[-150:]))
        assert question.rstrip().endswith(f"for {key} is:")
        assert sample.needle[1] < len(sample.ids) - 20


def test_of_a_context_with_several_questions_each_sample_takes_another():
    task = get("needle_multikey", keys=3)
    samples = needle_samples(Letters(), 4, 2000, task=task)
    for index, sample in enumerate(samples):
        questions = task.sample(Letters(), 2000, 0, index).questions
        asked = questions[index % len(questions)]
        assert sample.ids[-len(asked.token_ids) :] == asked.token_ids
        assert sample.answers == asked.answers
        assert cut(sample.ids, sample.value) == sample.answer_ids


def test_needles_of_a_file_have_their_own_lengths(tmp_path):
    """No evidence is given, so the needle is the value; the last place where it stands is taken."""
    path = tmp_path / "mine.txt"
    path.write_text("So Ada came. Then Ada left.\nQ: Who?\nA: Ada\nQ: What then?\nA: left\n")
    who, then = needle_samples(Letters(), 9, 0, task=load_user_task(path))
    assert who.needle == who.value == (18, 22)  # 256 in front, and not (3, 7)
    assert bytes(cut(who.ids, who.value)) == b" Ada"
    assert bytes(cut(then.ids, then.value)) == b" left"
    assert bytes(who.ids[1:]) == b"So Ada came. Then Ada left.\nQ: Who?\nA:"


def test_answers_that_do_not_stand_in_the_context_are_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Ada came.\nQ: Who?\nA: Grace\n")
    with pytest.raises(InvalidInputError, match="word for word"):
        needle_samples(Letters(), 1, 0, task=load_user_task(path))
    path.write_text("Ada came.\nQ: Who?\n")
    with pytest.raises(InvalidInputError, match="with an answer"):
        needle_samples(Letters(), 1, 0, task=load_user_task(path))


def test_values_without_tokens_of_their_own_are_refused(tokenizers):
    for make in (needle_samples, pair_samples):
        more = {"task": get("needle_single", values_are="word")} if make is needle_samples else {"values_are": "word"}
        with pytest.raises(InvalidInputError, match="choose another task"):
            make(tokenizers["metaspace_bpe"], 9, LENGTH, **more)


@pytest.mark.parametrize(("family", "values_are"), WITH_VALUES)
def test_pairs_differ_in_the_value_and_in_what_comes_next(tokenizers, family, values_are):
    tokenizer = tokenizers[family]
    task = get("needle_single", values_are=values_are)
    pairs = pair_samples(tokenizer, 4, LENGTH, values_are=values_are)
    for pair, needle in zip(pairs, needle_samples(tokenizer, 4, LENGTH, task=task), strict=True):
        start, end = needle.value
        assert len(pair.clean) == len(pair.corrupt)
        assert pair.clean[: len(needle.ids)] == needle.ids
        assert pair.changed, "the two are one"
        assert all(start <= place < end for place in pair.changed)
        # Both go on with what the two values share, up to the tokens that tell them apart.
        shared = pair.changed[0] - start
        assert pair.clean[len(needle.ids) :] == pair.corrupt[len(needle.ids) :] == needle.answer_ids[:shared]
        assert pair.answer == pair.clean[pair.changed[0]]
        assert pair.wrong == pair.corrupt[pair.changed[0]]
        assert pair.answer != pair.wrong


def test_pairs_are_given_up_if_no_other_value_is_ever_drawn(monkeypatch):
    monkeypatch.setattr(haystack, "draw_value", lambda rng, kind: "12345")
    with pytest.raises(InvalidInputError, match="two values of equal length"):
        pair_samples(Letters(), 1, LENGTH)


@pytest.mark.parametrize("family", LOSSLESS)
@pytest.mark.parametrize("documents", [2, 4])
def test_rankings_hold_one_fact_a_document_and_ask_for_one(tokenizers, family, documents):
    tokenizer = tokenizers[family]
    for sample in ranking_samples(tokenizer, 3, 1200, documents=documents):
        assert len(sample.ids) <= 1200
        assert len(sample.documents) == documents
        assert sample.ids[: sample.query_start] == sample.null_ids[: sample.query_start]
        assert sample.documents[-1][1] == sample.query_start
        asked, nothing = (tokenizer.decode(list(i[sample.query_start :])) for i in (sample.ids, sample.null_ids))
        assert NO_QUERY in nothing
        facts = []
        for number, span in enumerate(sample.documents, 1):
            [fact] = needles_in(tokenizer.decode(list(cut(sample.ids, span))))
            facts.append(fact)
            before = tokenizer.decode(list(sample.ids[max(0, span[0] - 8) : span[0]]))
            assert before.endswith(f"[{number}]")
        [gold] = sample.gold
        assert [key in asked for key, _ in facts] == [index == gold for index in range(documents)]
        assert not any(value in asked for _, value in facts)
        assert asked.replace(facts[gold][0], NO_QUERY) == nothing


def test_the_gold_document_is_anywhere():
    assert {sample.gold[0] for sample in ranking_samples(Letters(), 40, 900)} == {0, 1, 2, 3}


def test_documents_of_ones_own():
    sample = ranking_sample(Encoder(Letters()), "Who came?", ["Ada came.", "It rained all day."], [0])
    assert [bytes(cut(sample.ids, span)) for span in sample.documents] == [b" Ada came.", b" It rained all day."]
    assert bytes(sample.ids[sample.query_start :]).endswith(b"Query: Who came?")
    assert bytes(sample.null_ids[sample.query_start :]).endswith(b"Query: N/A")
    assert sample.gold == (0,)


@pytest.mark.parametrize(("documents", "gold"), [([], []), (["a", "b"], [2]), (["a", "b"], [-1]), (["a", "b"], [])])
def test_gold_that_is_no_document_is_refused(documents, gold):
    with pytest.raises(ValueError, match="gold among them"):
        ranking_sample(Encoder(Letters()), "Who?", documents, gold)


@pytest.mark.parametrize("kind", ["needle", "pair", "ranking"])
def test_lengths_without_room_are_refused(kind):
    with pytest.raises(InvalidInputError, match="length"):
        MAKERS[kind](Letters(), 1, 60, 0)


def test_the_shortest_ranking_is_named_and_works():
    with pytest.raises(InvalidInputError, match="for 4 documents") as error:
        ranking_samples(Letters(), 1, 60)
    least = int(error.value.allowed.split()[2])
    assert len(ranking_samples(Letters(), 1, least)[0].ids) <= least
    with pytest.raises(InvalidInputError):
        ranking_samples(Letters(), 1, least - 1)
