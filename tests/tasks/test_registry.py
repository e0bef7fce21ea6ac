"""Tasks by name."""

from __future__ import annotations

import sys
import types
from dataclasses import FrozenInstanceError

import pytest

from sparing import tasks
from sparing.errors import InputFileError, InvalidInputError, UnknownNameError
from sparing.tasks.metrics import METRICS
from sparing.tasks.registry import task

NAMES = {
    "common_words",
    "copy",
    "frequent_words",
    "kv_retrieval",
    "needle_multikey",
    "needle_multiquery",
    "needle_multivalue",
    "needle_single",
    "perplexity",
    "variable_tracking",
}


def test_names():
    assert set(tasks.names()) >= NAMES
    assert list(tasks.names()) == sorted(tasks.names())


def test_every_task_says_what_it_is():
    for name in tasks.names():
        made = tasks.get(name)
        assert made.name == made.label == name
        assert made.kind in ("generation", "likelihood")
        assert made.num_samples is None
        assert made.metric in METRICS or (made.kind, made.metric) == ("likelihood", "1/perplexity")
        assert 10 < len(made.description) < 80
        assert "\n" not in made.description
        assert made.questions_per_context >= 1


def test_options_and_labels():
    made = tasks.get("needle_multikey", haystack="noise", keys=8)
    assert made.label == "needle_multikey:haystack=noise:keys=8"
    assert tasks.get(made.label) == made
    assert tasks.get(made.label).questions_per_context == 8
    assert tasks.get("needle_multikey:keys=8", haystack="noise") == made
    assert tasks.get("needle_multikey:keys=4").label == "needle_multikey"
    with pytest.raises(FrozenInstanceError):
        made.keys = 2


def test_unknown_name_suggests():
    with pytest.raises(UnknownNameError, match="needle_single"):
        tasks.get("needle_singel")
    with pytest.raises(UnknownNameError, match="did you mean haystack"):
        tasks.get("needle_single", haystak="noise")


@pytest.mark.parametrize("label", ["copy:4", "copy:questions=many", "copy:questions=0", "copy:", "copy:name=x"])
def test_bad_options_are_refused(label):
    with pytest.raises(InvalidInputError):
        tasks.get(label)


def test_a_name_is_given_once():
    with pytest.raises(AssertionError, match="copy"):
        task("copy")(type(tasks.get("copy")))


def test_what_the_command_line_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Ada came.\nQ: Who?\nA: Ada\n")
    (tmp_path / "scoring.py").write_text("def judge(output, answers):\n    return 1\n")
    (tmp_path / "a:b=c.txt").write_text("Ada came.\nQ: Who?\nA: Ada\n")
    assert tasks.named("needle_single:haystack=noise") == tasks.get("needle_single", haystack="noise")
    assert tasks.named("notes.txt") == tasks.load_user_task("notes.txt")
    assert tasks.named(f"{tmp_path}/notes.txt:metric=f1") == tasks.load_user_task("notes.txt", metric="word_f1")
    assert tasks.named("notes.txt:metric=scoring.py::judge").metric == "scoring.py::judge"
    assert (
        tasks.named("notes.txt:metric=./scoring.py::judge").label
        == tasks.named("notes.txt:metric=scoring.py::judge").label
    )
    assert tasks.named("a:b=c.txt").stem == "a:b=c"
    assert tasks.named("notes.txt", chat=True).chat


@pytest.mark.parametrize(
    ("text", "kind", "problem"),
    [
        ("notes.txt:f1", InvalidInputError, "option=value"),
        ("notes.txt:metrics=f1", UnknownNameError, "did you mean metric"),
        ("notes.txt:metric=bleu", UnknownNameError, "unknown metric"),
        ("notes.txt:metric=none.py::judge", InputFileError, "none.py: cannot be read"),
        ("none.txt:metric=f1", InputFileError, "none.txt: cannot be read"),
        ("needle_singel", UnknownNameError, "needle_single"),
        ("notes", UnknownNameError, "unknown task"),
    ],
)
def test_what_names_nothing_is_refused(tmp_path, monkeypatch, text, kind, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Ada came.\nQ: Who?\nA: Ada\n")
    with pytest.raises(kind, match=problem):
        tasks.named(text)


def test_generated_tasks_are_not_asked_as_chats():
    for text in ("needle_single", "lm_eval:niah_single_1"):
        with pytest.raises(InvalidInputError, match="a file of your own"):
            tasks.named(text, chat=True)


def test_tasks_of_the_harness_are_made_by_their_own_module(monkeypatch):
    asked = []
    module = types.ModuleType("sparing.lm_eval.tasks")
    module.load = lambda name: asked.append(name) or tasks.get("copy")
    monkeypatch.setitem(sys.modules, "sparing.lm_eval.tasks", module)
    assert tasks.named("lm_eval:niah_single_1:length=1024").name == "copy"
    assert asked == ["niah_single_1:length=1024"]
