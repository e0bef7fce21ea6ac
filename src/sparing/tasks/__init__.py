"""Tasks that measure what a compressed context still knows: exact lengths, exact answers, no downloads.

`names()` lists the tasks, `get(name)` returns one, `load_user_task(path)` makes one of the user's own text
and questions, `named(text)` understands what the command line takes. Nothing here needs torch: a sample is
lists of token ids.
"""

from __future__ import annotations

from sparing.tasks.base import Question, Sample, Task
from sparing.tasks.intervals import Interval, bootstrap, context_means, wilson
from sparing.tasks.registry import get, named, names
from sparing.tasks.user_files import load_user_task

__all__ = [
    "Interval",
    "Question",
    "Sample",
    "Task",
    "bootstrap",
    "context_means",
    "get",
    "load_user_task",
    "named",
    "names",
    "wilson",
]
