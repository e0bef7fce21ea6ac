"""Tasks from a file of the user's own: contexts, questions about them, and what the answers should hold.

JSON lines (a name that ends in .jsonl, .ndjson or .json), one object a line; rows with the same context are
one sample with several questions:

    {"context": "...", "question": "Who came?", "answers": ["Ada", "Grace"]}
    {"context": "...", "question": ["Who came?", "When?"], "answers": ["Ada", "on Monday"]}
    {"context": "...", "question": "Who came?", "answers": null}

Any other file is plain text: the context, and from the first line that starts with `Q:` on only questions,
each followed by any number of lines with expected answers:

    ... and so the story ends.
    Q: Who came?
    A: Ada
    Q: What is the moral?

Where no answer is given (null, no `A:`), the reference is what the model answers with its full cache
(`Question.reference == "full"`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from sparing.errors import InputFileError, InvalidInputError
from sparing.tasks.base import ANSWER_SLACK, Question, Sample, Task, Tokenizer, check_choice
from sparing.tasks.encoding import Encoder
from sparing.tasks.metrics import METRICS, word_f1

QUESTION = "\nQ: {question}\nA:"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")

# Tokens for an answer of which nothing is known.
FREE_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Asked:
    """A question of a file, and its answers; None when the full cache's answer is the reference."""

    text: str
    answers: tuple[str, ...] | None


@dataclass(frozen=True)
class UserTask(Task):
    """The contexts of one file. Lengths are the texts' own. Made by `load_user_task`."""

    description = "your own contexts and questions"
    name = "user"
    stem: str
    digest: str
    contexts: tuple[tuple[str, tuple[Asked, ...]], ...]
    metric: str = "contains"
    question_format: str = QUESTION

    @property
    def label(self) -> str:
        """The file's name and a digest of contents, metric and question format: "user:notes:3f2a91bc"."""
        return f"user:{self.stem}:{self.digest[:8]}"

    @property
    def num_samples(self) -> int:
        """The number of different contexts."""
        return len(self.contexts)

    @property
    def questions_per_context(self) -> int:
        """The most questions that a context has."""
        return max(len(asked) for _, asked in self.contexts)

    def sample(self, tokenizer: Tokenizer, length: int | None = None, seed: int = 0, index: int = 0) -> Sample:
        """Return context number `index` and its questions; nothing is random, so the seed is not used.

        Raises:
            InvalidInputError: a length is given, or there are fewer contexts.
        """
        if length is not None:
            raise InvalidInputError("length", length, "None: a text of your own has its own length")
        if not 0 <= index < self.num_samples:
            raise InvalidInputError("index", index, f"0 to {self.num_samples - 1}, the contexts of {self.label}")
        encoder = Encoder(tokenizer)
        context, asked = self.contexts[index]
        questions = tuple(self._question(encoder, each) for each in asked)
        return Sample(f"{self.label}/index={index}", encoder.start(context), questions)

    def score(self, question: Question, output: str) -> float:
        """Return the score by the file's metric; word F1 where the full cache's answer is the reference."""
        if question.reference == "full":
            return word_f1(output, question.answers)
        return super().score(question, output)

    def _question(self, encoder: Encoder, asked: Asked) -> Question:
        text = self.question_format.replace("{question}", asked.text)
        ids = tuple(encoder(text))
        if asked.answers is None:
            return Question(text, ids, (), FREE_ANSWER_TOKENS, reference="full")
        limit = sum(len(encoder(" " + answer)) + ANSWER_SLACK for answer in asked.answers)
        return Question(text, ids, asked.answers, limit)

    def _draw(self, *_: Any) -> NoReturn:
        raise AssertionError("the samples of a file are not drawn")


def load_user_task(path: str | Path, metric: str = "contains", question_format: str = QUESTION) -> UserTask:
    """Return the task that a file of the user's own makes; the module's docstring gives the two forms.

    Args:
        path: the file.
        metric: how outputs are judged, one of `metrics.METRICS`: "contains" wants all answers of a list,
            "contains_any" one of them.
        question_format: what is appended to the context, with "{question}" in it.

    Raises:
        InputFileError: the file cannot be read, or is not of that form; the message gives the line.
        InvalidInputError: no such metric, or a format without "{question}".
    """
    check_choice("metric", metric, tuple(METRICS))
    if "{question}" not in question_format:
        raise InvalidInputError("question_format", question_format, 'a text with "{question}" in it')
    path = Path(path)
    data = read_text(path, "it should hold a context and questions about it")
    rows = _json_rows(path, data) if path.suffix.lower() in JSON_SUFFIXES else _text_rows(path, data)
    contexts: dict[str, list[Asked]] = {}
    for context, asked in rows:
        contexts.setdefault(context, []).append(asked)
    grouped = tuple((context, tuple(asked)) for context, asked in contexts.items())
    digest = hashlib.sha256("\0".join((data, metric, question_format)).encode()).hexdigest()
    return UserTask(path.stem, digest, grouped, metric, question_format)


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


def _text_rows(path: Path, text: str) -> Iterator[tuple[str, Asked]]:
    lines = text.replace("\r\n", "\n").split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith("Q:")), None)
    if first is None:
        raise InputFileError(path, "has no question", 'end it with lines that start with "Q:"')
    context = "\n".join(lines[:first]).strip("\n")
    if not context.strip():
        raise InputFileError(path, "has no text before the first question", "put the context first")
    asked: list[Asked] = []
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
            asked.append(Asked(rest, None))
        else:
            asked[-1] = replace(asked[-1], answers=(*(asked[-1].answers or ()), rest))
    for each in asked:
        yield context, each


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Asked]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _json_object(path, number, line)
        context = _string(path, number, "context", row["context"])
        for question, answers in _pairs(path, number, row["question"], row["answers"]):
            yield context, Asked(_string(path, number, "question", question), _answers(path, number, answers))


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        problem = f"line {number} is not JSON ({getattr(error, 'msg', 'nested too deeply')})"
        raise InputFileError(path, problem, "put one JSON object on each line") from None
    if not isinstance(row, dict):
        fix = 'write {"context": ..., "question": ..., "answers": ...} on each line'
        raise InputFileError(path, f"line {number} is not a JSON object", fix)
    missing = [field for field in ("context", "question", "answers") if field not in row]
    if missing:
        fix = '"answers": null makes the full cache\'s answer the reference' if "answers" in missing else ""
        raise InputFileError(path, f"line {number} lacks {' and '.join(missing)}", fix)
    return row


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


def _string(path: Path, number: int, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        problem = f"line {number}: {field} is {value!r:.40}, not a text"
        raise InputFileError(path, problem, "write it as a string that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputFileError(path, f"line {number}: {field} holds half a character (a surrogate)") from None
    return value
