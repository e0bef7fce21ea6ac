"""Tasks of the harness as it makes them itself: found by name, with their documents, ready to be asked and judged.

RULER's tasks (arXiv:2404.06654) write their documents for a tokenizer and a length; all others have documents of their
own, most of them to be downloaded. What a generator draws depends on the state of global random generators, and on what
was drawn from them by modules imported before; so those are imported first, seeded, and put back.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import inspect
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparing.errors import InvalidInputError, MissingExtraError

NOUN = "task of lm-evaluation-harness"
# A module that keeps a random generator of its own, so that its second documents are not its first ones.
HAS_STATE = "lm_eval.tasks.ruler.cwe_utils"
GENERATORS = ("niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils")
OFFLINE = "niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe, ruler_fwe"
# What the harness's command draws the examples in prompts with, unless it is told otherwise.
FEWSHOT_SEED = 1234
# So many requests are made at once, to begin with.
FIRST = 16
# Words drawn by chance make a sample so many tokens longer than another one, at most.
SLACK = 32


def is_ruler(name: str) -> bool:
    """True for the tasks whose documents are written for a length."""
    return name in _ruler().all_subtasks


@functools.lru_cache(maxsize=16)
def written(name: str, tokenizer: str, length: int, seed: int) -> Any:
    """A task of RULER with its 500 documents of at most `length` tokens, answers included.

    Args:
        tokenizer: a folder or a name on the Hub.

    Raises:
        InvalidInputError: no document can be written, e.g. because the length is too short or data is missing.
    """
    with _quiet():
        for module in GENERATORS:
            importlib.import_module(f"lm_eval.tasks.ruler.{module}")
    _check_it_ends(name, tokenizer, length)
    manager = _ruler({"tokenizer": tokenizer, "max_seq_lengths": [length]})
    task = _loaded(name, manager, seed, f"{name} at {length}", "ask for longer samples, or for one of these that")
    if not task.eval_docs[0]["outputs"]:  # what ruler_cwe leaves of a sample that is too long: no words
        allowed = "one that a sample with words in it fits into, with this tokenizer"
        raise InvalidInputError(f"length of {name}", length, allowed, "ask for longer samples")
    return task


@functools.lru_cache(maxsize=16)
def downloaded(name: str, seed: int) -> Any:
    """Any other generation task, with its documents.

    Raises:
        InvalidInputError: there is no such task, it asks for no text, or its data is missing.
    """
    manager = _everything()
    if name not in manager.all_subtasks:
        near = difflib.get_close_matches(name, manager.all_subtasks, n=3, cutoff=0.6)
        fix = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls subtasks` lists them"
        raise InvalidInputError(NOUN, name, "the name of one of its tasks", fix)
    return _loaded(name, manager, seed, name, "these")


def request(task: Any, number: int, seed: int) -> Any:
    """What a task asks about its document `number`: the prompt, and how to answer it.

    Raises:
        InvalidInputError: there is no such document.
    """
    last = len(task.eval_docs) - 1
    if not 0 <= number <= last:
        raise InvalidInputError("index", number, f"0 to {last}, the documents of {task.task_name}")
    made = len(task.instances)
    if made <= number:
        _build(task, max(2 * made, number + 1), seed)
    return task.instances[number]


def metrics(task: Any, request: Any, answer: str) -> dict[str, Any]:
    """What the harness makes of an answer: its cuts, its filters, its metrics."""
    from lm_eval.models.utils import postprocess_generated_text

    request.resps = [postprocess_generated_text(answer, request.args[1].get("until"), None)]
    request.filtered_resps = {}
    for pipeline in getattr(task, "_filters", ()):
        pipeline.apply([request])
    filtered = next(iter(request.filtered_resps.values()), request.resps[0])
    found: dict[str, Any] = task.process_results(request.doc, [filtered])
    return found


def _loaded(name: str, manager: Any, seed: int, what: str, fix: str) -> Any:
    """A task with its documents."""
    _rewind()
    try:
        with _seeded(seed), _quiet():
            task = manager.load([name])["tasks"][name]
        if task.OUTPUT_TYPE == "generate_until":
            _build(task, FIRST, seed)
    except Exception as error:  # what the harness, its tasks' own code and their downloads may raise has no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        allowed = f"one whose samples can be made here (the harness says: {reason})"
        raise InvalidInputError(NOUN, what, allowed, f"{fix} need no download: {OFFLINE}") from error
    if task.OUTPUT_TYPE != "generate_until":
        allowed = f"one whose answers are generated, not {task.OUTPUT_TYPE}"
        raise InvalidInputError(NOUN, name, allowed, "run it with `lm_eval --model sparing`")
    return task


def _build(task: Any, count: int, seed: int) -> None:
    """Make the first requests of a task; the examples in their prompts are drawn from the first one on."""
    task.set_fewshot_seed(FEWSHOT_SEED + seed)
    with _quiet():
        task.build_all_requests(limit=count)


def _check_it_ends(name: str, tokenizer: str, length: int) -> None:
    """Refuse what would run for ever: three generators shrink a sample until it fits, and go on at their smallest one.

    Raises:
        InvalidInputError: the smallest sample does not fit.
    """
    if name not in ("ruler_vt", "ruler_cwe", "ruler_fwe"):
        return
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    with _seeded(0), _quiet():
        least = _shortest(name, get_tokenizer(tokenizer))
    if length < least:
        fix = "ask for longer samples or for another task"
        raise InvalidInputError(f"length of {name}", length, f"at least {least} tokens with this tokenizer", fix)


def _shortest(name: str, tokenizer: Any) -> int:
    """Tokens of a smallest sample, with its answer."""

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids) + SLACK

    if name == "ruler_cwe":
        from lm_eval.tasks.ruler import cwe_utils

        return count(cwe_utils.TEMPLATE) + int(cwe_utils.CONFIG["tokens_to_generate"])  # without any word
    if name == "ruler_fwe":
        from lm_eval.tasks.ruler import fwe_utils

        # Three words and the noise are four, of which there is one for every fifty tokens.
        return max(200, count(fwe_utils.TEMPLATE))
    from lm_eval.tasks.ruler import vt_utils

    answer, most = 30, 500  # tokens: of an answer, and of the worked example that stands before each sample
    smallest = count(str(vt_utils.generate_input_output(5, 1, 4, is_icl=True)))
    if smallest + answer > most:
        allowed = f"one that writes the worked example of {name} in {most - answer} tokens, not {smallest}"
        raise InvalidInputError("tokenizer", tokenizer.name_or_path, allowed, "ask for another task")
    worked = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, most, incremental=5)[0]
    before = f"{worked['input']} {' '.join(worked['outputs'])}\n\n"
    return count(before + str(vt_utils.generate_input_output(10, 1, 4))) + answer


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and NumPy's global generators in a known state; afterwards as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _rewind() -> None:
    """Put the one generator's own state back to what it is after the import of its module, as in a new process."""
    used, spec = sys.modules.get(HAS_STATE), importlib.util.find_spec(HAS_STATE)
    if used is None or spec is None or spec.loader is None:
        return
    fresh: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    used.RNG.setstate(fresh.RNG.getstate())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress that generators print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@functools.cache
def _everything() -> Any:
    """The harness's index of all its tasks, which takes some ten seconds to make."""
    return _manager()()


def _ruler(metadata: dict[str, Any] | None = None) -> Any:
    """The index of RULER's tasks alone."""
    make = _manager()
    folder = Path(inspect.getfile(make)).parent / "ruler"
    return make(include_defaults=False, include_path=str(folder), metadata=metadata)


def _manager() -> Any:
    """The harness's own class.

    Raises:
        MissingExtraError: the harness, or what its tasks are written with, is not installed.
    """
    missing = [name for name in ("lm_eval", "nltk", "wonderwords", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError("lm-evaluation-harness", "lm-eval")
    from lm_eval.tasks import TaskManager

    return TaskManager
