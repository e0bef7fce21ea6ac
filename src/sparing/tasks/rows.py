"""Reading the rows of a user's own file: contexts, questions and answers, with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.errors import InputFileError, InvalidInputError, UnknownNameError
from sparing.tasks.encoding import is_encodable
from sparing.tasks.metrics import metric_name, pattern


@dataclass(frozen=True)
class Asked:
    """A question of a file.

    Attributes:
        answers: None when the full cache's answer is the reference.
        metric: what judges the output, one of `metrics.METRICS`; "" for the file's own function.
        max_new_tokens: how many tokens the answer may take; None if the row does not say.
    """

    text: str
    answers: tuple[str, ...] | None
    metric: str
    max_new_tokens: int | None = None


def read_text(path: Path, content: str) -> str:
    """Return the text of a file that is neither empty nor binary; `content` says what it should hold.

    Raises:
        InputFileError: the file cannot be read, is binary, not UTF-8, or holds nothing but white space.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputFileError(path, problem, "give the path of a text file") from None
    if b"\0" in raw:
        raise InputFileError(path, "is a binary file", "give plain text or JSON lines, in UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputFileError(path, f"line {line} is not UTF-8", "save the file as UTF-8") from None
    if not text.strip():
        raise InputFileError(path, "is empty", content)
    return text


def json_objects(path: Path, text: str, fix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) for each line of JSON lines that is not empty.

    Args:
        path: named in errors. fix: what to do about a line that is none.

    Raises:
        InputFileError: a line is no JSON object; the message gives the line.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
            why = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise InputFileError(path, f"line {number} is not JSON ({why})", fix) from None
        if not isinstance(row, dict):
            raise InputFileError(path, f"line {number} is not a JSON object", fix)
        yield number, row


def text_rows(path: Path, text: str, metric: str) -> Iterator[tuple[str, Asked]]:
    """Yield (context, question) for each question of a plain text; `user_files` describes its form.

    Args:
        path: named in errors.
        metric: of questions that name none; "" for a function.

    Raises:
        InputFileError: the text is not of that form; the message gives the line.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith("Q:")), None)
    if first is None:
        raise InputFileError(path, "has no question", 'end it with lines that start with "Q:"')
    context = "\n".join(lines[:first]).strip("\n")
    if not context.strip():
        raise InputFileError(path, "has no text before the first question", "put the context first")
    found: list[tuple[int, str, list[str]]] = []
    for number, line in enumerate(lines[first:], first + 1):
        mark, rest = line[:2], line[2:].strip()
        if not line.strip():
            continue
        if mark not in ("Q:", "A:"):
            fix = 'write only "Q:" and "A:" lines after the first "Q:", or JSON lines if the context has such'
            raise InputFileError(path, f"line {number} is neither a question nor an answer", fix)
        if not rest:
            raise InputFileError(path, f"line {number} has nothing after {mark}")
        if mark == "Q:":
            found.append((number, rest, []))
        else:
            found[-1][2].append(rest)
    for number, question, answers in found:
        given = tuple(answers) or None
        yield context, Asked(question, given, _judged_by(path, number, metric, given))


def json_rows(path: Path, text: str, metric: str) -> Iterator[tuple[str, Asked]]:
    """Yield (context, question) for each question of JSON lines; arguments and errors as of `text_rows`."""
    for number, row in json_objects(path, text, 'write {"context": ..., "question": ..., "answers": ...} on each line'):
        missing = [field for field in ("context", "question", "answers") if field not in row]
        if missing:
            fix = '"answers": null makes the full cache\'s answer the reference' if "answers" in missing else ""
            raise InputFileError(path, f"line {number} lacks {' and '.join(missing)}", fix)
        context = _string(path, number, "context", row["context"])
        limit, own = _limit(path, number, row.get("max_new_tokens")), _metric(path, number, row.get("metric"), metric)
        for question, answers in _pairs(path, number, row["question"], row["answers"]):
            asked, given = _string(path, number, "question", question), _answers(path, number, answers)
            yield context, Asked(asked, given, _judged_by(path, number, own, given), limit)


def _pairs(path: Path, number: int, question: Any, answers: Any) -> list[tuple[Any, Any]]:
    """Return questions with their answers, from a row with one question or with a list of them."""
    if not isinstance(question, list):
        return [(question, answers)]
    if not question:
        raise InputFileError(path, f"line {number} has no question")
    if answers is None:
        return [(each, None) for each in question]
    if not isinstance(answers, list) or len(answers) != len(question):
        problem = f"line {number} has {len(question)} questions, and not as many answers"
        raise InputFileError(path, problem, "give a list with the answer or answers of each question")
    return list(zip(question, answers, strict=True))


def _answers(path: Path, number: int, answers: Any) -> tuple[str, ...] | None:
    if answers is None:
        return None
    given = answers if isinstance(answers, list) else [answers]
    if not given:
        raise InputFileError(path, f"line {number} has no answer", 'write "answers": null if there is none')
    return tuple(_string(path, number, "answers", answer) for answer in given)


def _metric(path: Path, number: int, own: Any, default: str) -> str:
    """The metric that a row names, or else the file's."""
    if own is None:
        return default
    name = _string(path, number, "metric", own)
    try:
        return metric_name(name)
    except UnknownNameError as error:
        problem = f"line {number}: unknown metric {name!r}, allowed is {error.allowed}"
        raise InputFileError(path, problem, error.fix or "name a function of your own for the whole file") from None


def _judged_by(path: Path, number: int, metric: str, answers: Sequence[str] | None) -> str:
    """The metric of a question; where it is to be held against the full cache's answer, one that fits free wording."""
    if metric != "regex":
        return metric if answers is not None or metric in ("", "rouge_l") else "word_f1"
    if answers is None:
        raise InputFileError(path, f"line {number} has no answer", "regex needs a pattern to look for")
    try:
        for answer in answers:
            pattern(answer)
    except InvalidInputError as error:
        problem = f"line {number}: {error.got!r} is not {error.allowed}"
        raise InputFileError(path, problem, "write a pattern as for Python's re.search") from None
    return metric


def _limit(path: Path, number: int, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        problem = f"line {number}: max_new_tokens is {value!r:.40}"
        raise InputFileError(path, problem, "write a whole number of tokens, 1 or more")
    limit: int | None = value
    return limit


def _string(path: Path, number: int, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        problem = f"line {number}: {field} is {value!r:.40}, not a text"
        raise InputFileError(path, problem, "write it as a string that is not empty")
    if not is_encodable(value):
        raise InputFileError(path, f"line {number}: {field} holds half a character (a surrogate)")
    return value
