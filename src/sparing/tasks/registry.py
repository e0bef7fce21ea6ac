"""The one place where tasks are registered; commands, docs and tests read it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import sparing.tasks
from sparing.errors import InvalidInputError, UnknownNameError
from sparing.tasks.base import Task
from sparing.tasks.user_files import load_user_task

# In front of the name of a task of EleutherAI's lm-evaluation-harness.
HARNESS = "lm_eval:"

_TASKS: dict[str, type[Task]] = {}
T = TypeVar("T", bound=type[Task])


def task(name: str) -> Callable[[T], T]:
    """Register the class below under a name; the class's `name` is set to it."""

    def register(cls: T) -> T:
        if name in _TASKS:
            raise AssertionError(f"two tasks are called {name}")
        cls.name = name
        _TASKS[name] = cls
        return cls

    return register


def names() -> tuple[str, ...]:
    """Return the names of all tasks, in alphabetical order."""
    _load()
    return tuple(sorted(_TASKS))


def get(name: str, **options: Any) -> Task:
    """Return the task of that name: `get("needle_single", haystack="noise")`.

    Options may also stand in the name, as in a task's label: `get("needle_single:haystack=noise")`.

    Raises:
        UnknownNameError: no such task, with the nearest names.
        InvalidInputError: the task has no such option, or the option does not take that value.
    """
    name, *given = name.split(":")
    if name not in names():
        raise UnknownNameError("task", name, names())
    cls: Any = _TASKS[name]
    defaults = {field.name: field.default for field in fields(cls)}
    options = dict(_option(name, text, defaults) for text in given) | options
    for option in options:
        if option not in defaults:
            raise UnknownNameError(f"option of the task {name}", option, defaults)
    made: Task = cls(**options)
    return made


def named(text: str, chat: bool = False) -> Task:
    """Return the task that a text on the command line names.

    Three forms, each with options: a registered task (`needle_single:haystack=noise`), a file of the user's own
    (`notes.txt`, `mine.jsonl:metric=rouge_l`, `mine.jsonl:metric=scoring.py::judge`), and with `lm_eval:` in front a
    task of the lm-evaluation-harness. A text with a dot or a slash before its options is a file.

    Args:
        chat: ask in the tokenizer's chat template, see `load_user_task`; files only.

    Raises:
        UnknownNameError: no such task, metric or option. InputFileError: see `load_user_task`.
        InvalidInputError: options that are not `option=value` or have no such value, or a chat with another task than
            a file. MissingExtraError: the harness is not installed.
    """
    path, *options = [text] if Path(text).is_file() else re.split(r"(?<!:):(?!:)", text)
    if not text.startswith(HARNESS) and (Path(path).suffix or "/" in path):
        given = dict(_option(path, option, {}) for option in options)
        for option in given:
            if option != "metric":
                raise UnknownNameError("option of a file", option, ["metric"])
        return load_user_task(path, **given, chat=chat)
    if chat:
        fix = "leave --chat out: its questions end in the first words of their answers"
        raise InvalidInputError("task of a chat", text, "a file of your own", fix)
    if text.startswith(HARNESS):
        from sparing.lm_eval.tasks import load

        return load(text.removeprefix(HARNESS))
    return get(text)


def _option(name: str, text: str, defaults: dict[str, Any]) -> tuple[str, Any]:
    option, equals, value = text.partition("=")
    if not equals:
        raise InvalidInputError(f"option of the task {name}", text, "option=value")
    if isinstance(defaults.get(option), int):
        try:
            return option, int(value)
        except ValueError:
            raise InvalidInputError(option, value, "a whole number") from None
    return option, value


@cache
def _load() -> None:
    """Import every module of the package once, so that each task registers itself."""
    for module in pkgutil.iter_modules(sparing.tasks.__path__):
        importlib.import_module(f"sparing.tasks.{module.name}")
