"""Tasks from a file of the user's own: contexts, questions about them, and what the answers should hold.

JSON lines (a name that ends in .jsonl, .ndjson or .json), one object a line; rows with the same context are
one sample with several questions:

    {"context": "...", "question": "Who came?", "answers": ["Ada", "Grace"]}
    {"context": "...", "question": ["Who came?", "When?"], "answers": ["Ada", "on Monday"]}
    {"context": "...", "question": "Who came?", "answers": null}
    {"context": "...", "question": "Sum it up.", "answers": "...", "metric": "rouge_l", "max_new_tokens": 128}

Any other file is plain text: the context, and from the first line that starts with `Q:` on only questions,
each followed by any number of lines with expected answers:

    ... and so the story ends.
    Q: Who came?
    A: Ada
    Q: What is the moral?

Where no answer is given (null, no `A:`), the reference is what the model answers with its full cache
(`Question.reference == "full"`), judged by `rouge_l` or a function of the user's if the file asks for these, and
by `word_f1` otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sparing.errors import InvalidInputError
from sparing.tasks.base import ANSWER_SLACK, Question, Sample, Task, Tokenizer
from sparing.tasks.chat import prompt_parts
from sparing.tasks.encoding import Encoder
from sparing.tasks.judge import Judge, judge_of, names_function
from sparing.tasks.metrics import metric_name
from sparing.tasks.rows import Asked, json_rows, read_text, text_rows

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")

# How a question follows its context: to be continued, or in a chat to be answered.
QUESTION, CHAT_QUESTION = "\nQ: {question}\nA:", "\n\n{question}"

# Tokens for an answer whose length nothing tells.
FREE_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class UserTask(Task):
    """The contexts of one file. Lengths are the texts' own. Made by `load_user_task`."""

    description = "your own contexts and questions"
    name = "user"
    stem: str
    digest: str
    contexts: tuple[tuple[str, tuple[Asked, ...]], ...]
    metric: str
    question_format: str = QUESTION
    judge: Judge | None = None
    chat: bool = False

    @property
    def label(self) -> str:
        """The file's name and a digest of all that makes a score what it is: "user:notes:3f2a91bc"."""
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
            InvalidInputError: a length is given, there are fewer contexts, or a chat is wanted of a tokenizer that
                has no template for it.
        """
        if length is not None:
            raise InvalidInputError("length", length, "None: a text of your own has its own length")
        if not 0 <= index < self.num_samples:
            raise InvalidInputError("index", index, f"0 to {self.num_samples - 1}, the contexts of {self.label}")
        context, asked = self.contexts[index]
        texts = [self.question_format.replace("{question}", each.text) for each in asked]
        context_ids, question_ids = prompt_parts(tokenizer, context, texts, self.chat)
        encoder = Encoder(tokenizer)
        questions = tuple(
            self._question(encoder, each, text, tuple(ids))
            for each, text, ids in zip(asked, texts, question_ids, strict=True)
        )
        return Sample(f"{self.label}/index={index}", context_ids, questions)

    def score(self, question: Question, output: str) -> float:
        """Return the score by the question's metric, or by the file's own function.

        Raises:
            InputFileError: the function fails, or returns no score. InvalidInputError: a pattern takes too long.
        """
        if self.judge is not None and not question.metric:
            return self.judge(output, question.answers)
        return super().score(question, output)

    def _question(self, encoder: Encoder, asked: Asked, text: str, ids: tuple[int, ...]) -> Question:
        return Question(
            text, ids, asked.answers or (), asked.max_new_tokens or self._limit(encoder, asked),
            reference="full" if asked.answers is None else "answers", metric=asked.metric,
            one_line=not self.chat and asked.metric not in ("", "rouge_l"),
        )  # fmt: skip

    def _limit(self, encoder: Encoder, asked: Asked) -> int:
        if asked.answers is None or asked.metric == "regex":
            return FREE_ANSWER_TOKENS
        expected = sum(len(encoder(" " + answer)) + ANSWER_SLACK for answer in asked.answers)
        # A chat answers in sentences, and what a function wants to see is its own affair.
        return max(expected, FREE_ANSWER_TOKENS) if self.chat or not asked.metric else expected

    def _draw(self, *_: Any) -> NoReturn:
        raise AssertionError("the samples of a file are not drawn")


def load_user_task(
    path: str | Path,
    metric: str | Callable[[str, list[str]], float] = "contains",
    question_format: str | None = None,
    chat: bool = False,
) -> UserTask:
    """Return the task that a file of the user's own makes; the module's docstring gives the two forms.

    Args:
        path: the file.
        metric: how outputs are judged where a row does not say: one of `metrics.METRICS` ("contains" wants all
            answers of a list, "contains_any" one of them), "file.py::function", or a function
            `judge(output: str, answers: list[str]) -> float` from 0 to 1.
        question_format: what is appended to the context, with "{question}" in it; by default `QUESTION`, in a chat
            `CHAT_QUESTION`.
        chat: context and question become one message in the tokenizer's chat template.

    Raises:
        InputFileError: the file cannot be read, or is not of that form; the message gives the line. Or the file of
            the function cannot be used.
        InvalidInputError: no such metric, no function of two arguments, or a format without "{question}".
    """
    question_format = question_format or (CHAT_QUESTION if chat else QUESTION)
    if "{question}" not in question_format:
        raise InvalidInputError("question_format", question_format, 'a text with "{question}" in it')
    judge = judge_of(metric) if not isinstance(metric, str) or names_function(metric) else None
    named = "" if judge is not None else metric_name(str(metric))
    path = Path(path)
    data = read_text(path, "it should hold a context and questions about it")
    rows = json_rows if path.suffix.lower() in JSON_SUFFIXES else text_rows
    contexts: dict[str, list[Asked]] = {}
    for context, asked in rows(path, data, named):
        contexts.setdefault(context, []).append(asked)
    grouped = tuple((context, tuple(asked)) for context, asked in contexts.items())
    used = dict.fromkeys(each.metric for _, asked in grouped for each in asked)
    shown = ", ".join(name or (judge.name if judge is not None else "") for name in used)
    parts = [data, named, question_format, *([judge.digest] if judge is not None else []), *(["chat"] if chat else [])]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return UserTask(path.stem, digest, grouped, shown, question_format, judge, chat)
