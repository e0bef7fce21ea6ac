"""Generation tasks of lm-evaluation-harness for `sparing compare`: its documents, its prompts, its metric.

~~~
sparing compare --tasks lm_eval:niah_single_1,lm_eval:ruler_vt --lengths 4096
~~~

The prompt is the harness's own, token by token, cut in two: the question is the last line of the task's text with the
beginning of the answer that the harness puts after it; the context is everything before. So a context can be compressed
before the question is seen, which the harness's own command cannot do. What comes out is cut, filtered and judged by
the harness's code.

RULER's tasks (niah_*, ruler_*) are written for a tokenizer and a length: 500 samples of at most `length` tokens, answer
included. (`ruler_fwe` forgets its answer's 50 tokens and may be so much longer.) They are drawn by its generators, but
are not those of a run of its command, whose draws depend on what was imported before. Other tasks have texts of their
own length, and with seed 0 the examples of its command in their prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from sparing.errors import InvalidInputError
from sparing.lm_eval import harness
from sparing.tasks.base import Question, Sample, Task, Tokenizer
from sparing.tasks.encoding import common_length
from sparing.tasks.registry import HARNESS


@dataclass(frozen=True)
class HarnessQuestion(Question):
    """A question of the harness's, with the `task` and the `request` of its that an answer is judged by."""

    task: Any = field(default=None, compare=False, repr=False)
    request: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class HarnessTask(Task):
    """One task of the harness. Made by `load`.

    Attributes:
        task: its name there.
        metric: the name of its score: the first one of its list.
        count: how many samples it has; None if they are written for a length.
        question_lines: how many of the last lines of its text are the question.
    """

    name = "lm_eval"
    description = "a generation task of lm-evaluation-harness"
    task: str
    metric: str
    count: int | None = None
    question_lines: int = 1

    @property
    def label(self) -> str:
        """ "lm_eval:niah_single_1"; `load` accepts it."""
        return HARNESS + self.task + (f":question_lines={self.question_lines}" if self.question_lines != 1 else "")

    @property
    def num_samples(self) -> int | None:
        """How many samples there are; None if they are written for a length."""
        return self.count

    @property
    def questions_per_context(self) -> int:
        """One."""
        return 1

    def sample(self, tokenizer: Tokenizer, length: int | None, seed: int = 0, index: int = 0) -> Sample:
        """Return the harness's document number `index`.

        Args:
            length: tokens for tasks that are written for a length (see the module); None for all others.

        Raises:
            InvalidInputError: a length that does not fit the task, no such document, or one that can't be cut in two.
        """
        task = self._made(tokenizer, length, seed)
        request = harness.request(task, index, seed)
        prompt, options = request.args
        cut = self._cut(prompt, task.doc_to_text(request.doc))
        context, rest = _cut_ids(tokenizer, prompt, cut)
        answers, limit = self._answers(task, request.doc), self._limit(options)
        text = prompt[cut:]
        question = HarnessQuestion(text, rest, answers, limit, one_line=False, task=task, request=request)
        return Sample(f"{self.label}/seed={seed}/index={index}/length={length}", context, (question,))

    def score(self, question: Question, output: str) -> float:
        """Return the harness's score.

        Raises:
            InvalidInputError: it is no number from 0 to 1, so it has no mean that means something here.
        """
        assert isinstance(question, HarnessQuestion)
        found = harness.metrics(question.task, question.request, output)
        # RULER gives a document's score under the length that it was written for, and -1 under others.
        name = self.metric if self.count is not None else str(question.request.doc["max_length"])
        value = found.get(name)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            fix = "run this task with `lm_eval --model sparing`"
            raise InvalidInputError(f"{name} of {self.label}", value, "a score from 0 to 1 for each answer", fix)
        return float(value)

    def _made(self, tokenizer: Tokenizer, length: int | None, seed: int) -> Any:
        if self.count is not None:
            if length is not None:
                raise InvalidInputError("length", length, f"None: the texts of {self.label} have their own lengths")
            return harness.downloaded(self.task, seed)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise InvalidInputError("length", length, f"a positive number of tokens for {self.label}")
        where = getattr(tokenizer, "name_or_path", "")
        if not where:
            allowed = "one loaded from a folder or from the Hub: the harness loads it again by name"
            raise InvalidInputError("tokenizer", type(tokenizer).__name__, allowed)
        return harness.written(self.task, where, length, seed)

    def _cut(self, prompt: str, text: str) -> int:
        """Where the question begins in a prompt that ends with the task's text and the beginning of an answer."""
        end = prompt.rindex(text) + len(text.rstrip())
        for _ in range(self.question_lines):
            end = prompt.rfind("\n", 0, max(end, 0))
        if end <= 0 or not prompt[:end].strip():
            allowed = "less than the lines of every prompt"
            raise InvalidInputError("question_lines", self.question_lines, allowed, f"{self.label} has a shorter one")
        return end

    def _limit(self, options: dict[str, Any]) -> int:
        from lm_eval.models.utils import normalize_gen_kwargs

        if options.get("do_sample"):
            fix = "run this task with `lm_eval --model sparing`"
            raise InvalidInputError(f"do_sample of {self.label}", True, "False: answers are compared greedily", fix)
        return int(normalize_gen_kwargs(options)["max_gen_toks"])

    @staticmethod
    def _answers(task: Any, document: dict[str, Any]) -> tuple[str, ...]:
        """What the harness compares with, for people to read."""
        target = document["outputs"] if "outputs" in document else task.doc_to_target(document)
        return tuple(map(str, target)) if isinstance(target, list) else (str(target),)

    def _draw(self, *_: Any) -> NoReturn:
        raise AssertionError("the samples of the harness are not drawn here")


def load(text: str) -> HarnessTask:
    """Return a task by its name in the harness: "niah_single_1", "lm_eval:niah_single_1".

    An option may stand behind the name: "longbench_qasper:question_lines=3".

    Raises:
        MissingExtraError: the harness is not installed.
        InvalidInputError: no such task or option, a task whose answers are not generated, or one whose data is missing.
    """
    name, *options = text.removeprefix(HARNESS).split(":")
    lines = 1
    for option in options:
        key, _, value = option.partition("=")
        if key != "question_lines" or not value.isdecimal() or int(value) < 1:
            raise InvalidInputError(f"option of {name}", option, "question_lines=N with N >= 1")
        lines = int(value)
    if harness.is_ruler(name):
        metric = "string_match_part" if name.startswith("ruler_qa") else "string_match_all"
        return HarnessTask(name, metric, question_lines=lines)
    task = harness.downloaded(name, 0)
    metric = str(next(iter(task.aggregation())))
    return HarnessTask(name, metric, len(task.eval_docs), lines)


def _cut_ids(tokenizer: Tokenizer, prompt: str, cut: int) -> tuple[list[int], tuple[int, ...]]:
    """The ids of a prompt in two parts, at a place in its text; before it where a token goes across."""
    ids = tokenizer.encode(prompt)
    same = common_length(ids, tokenizer.encode(prompt[:cut]))
    return ids[:same], tuple(ids[same:])
