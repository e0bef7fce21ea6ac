"""Files of the user's own, good ones and bad ones."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sparing.errors import InputFileError, InvalidInputError
from sparing.tasks import load_user_task

from .letters import Letters


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def row(**fields):
    return json.dumps({"context": "Ada came.", "question": "Who?", "answers": "Ada"} | fields)


def test_text_file(write):
    task = load_user_task(
        write("notes.txt", "\ufeffAda came.\r\n\r\nOn Monday.\r\n\r\nQ: Who?\r\nA: Ada\r\n\r\nQ: When?\r\n")
    )
    assert task.num_samples == 1
    assert task.questions_per_context == 2
    sample = task.sample(Letters())
    assert sample.context_ids[0] == 256
    assert Letters().decode(sample.context_ids) == "Ada came.\n\nOn Monday."
    who, when = sample.questions
    assert who.text == "\nQ: Who?\nA:" == Letters().decode(who.token_ids)
    assert who.answers == ("Ada",)
    assert who.reference == "answers"
    assert when.reference == "full"
    assert when.answers == ()
    assert who.max_new_tokens > len(" Ada")
    assert when.max_new_tokens == 64
    assert sample.length == len(sample.context_ids) + max(q.num_tokens for q in sample.questions)
    assert task.label.startswith("user:notes:")
    assert task.label in sample.name


def test_several_answers_are_all_wanted_unless_said_otherwise(write):
    path = write("two.txt", "Ada and Grace came.\nQ: Who?\nA: Ada\nA: Grace\n")
    task, either = load_user_task(path), load_user_task(path, metric="contains_any")
    question = task.sample(Letters()).questions[0]
    assert question.answers == ("Ada", "Grace")
    assert task.score(question, " Ada.") == 0.5
    assert either.score(either.sample(Letters()).questions[0], " Ada.") == 1.0


def test_reference_of_the_full_cache_is_judged_by_its_words(write):
    task = load_user_task(write("free.txt", "Ada came.\nQ: What happened?\n"))
    question = replace(task.sample(Letters()).questions[0], answers=("Ada came home",))
    assert task.score(question, "home Ada came") == 1.0
    assert task.score(question, "Ada") == 0.5


def test_json_lines_are_grouped_by_context(write):
    lines = [
        row(),
        row(context="Grace left.", answers=["Grace", "left"]),
        "",
        row(question=["When?", "Where?"], answers=["Monday", ["at", "home"]]),
        row(question="Why?", answers=None),
    ]
    task = load_user_task(write("mine.jsonl", "\n".join(lines)))
    assert task.num_samples == 2
    assert task.questions_per_context == 4
    first, second = (task.sample(Letters(), index=i) for i in range(2))
    assert [q.answers for q in first.questions] == [("Ada",), ("Monday",), ("at", "home"), ()]
    assert [q.reference for q in first.questions] == ["answers"] * 3 + ["full"]
    assert [q.answers for q in second.questions] == [("Grace", "left")]
    assert Letters().decode(second.context_ids) == "Grace left."


def test_question_format_is_the_users(write):
    path = write("mine.jsonl", row(question="{who}?"))
    question = load_user_task(path, question_format="\n{q} {question} =>").sample(Letters()).questions[0]
    assert question.text == "\n{q} {who}? =>"
    with pytest.raises(InvalidInputError, match="question_format"):
        load_user_task(path, question_format="Q:")
    with pytest.raises(InvalidInputError, match="metric"):
        load_user_task(path, metric="rouge")


def test_line_separators_inside_a_json_text_are_text(write):
    path = write(
        "odd.jsonl",
        json.dumps({"context": "a\u2028b\x85c", "question": "q", "answers": "b"}, ensure_ascii=False),
    )
    assert Letters().decode(load_user_task(path).sample(Letters()).context_ids) == "a\u2028b\x85c"


def test_label_follows_the_contents(write):
    labels = {load_user_task(write("a.jsonl", row(answers=answer))).label for answer in ("Ada", "Ada", "Eve")}
    assert len(labels) == 2
    path = write("a.jsonl", row())
    assert load_user_task(path).label != load_user_task(path, metric="exact").label


def test_own_length_only(write):
    task = load_user_task(write("a.jsonl", row()))
    with pytest.raises(InvalidInputError, match="own length"):
        task.sample(Letters(), 100)
    with pytest.raises(InvalidInputError, match="index"):
        task.sample(Letters(), index=1)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n", "empty"),
        ("a.jsonl", b"", "empty"),
        ("a.txt", b"text\0\nQ: x?\n", "binary"),
        ("a.txt", b"one\ntwo\nthr\xe9\nQ: x?\n", "line 3 is not UTF-8"),
        ("a.txt", "A text without an end.", "no question"),
        ("a.txt", "Q: Who?\nA: Ada", "no text before"),
        ("a.txt", "text\nQ: Who?\nand who else?\n", "line 3 is neither"),
        ("a.txt", "text\nQ: Who?\nA:\n", "line 3 has nothing after A:"),
        ("a.txt", "text\nQ:  \n", "line 2 has nothing after Q:"),
        ("a.jsonl", row() + "\n{oops}", "line 2 is not JSON"),
        ("a.jsonl", row() + "\n\n" + "[" * 100_000, "line 3 is not JSON"),
        ("a.jsonl", "9" * 5000, "line 1 is not JSON"),
        ("a.jsonl", "[1, 2]", "line 1 is not a JSON object"),
        ("a.jsonl", '{"context": "x"}', "line 1 lacks question and answers"),
        ("a.jsonl", '{"question": "x", "answers": "y"}', "line 1 lacks context"),
        ("a.jsonl", row(context=""), "line 1: context"),
        ("a.jsonl", row(context=7), "line 1: context"),
        ("a.jsonl", row(question=None), "line 1: question"),
        ("a.jsonl", row(question=[]), "line 1 has no question"),
        ("a.jsonl", row(question=["a", "b"], answers=["c"]), "line 1 has 2 questions"),
        ("a.jsonl", row(question=["a", "b"], answers="c"), "line 1 has 2 questions"),
        ("a.jsonl", row(answers=[]), "line 1 has no answer"),
        ("a.jsonl", row(answers=["a", 3]), "line 1: answers"),
        ("a.jsonl", row(context="\ud800"), "surrogate"),
        ("a.jsonl", row() + "\n" + row(metric="rouge"), "line 2: unknown metric 'rouge', allowed is one of"),
        ("a.jsonl", row(metric=3), "line 1: metric is 3"),
        ("a.jsonl", row(metric="scoring.py::judge"), "line 1: unknown metric"),
        ("a.jsonl", row(max_new_tokens=0), "line 1: max_new_tokens is 0"),
        ("a.jsonl", row(max_new_tokens=True), "line 1: max_new_tokens is True"),
        ("a.jsonl", row(max_new_tokens="12"), "line 1: max_new_tokens is '12'"),
        ("a.jsonl", row(metric="regex", answers=["ok", "(a"]), r"line 1: '\(a' is not a regular expression"),
        ("a.jsonl", row() + "\n" + row(metric="regex", answers=None), "line 2 has no answer; regex needs a pattern"),
    ],
)
def test_bad_files_say_what_and_where(write, name, content, problem):
    path = write(name, content)
    with pytest.raises(InputFileError, match=problem) as refused:
        load_user_task(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or not refused.value.__context__


def test_patterns_of_a_whole_file_are_checked(write):
    path = write("a.txt", "text\nQ: Who?\nA: Ada\nQ: When?\nA: [0-9\n")
    with pytest.raises(InputFileError, match=r"line 4: '\[0-9' is not a regular expression"):
        load_user_task(path, metric="regex")
    assert load_user_task(path).num_samples == 1
    with pytest.raises(InputFileError, match="line 2 has no answer"):
        load_user_task(write("b.txt", "text\nQ: Who?\n"), metric="regex")


def test_rows_name_their_own_metric_and_limit(write):
    lines = [
        row(answers="Ada came home", metric="f1"),
        row(answers="Ada came home", metric="rouge_l", max_new_tokens=128),
        row(answers="A.a", metric="regex"),
        row(question=["When?", "Where?"], answers=["on Monday", "at home"], max_new_tokens=3),
        row(answers=None),
        row(answers=None, metric="rouge_l"),
    ]
    task = load_user_task(write("mine.jsonl", "\n".join(lines)))
    questions = task.sample(Letters()).questions
    assert [q.metric for q in questions] == [
        "word_f1", "rouge_l", "regex", "contains", "contains", "word_f1", "rouge_l",
    ]  # fmt: skip
    assert task.metric == "word_f1, rouge_l, regex, contains"
    assert [q.max_new_tokens for q in questions[1:]] == [128, 64, 3, 3, 64, 64]
    assert [q.one_line for q in questions] == [True, False, True, True, True, True, False]
    assert [task.score(q, "home came Ada") for q in questions[:4]] == [1, pytest.approx(1 / 3), 1, 0]
    full = [replace(q, answers=("Ada came home",)) for q in questions[5:]]
    assert [task.score(q, "home came Ada") for q in full] == [1, pytest.approx(1 / 3)]
    plain = load_user_task(write("plain.jsonl", row(answers=None)), metric="contains")
    assert plain.metric == "word_f1"  # what is really judged by


def test_unreadable_paths(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputFileError, match="cannot be read"):
            load_user_task(path)
