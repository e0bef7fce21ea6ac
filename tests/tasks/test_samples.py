"""Promises that every registered task keeps: exact length, answers in the context, the same sample again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from sparing import tasks
from sparing.errors import InvalidInputError
from sparing.tasks import formats

from .conftest import FAMILIES, LOSSLESS
from .letters import VARIANTS, Letters, fingerprint, needles_in

GENERATION = tuple(name for name in VARIANTS if tasks.get(name).kind == "generation")
WITH_EVIDENCE = tuple(name for name in GENERATION if not name.endswith("_words"))
LENGTHS = (1531, 2048, 4099)


def answer(name, context, question):
    """Answer a question from the text of its context alone, with other code than the task's."""
    family = name.partition(":")[0]
    if family.startswith("needle"):
        return " ".join(value for key, value in needles_in(context) if re.search(rf"\b{key}\b", question))
    if family == "variable_tracking":
        holds = {}
        for variable, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z0-9]{5})\.", context):
            holds[variable] = holds.get(value, value)
        return ", ".join(v for v, value in holds.items() if value == re.search(r"\d+", question)[0])
    if family == "kv_retrieval":
        asked = re.match(r'\nWhat is the value of "(.+?)"', question)[1]
        return json.loads(context[context.index("{") :])[asked] + '"}, and so on'
    if family == "common_words":
        return " ".join(word for word, _ in Counter(re.findall(r"\d+\. ([a-z]+)", context)).most_common(10))
    if family == "frequent_words":
        return " ".join(word for word, _ in Counter(re.findall(r"\b[a-z]{6}\b", context)).most_common(3))
    given = question.removeprefix(formats.COPY_QUESTION.format(start=""))
    before, found, after = context.partition(given)
    assert found
    assert given not in before + after
    return after


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_length_is_exact(tokenizers, family, name):
    tokenizer, task = tokenizers[family], tasks.get(name)
    for length in LENGTHS:
        for seed, index in ((0, 0), (0, 1), (5, 2)):
            sample = task.sample(tokenizer, length, seed, index)
            longest = max(len(q.token_ids) + q.max_new_tokens for q in sample.questions)
            assert len(sample.context_ids) + longest == length == sample.length
            assert len(sample.questions) == task.questions_per_context
            assert all(isinstance(token, int) for token in sample.context_ids)


@pytest.mark.parametrize("name", VARIANTS)
def test_length_just_enough_works_and_one_less_is_refused(tokenizers, name):
    task = tasks.get(name)
    for family in FAMILIES:
        with pytest.raises(InvalidInputError, match=r"at least \d+ tokens") as refused:
            task.sample(tokenizers[family], 8, 3, 1)
        least = int(re.search(r"at least (\d+) tokens", str(refused.value))[1])
        assert task.sample(tokenizers[family], least, 3, 1).length == least
        with pytest.raises(InvalidInputError):
            task.sample(tokenizers[family], least - 1, 3, 1)


@pytest.mark.parametrize("length", [0, -5, None, 2048.0, True])
def test_length_that_is_no_length_is_refused(tokenizers, length):
    with pytest.raises(InvalidInputError, match="length"):
        tasks.get("copy").sample(tokenizers["bytes"], length)


@pytest.mark.parametrize("family", LOSSLESS)
@pytest.mark.parametrize("name", GENERATION)
def test_answers_are_in_the_context_and_an_empty_output_scores_nothing(tokenizers, family, name):
    tokenizer, task = tokenizers[family], tasks.get(name)
    for length, seed in ((1531, 1), (2900, 2)):
        sample = task.sample(tokenizer, length, seed)
        context = tokenizer.decode(sample.context_ids, skip_special_tokens=True)
        for question in sample.questions:
            assert task.score(question, answer(name, context, question.text)) == 1.0
            assert task.score(question, "") == 0.0
            assert task.score(question, "I do not know.") == 0.0
            assert len(tokenizer.encode(" ".join(question.answers), add_special_tokens=False)) <= (
                question.max_new_tokens
            )


@pytest.mark.parametrize("name", WITH_EVIDENCE)
def test_without_the_evidence_there_is_no_answer(tokenizers, name):
    tokenizer, task = tokenizers["byte_level_bpe"], tasks.get(name)
    sample = task.sample(tokenizer, 2048, 1)
    for question in sample.questions:
        kept = list(sample.context_ids)
        for start, end in sorted(question.evidence, reverse=True):
            del kept[start:end]
        left = tokenizer.decode(kept)
        held = tokenizer.decode(sample.context_ids)
        for expected in question.answers:
            assert expected in held
            assert expected not in left


@pytest.mark.parametrize("name", GENERATION)
def test_question_ids_are_the_question(tokenizers, name):
    for family in LOSSLESS:
        for question in tasks.get(name).sample(tokenizers[family], 2048).questions:
            assert tokenizers[family].decode(question.token_ids) == question.text


def test_questions_continue_the_text_without_a_second_space(tokenizers):
    sample = tasks.get("needle_single").sample(tokenizers["metaspace_bpe"], 1024)
    both = [*sample.context_ids, *sample.questions[0].token_ids]
    assert re.search(r"\S\nWhat is", tokenizers["metaspace_bpe"].decode(both))
    assert "  " not in tokenizers["metaspace_bpe"].decode(both)


def test_special_tokens_stand_in_front_only(tokenizers):
    for name in VARIANTS:
        ids = tasks.get(name).sample(tokenizers["bytes"], 2048).context_ids
        assert ids[0] == 0
        assert not {0, 1} & set(ids[1:])
    assert tasks.get("copy").sample(tokenizers["words"], 512).context_ids[0] != 0


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_same_sample_in_every_process(hash_seed):
    code = f"from {__package__}.letters import fingerprint; print(fingerprint())"
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint()


@pytest.mark.parametrize("name", VARIANTS)
def test_seed_and_index_change_the_sample(name):
    task = tasks.get(name)
    samples = [task.sample(Letters(), 2048, seed, index) for seed, index in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(sample.context_ids) for sample in samples}) == 3
    assert len({sample.questions for sample in samples}) == 3
    assert len({sample.name for sample in samples}) == 3


@pytest.mark.parametrize("name", [n for n in VARIANTS if not n.startswith("copy")])
def test_a_longer_sample_asks_the_same(name):
    task = tasks.get(name)
    short, long = task.sample(Letters(), 2048, 4), task.sample(Letters(), 5000, 4)
    assert [q.token_ids for q in short.questions] == [q.token_ids for q in long.questions]
    assert [q.target_ids for q in short.questions] == [q.target_ids for q in long.questions]
    assert [q.answers for q in short.questions] == [q.answers for q in long.questions]


def test_import_needs_no_torch():
    code = "import sys; from sparing import tasks; tasks.names(); print('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
