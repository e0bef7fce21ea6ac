"""Metrics of the user's own: Python functions, from files and from Python."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from sparing.errors import InputFileError, InvalidInputError
from sparing.tasks import load_user_task

from .letters import Letters

ROW = '{"context": "Ada came.", "question": "Who?", "answers": ["Ada", "Grace"]}\n'
JUDGE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Parts:
    said: str

def judge(output: str, answers: list[str]) -> float:
    said = Parts(output.strip()).said
    assert isinstance(answers, list)
    return 1 / len(said) if said else 0
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Return a function that writes scoring.py beside a task, and makes the task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text(ROW)

    def made(source, metric="scoring.py::judge", **options):
        (tmp_path / "scoring.py").write_text(source)
        return load_user_task("mine.jsonl", metric=metric, **options)

    return made


def question_of(task):
    return task.sample(Letters()).questions[0]


def test_a_function_in_a_file_judges(files):
    task = files(JUDGE)
    question = question_of(task)
    assert task.score(question, " Ada") == pytest.approx(1 / 3)
    assert task.score(question, "") == 0
    assert task.metric == "scoring.py::judge"
    assert question.max_new_tokens >= 64
    assert not question.one_line


def test_a_python_function_judges(files):
    def both(output, answers):
        return all(answer in output for answer in answers)

    task = files(JUDGE, both)
    assert task.score(question_of(task), "Ada, Grace") == 1.0
    assert task.score(question_of(task), "Ada") == 0.0
    assert task.metric == "both"


def test_the_answer_of_the_full_cache_is_given_to_a_function(files, tmp_path):
    task = files(JUDGE)
    (tmp_path / "mine.jsonl").write_text(ROW.replace('["Ada", "Grace"]', "null"))
    task = load_user_task("mine.jsonl", metric=lambda output, answers: output in answers)
    assert question_of(task).reference == "full"
    assert task.score(replace(question_of(task), answers=("Eve",)), "Eve") == 1.0


def test_rows_with_a_metric_of_their_own_are_not_the_functions(files, tmp_path):
    task = files(JUDGE)
    (tmp_path / "mine.jsonl").write_text(ROW + ROW.replace('"question"', '"metric": "exact", "question"'))
    task = load_user_task("mine.jsonl", metric="scoring.py::judge")
    mine, exact = task.sample(Letters()).questions
    assert task.score(mine, "Ada") == pytest.approx(1 / 3)
    assert task.score(exact, "Ada") == 1.0
    assert task.metric == "scoring.py::judge, exact"


def test_the_label_follows_the_source(files, tmp_path):
    first = files(JUDGE).label
    assert files(JUDGE).label == first
    assert files(JUDGE.replace("1 /", "0.5 /")).label != first
    two = JUDGE + "\ndef other(output, answers):\n    return 1\n"
    assert files(two).label != files(two, "scoring.py::other").label
    assert load_user_task(tmp_path / "mine.jsonl").label != first


def test_the_label_follows_what_a_function_captures(files):
    def longer_than(number):
        return lambda output, answers: len(output) > number

    assert (
        files(JUDGE, longer_than(3)).label == files(JUDGE, longer_than(3)).label != files(JUDGE, longer_than(4)).label
    )


def test_a_task_can_be_sent_where_the_file_is_not(files, tmp_path):
    task = files(JUDGE)
    sent = tmp_path / "task.pickle"
    sent.write_bytes(pickle.dumps(task))
    (tmp_path / "scoring.py").unlink()
    code = f"""
import pickle
task = pickle.load(open({str(sent)!r}, "rb"))
from sparing.tasks.base import Question
print(task.score(Question("", (), ("Ada",), 1), "Ada"), task.label)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.split() == [repr(1 / 3), task.label], done.stderr


def test_a_function_of_a_notebook_can_be_sent_by_cloudpickle(files):
    cloudpickle = pytest.importorskip("cloudpickle", reason="comes with Ray")
    least = 3
    task = files(JUDGE, lambda output, answers: len(output) > least)
    there = pickle.loads(cloudpickle.dumps(task))
    assert there.score(question_of(there), "1234") == 1.0
    assert there.label == task.label


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def judge(output, answers):\n    return [][1]\n", r"scoring.py: line 2: judge\(\) raised IndexError: list"),
        ("def judge(output, answers):\n    return help_me()\n\ndef help_me():\n    raise KeyError", "line 5: judge"),
        (
            "def judge(output, answers):\n    return 1.5\n",
            r"line 1: judge\(\) returned 1.5; return a number from 0 to 1",
        ),
        ("def judge(output, answers):\n    return -1e-9\n", "returned -1e-09"),
        ("def judge(output, answers):\n    return float('nan')\n", "returned nan"),
        ("def judge(output, answers):\n    pass\n", "returned None"),
        ("def judge(output, answers):\n    return '1'\n", "returned '1'"),
        ("def judge(output, answers):\n    yield 1\n", "returned <generator"),
    ],
)
def test_what_goes_wrong_while_judging_is_said(files, source, problem):
    task = files(source)
    with pytest.raises(InputFileError, match=problem) as refused:
        task.score(question_of(task), "Ada")
    assert "\n" not in str(refused.value)
    assert str(refused.value).count("scoring.py") == 1


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def judge(output, answers)\n    return 1\n", r"line 1: cannot be run \(SyntaxError"),
        ("x = 1\ny = x / 0\n", r"line 2: cannot be run \(ZeroDivisionError: division by zero\)"),
        ("import nothing_like_this\n", r"cannot be run \(ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", r"line 2: cannot be run \(SystemExit: 3\)"),
        ("def jugde(output, answers):\n    return 1\n", r"has no function 'judge'; it has jugde"),
        ("judge = 3\n", "has no function 'judge'; define judge"),
        ("def judge(output):\n    return 1\n", r"got 'scoring.py::judge\(output\)', allowed is a function judge"),
        ("def judge(output, answers, third):\n    return 1\n", "third"),
    ],
)
def test_bad_functions_are_refused_before_anything_runs(files, source, problem):
    before = set(sys.modules)
    with pytest.raises((InputFileError, InvalidInputError), match=problem) as refused:
        files(source)
    assert "\n" not in str(refused.value)
    if "cannot be run" in problem:
        assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("none.py::judge", "none.py: cannot be read"),
        ("scoring.py::", "has no function ''"),
        (len, "allowed is a function judge"),
        (functools.partial(max, 1), "allowed is a function judge"),
        (3, "allowed is a function judge"),
        (eval("lambda output, answers: 1"), "whose source can be read"),
        (lambda output: 1, "allowed is a function judge"),
    ],
)
def test_what_is_no_function_is_refused(files, metric, problem):
    with pytest.raises((InputFileError, InvalidInputError), match=problem):
        files(JUDGE, metric)
