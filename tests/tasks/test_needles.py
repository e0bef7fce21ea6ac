"""Needles: where they stand, how often, and what surrounds them."""

from __future__ import annotations

import itertools
import random
import re
from statistics import mean

import pytest

from sparing import tasks
from sparing.errors import InvalidInputError
from sparing.tasks import formats, haystack
from sparing.tasks.needles import join_keys

from .letters import needles_in

NEEDLES = ("needle_single", "needle_multikey", "needle_multivalue", "needle_multiquery")


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["byte_level_bpe"]


@pytest.mark.parametrize("hay", haystack.KINDS)
@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_where_the_evidence_says_and_only_there(tokenizer, name, hay):
    sample = tasks.get(name, haystack=hay).sample(tokenizer, 1500, 2)
    text = tokenizer.decode(sample.context_ids)
    for question in sample.questions:
        assert len(question.evidence) == len(question.answers)
        for (start, end), value in zip(question.evidence, question.answers, strict=True):
            needle = tokenizer.decode(sample.context_ids[start:end])
            ((key, planted),) = needles_in(needle)
            assert needle == formats.NEEDLE.format(kind="number", key=key, value=planted)
            assert planted == value
            assert key in question.text
            assert text.count(needle) == 1


@pytest.mark.parametrize("hay", haystack.KINDS)
def test_keys_and_values_are_unique(tokenizer, hay):
    for seed in range(5):
        sample = tasks.get("needle_multikey", haystack=hay, keys=8).sample(tokenizer, 1500, seed)
        found = needles_in(tokenizer.decode(sample.context_ids))
        assert len({key for key, _ in found}) == len(found) >= 8
        assert len({q.answers for q in sample.questions}) == 8
        assert (len(found) > 8) == (hay == "needles")


def test_needles_stand_between_sentences(tokenizer):
    for seed in range(10):
        sample = tasks.get("needle_single").sample(tokenizer, 700, seed)
        ((start, _),) = sample.questions[0].evidence
        before = tokenizer.decode(sample.context_ids[:start])
        assert re.search(r"""[.!?]["')]?$""", before)
        assert not re.search(r"\b(Mr|Mrs|Dr)\.$", before)


def test_depths_spread_over_the_context(tokenizer):
    depths = []
    for index in range(120):
        sample = tasks.get("needle_single", haystack="noise").sample(tokenizer, 600, 0, index)
        depths.append(sample.questions[0].evidence[0][0] / len(sample.context_ids))
    assert 0.42 < mean(depths) < 0.58
    counts = [sum(low <= 4 * depth < low + 1 for depth in depths) for low in range(4)]
    assert min(counts) >= 15


def test_multivalue_answers_stand_in_the_order_of_the_text(tokenizer):
    for seed in range(5):
        (question,) = tasks.get("needle_multivalue").sample(tokenizer, 900, seed).questions
        assert list(question.evidence) == sorted(question.evidence)


def test_multikey_questions_do_not_follow_the_text(tokenizer):
    orders = [tasks.get("needle_multikey").sample(tokenizer, 900, seed).questions for seed in range(6)]
    assert any([q.evidence for q in asked] != sorted(q.evidence for q in asked) for asked in orders)


def test_multiquery_names_all_keys(tokenizer):
    (question,) = tasks.get("needle_multiquery").sample(tokenizer, 900).questions
    keys = re.search(r"numbers for (.*)\? The special magic number for (.*) is:$", question.text)
    assert keys[1].startswith(keys[2] + ", ")
    assert len(question.answers) == 4
    assert join_keys(["a b", "c d", "e f"]) == "a b, c d and e f"


def test_text_haystack_is_the_novel(tokenizer):
    sample = tasks.get("needle_single").sample(tokenizer, 800, 1)
    ((start, end),) = sample.questions[0].evidence
    hay = tokenizer.decode([*sample.context_ids[1:start], *sample.context_ids[end:]])
    assert hay in "".join(haystack.sentences()) * 2


def test_sentences_do_not_end_after_a_title():
    endings = {sentence.split()[-1] for sentence in haystack.sentences()}
    assert not endings & {"Mr.", "Mrs.", "Dr.", "St."}
    assert not any("CHAPTER" in sentence for sentence in haystack.sentences())
    assert len(haystack.sentences()) > 5000
    assert all(s[0] == " " and s[1] != " " for s in haystack.sentences())


def test_keys_share_no_word_while_the_words_last():
    keys = list(haystack.shuffled_keys(random.Random(5)))
    assert sorted(keys) == sorted(haystack.all_keys())
    first = [key.split() for key in keys[:100]]
    assert len({adjective for adjective, _ in first}) == len({noun for _, noun in first}) == 100


def test_needle_keys_repeat_only_when_all_are_used():
    total = len(haystack.all_keys())
    found = list(itertools.islice(haystack.needles(random.Random(0), "number", {"amber river"}), total))
    keys = [needles_in(needle)[0][0] for needle in found]
    assert len(set(keys[:-1])) == total - 1
    assert "amber river" not in keys
    assert keys[-1] == keys[0]


@pytest.mark.parametrize("options", [{"haystack": "straw"}, {"values_are": "colour"}, {"keys": 0}, {"keys": 65}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        tasks.get("needle_multikey", **options)
