"""Every error that sparing raises on purpose, in one family.

~~~
SparingError
├── InvalidInputError          a value given by the user is outside what is allowed (also a ValueError)
│   └── UnknownNameError       a name that is not registered; suggests the nearest ones
├── InputFileError             a file that cannot be used: missing, empty, binary, malformed
├── OutputError                a result that cannot be written: disk full, locked folder, torn store
├── UnsupportedModelError      the model's structure is not one that the seams understand
├── MethodRefusedError         this method cannot work on this model or in this combination
├── ScoresMismatchError        a measurement of another model, or of another kind of unit, than is needed
├── MissingExtraError          an optional package is needed and not installed
├── WorkerLostError            a task whose worker process was lost again and again
└── CacheStateError            an operation that the cache's present state does not allow
~~~

Each message says what happened, what was given, what is allowed and what to do. The command line turns any
of them into one line on standard error and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class SparingError(Exception):
    """Base of all errors raised on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors come back from worker processes. By default Python would call the class with the whole message.
        return _remade, (type(self), self.args, self.__dict__)


class InvalidInputError(SparingError, ValueError):
    """A value is outside what is allowed.

    Args:
        what: what was being set, e.g. "keep".
        got: the value that was given.
        allowed: what is allowed, in words.
        fix: what to do about it; may be empty.
    """

    def __init__(self, what: str, got: object, allowed: str, fix: str = "") -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        super().__init__(_sentence(f"{what}: got {got!r}, allowed is {allowed}", fix))


class UnknownNameError(InvalidInputError):
    """A name that nothing is registered under; the nearest registered names are suggested."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.4)
        fix = f"did you mean {' or '.join(near)}?" if near else ""
        super().__init__(f"unknown {kind}", name, "one of " + ", ".join(self.known), fix)


class InputFileError(SparingError):
    """A file given by the user cannot be used."""

    def __init__(self, path: str | Path, problem: str, fix: str = "") -> None:
        self.path, self.problem, self.fix = Path(path), problem, fix
        super().__init__(_sentence(f"{path}: {problem}", fix))


class OutputError(SparingError):
    """A result could not be written; what was written before is intact."""

    def __init__(self, path: str | Path, problem: str, fix: str = "") -> None:
        self.path, self.problem, self.fix = Path(path), problem, fix
        super().__init__(_sentence(f"{path}: {problem}", fix))


class UnsupportedModelError(SparingError):
    """The model has no seam that sparing can work through."""

    def __init__(self, model: str, problem: str, fix: str = "") -> None:
        self.model, self.problem, self.fix = model, problem, fix
        super().__init__(_sentence(f"{model}: {problem}", fix))


class MethodRefusedError(SparingError):
    """A method cannot work on this model or together with these settings."""

    def __init__(self, method: str, problem: str, fix: str = "") -> None:
        self.method, self.problem, self.fix = method, problem, fix
        super().__init__(_sentence(f"{method}: {problem}", fix))


class ScoresMismatchError(SparingError):
    """Scores do not fit: measured on a model of another shape, or over another kind of unit."""

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem, self.fix = problem, fix
        super().__init__(_sentence(problem, fix))


class MissingExtraError(SparingError):
    """Something optional was asked for and is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        self.what, self.extra = what, extra
        self.fix = f'pip install "sparing[{extra}]"'
        super().__init__(_sentence(f"{what} is not installed", self.fix))


class WorkerLostError(SparingError):
    """A task could not be done because its worker was lost every time; finished tasks are kept."""

    def __init__(self, task: str, tries: int) -> None:
        self.task, self.tries = task, tries
        self.fix = "look at the cluster's logs (out of memory?), or leave that item out"
        super().__init__(_sentence(f"the worker of {task} was lost {tries} times", self.fix))


class CacheStateError(SparingError):
    """The cache cannot do this in its present state."""

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem, self.fix = problem, fix
        super().__init__(_sentence(problem, fix))


def require(holds: bool, what: str, got: object, allowed: str, fix: str = "") -> None:
    """Raise `InvalidInputError` unless `holds`; write conditions so that nan fails them."""
    if not holds:
        raise InvalidInputError(what, got, allowed, fix)


def _remade(kind: type[SparingError], args: tuple[Any, ...], fields: dict[str, Any]) -> SparingError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


def _sentence(text: str, fix: str) -> str:
    return f"{text}; {fix}" if fix else text
