"""Variable tracking, JSON lookup, counting, copying and perplexity: what is special to each."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import pytest

from sparing import tasks
from sparing.errors import InvalidInputError
from sparing.tasks import haystack, lookup
from sparing.tasks.counting import zeta_counts


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["byte_level_bpe"]


def test_chains_are_assigned_in_order_and_share_nothing(tokenizer):
    for seed in range(8):
        sample = tasks.get("variable_tracking", chains=3).sample(tokenizer, 1200, seed)
        names = [name for question in sample.questions for name in question.answers]
        assert len(set(names)) == 15
        for question in sample.questions:
            assert list(question.evidence) == sorted(question.evidence)
            said = [tokenizer.decode(sample.context_ids[start:end]) for start, end in question.evidence]
            value = re.search(r"\d{5}", question.text)[0]
            links = zip(question.answers, (value, *(f"VAR {name}" for name in question.answers)), strict=False)
            assert said == [f" VAR {name} = {held}." for name, held in links]


def test_object_is_valid_json_and_fills_the_context(tokenizer):
    sample = tasks.get("kv_retrieval").sample(tokenizer, 4000, 1)
    text = tokenizer.decode(sample.context_ids, skip_special_tokens=True)
    pairs = json.loads(text[text.index("{") :], object_pairs_hook=list)
    assert len({key for key, _ in pairs}) == len(pairs) > 100
    assert text.index("{") < 100
    spans = sorted(question.evidence[0] for question in sample.questions)
    assert spans[0] != spans[-1]
    assert len(set(spans)) == 4


def test_object_asks_for_any_place(tokenizer):
    depths = []
    for index in range(25):
        sample = tasks.get("kv_retrieval").sample(tokenizer, 900, 0, index)
        depths += [question.evidence[0][0] / len(sample.context_ids) for question in sample.questions]
    assert min(sum(low <= 4 * depth < low + 1 for depth in depths) for low in range(4)) >= 12


def test_object_ends_in_text_when_the_keys_are_used_up(tokenizer, monkeypatch):
    monkeypatch.setattr(lookup, "shuffled_keys", lambda rng: iter([f"key {n}" for n in range(9)]))
    sample = tasks.get("kv_retrieval").sample(tokenizer, 1000)
    text = tokenizer.decode(sample.context_ids)
    assert sample.length == 1000
    assert len(json.loads(text[text.index("{") :])) == 9


@pytest.mark.parametrize(("length", "often", "seldom"), [(1100, 6, 1), (6000, 30, 3)])
def test_common_words_are_listed_as_often_as_said(tokenizer, length, often, seldom):
    sample = tasks.get("common_words").sample(tokenizer, length, 2)
    listed = re.findall(r"(\d+)\. ([a-z]+)", tokenizer.decode(sample.context_ids))
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {counts[word] for word in sample.questions[0].answers} == {often}
    assert {count for word, count in counts.items() if word not in sample.questions[0].answers} == {seldom}


def test_frequent_words_differ_in_count(tokenizer):
    task = tasks.get("frequent_words")
    with pytest.raises(InvalidInputError) as refused:
        task.sample(tokenizer, 8, 5)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    for seed, length in ((5, least), (0, 450), (1, 800), (2, 3000)):
        sample = task.sample(tokenizer, length, seed)
        counts = Counter(re.findall(r"\b[a-z]{6}\b", tokenizer.decode(sample.context_ids)))
        top = counts.most_common(4)
        assert tuple(word for word, _ in top[:3]) == sample.questions[0].answers
        assert top[0][1] > top[1][1] > top[2][1] > top[3][1]


def test_zeta_counts_by_hand():
    # Shares 1, 1/4, 1/9, 1/16 of 205/144, so of 210 words 147.5, 36.9, 16.4 and 9.2.
    assert zeta_counts(210, 4) == [147, 36, 16, 9]
    assert zeta_counts(0, 3) == [1, 1, 1]
    for vocabulary in (10, 100, 3000):
        for count in range(74, 3000):
            counts = zeta_counts(count, vocabulary)
            assert counts[1] > counts[2] > counts[3] > counts[4]
            if count > 200 and vocabulary > 10:
                break


def test_copy_asks_for_what_follows(tokenizer):
    sample = tasks.get("copy").sample(tokenizer, 1500, 3)
    text = tokenizer.decode(sample.context_ids)
    for question in sample.questions:
        (wanted,), ((start, end),) = question.answers, question.evidence
        assert len(wanted.split()) == 12
        passage = tokenizer.decode(sample.context_ids[start:end]).split()
        given = question.text.partition("words: ")[2].split()
        assert passage[:8] == given
        assert passage[8:20] == wanted.split()
        assert text.count(" ".join(given)) == 1
    assert len({question.evidence for question in sample.questions}) == 4


def test_copy_asks_for_any_place(tokenizer):
    depths = []
    for index in range(25):
        sample = tasks.get("copy").sample(tokenizer, 1500, 0, index)
        depths += [question.evidence[0][0] / len(sample.context_ids) for question in sample.questions]
    assert min(sum(low <= 4 * depth < low + 1 for depth in depths) for low in range(4)) >= 10


def test_copy_does_not_ask_for_a_passage_that_begins_like_another(tokenizer, monkeypatch):
    ambiguous = " Once upon a time there was a good king."
    novel = haystack.sentences()[100:160]
    mixed = tuple(text for sentence in novel for text in (ambiguous, sentence))
    monkeypatch.setattr(haystack, "sentences", lambda: mixed)
    for seed in range(6):
        for question in tasks.get("copy").sample(tokenizer, 1500, seed).questions:
            assert "words: Once upon" not in question.text


def test_copy_of_a_text_that_only_repeats_itself_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(haystack, "sentences", lambda: (" Never was there a day like this one for us.",) * 9)
    with pytest.raises(InvalidInputError, match="repeat"):
        tasks.get("copy").sample(tokenizer, 1500)


def test_copy_scores_words_in_place(tokenizer):
    task = tasks.get("copy")
    question = task.sample(tokenizer, 1500).questions[0]
    words = question.answers[0].split()
    assert task.score(question, " ".join(words) + " and more.") == 1.0
    assert task.score(question, " ".join(words[:6])) == 0.5
    assert task.score(question, "x " + " ".join(words[1:])) == pytest.approx(11 / 12)


@pytest.mark.parametrize(("length", "scored"), [(40, 10), (400, 100), (2000, 128)])
def test_perplexity_continues_the_context(tokenizer, length, scored):
    task = tasks.get("perplexity")
    sample = task.sample(tokenizer, length, 1)
    (question,) = sample.questions
    assert len(question.target_ids) == question.max_new_tokens == scored
    assert question.answers == ()
    text = tokenizer.decode([*sample.context_ids[1:], *question.token_ids, *question.target_ids])
    assert text in "".join(haystack.sentences()) * 2


def test_perplexity_score_by_hand():
    task = tasks.get("perplexity")
    assert task.kind == "likelihood"
    assert task.score_likelihood(math.log(4)) == pytest.approx(0.25)
    assert task.score_likelihood(0.0) == 1.0
    assert task.score_likelihood(math.inf) == 0.0
    for broken in (math.nan, -1.0):
        with pytest.raises(InvalidInputError, match="loss"):
            task.score_likelihood(broken)


def test_value_ends_at_the_quotation_mark(tokenizer):
    task = tasks.get("kv_retrieval")
    question = task.sample(tokenizer, 900).questions[0]
    value = question.answers[0]
    assert task.score(question, value + '"') == task.score(question, value) == 1.0
    assert task.score(question, value + '1"') == task.score(question, '"' + value) == 0.0
