"""A metric of the user's own: `judge(output: str, answers: list[str]) -> float`, from 0 to 1.

On the command line it is named `file.py::function`. Its source goes with the task, so that worker processes, also on
machines that lack the file, run the same function.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from sparing.errors import InputFileError, InvalidInputError

Function = Callable[[str, list[str]], float]

_SEPARATOR = "::"
_SHAPE = "judge(output: str, answers: list[str]) -> float"


@dataclass(frozen=True)
class SourceFile:
    """A Python file as it was when it was read. `path`: where, in full. `source`: its text."""

    path: str
    source: str

    def function(self, name: str) -> Function:
        """Return a function of the file, which runs once per process.

        Raises:
            InputFileError: the file does not run, or has no such function.
        """
        functions = {key: value for key, value in vars(_run(self)).items() if inspect.isfunction(value)}
        if name not in functions:
            fix = f"it has {', '.join(functions)}" if functions else f"define {_SHAPE} there"
            raise InputFileError(self.path, f"has no function {name!r}", fix)
        found: Function = functions[name]
        return found


@dataclass(frozen=True)
class Judge:
    """A checked function that can be called as a metric and sent to other processes.

    Attributes:
        name: for people: "scoring.py::judge", or a function's own name.
        digest: changes with the source.
        given: the function itself, or the file that holds it.
    """

    name: str
    digest: str
    given: Function | SourceFile

    def __call__(self, output: str, answers: Sequence[str]) -> float:
        """Return the function's judgement.

        Raises:
            InputFileError: the function raises an error, or returns something else than a number from 0 to 1; the
                message gives file, line and function.
        """
        function: Any = self.function
        name, code = function.__name__, function.__code__
        try:
            value = function(output, list(answers))
        except Exception as error:  # whatever somebody else's code raises
            problem = f"line {_line(error, code.co_filename)}: {name}() raised {_said(error)}"
            raise InputFileError(
                code.co_filename, problem, "return a number for every output, also an empty one"
            ) from error
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:
            problem = f"line {code.co_firstlineno}: {name}() returned {' '.join(repr(value).split()):.60}"
            raise InputFileError(code.co_filename, problem, "return a number from 0 to 1")
        return float(value)

    @property
    def function(self) -> Function:
        """The function itself."""
        if isinstance(self.given, SourceFile):
            return self.given.function(self.name.partition(_SEPARATOR)[2])
        return self.given


def judge_of(metric: Function | str) -> Judge:
    """Return the judge that a Python function makes, or the text `file.py::function`.

    Raises:
        InputFileError: the file cannot be read, does not run, or has no such function.
        InvalidInputError: it is not a function of two arguments, or its source cannot be read.
    """
    if isinstance(metric, str):
        path, _, name = metric.partition(_SEPARATOR)
        file = SourceFile(str(Path(path).absolute()), _read(path))
        judge = Judge(f"{Path(path).name}{_SEPARATOR}{name}", _digest(file.source, name), file)
    elif inspect.isfunction(metric):
        judge = Judge(metric.__name__, _digest(_source(metric), _captured(metric)), metric)
    else:
        raise InvalidInputError("metric", metric, f"a function {_SHAPE}, or a text")
    signature = inspect.signature(judge.function)
    try:
        signature.bind("", [])
    except TypeError:
        raise InvalidInputError("metric", f"{judge.name}{signature}", f"a function {_SHAPE}") from None
    return judge


def names_function(metric: str) -> bool:
    """True for `file.py::function`."""
    return _SEPARATOR in metric


@lru_cache(maxsize=64)
def _run(file: SourceFile) -> ModuleType:
    # Registered like any imported module, under a name that no other has: dataclasses and pickle look there.
    module = ModuleType(f"sparing_judge_{_digest(file.path, file.source)[:16]}")
    module.__file__ = file.path
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.source, file.path, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # whatever somebody else's code raises
        del sys.modules[module.__name__]
        line = error.lineno if isinstance(error, SyntaxError) else _line(error, file.path)
        problem = f"line {line}: cannot be run ({_said(error)})"
        raise InputFileError(file.path, problem, "give a Python file that can be imported on its own") from error
    return module


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise InputFileError(path, f"cannot be read ({error.strerror})", f"give file.py{_SEPARATOR}function") from None
    except UnicodeDecodeError:
        raise InputFileError(path, "is not UTF-8", "give a Python file") from None


def _source(function: Function) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        fix = "define it in a file or a notebook"
        raise InvalidInputError("metric", function, "a function whose source can be read", fix) from None


def _captured(function: Any) -> str:
    """What the function takes from around it, so that two made by one piece of source differ."""
    return repr([cell.cell_contents for cell in function.__closure__ or ()])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _line(error: BaseException, path: str) -> int:
    """The last line of the file that ran; 0 if none did."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 0 for frame in reversed(frames) if frame.filename == path), 0)


def _said(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
