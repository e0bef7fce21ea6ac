"""Options that several commands share, and what they have to say."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sparing.errors import InvalidInputError

if TYPE_CHECKING:
    from sparing.tasks import Task

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL_OPTIONS = (
    click.option(
        "--model", default="bundled", show_default=True, help='"bundled", a folder, or NAME[@REVISION] on the Hub.'
    ),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--device", default=None, help="cpu, cuda, ...; by default a GPU if there is one."),
    click.option("--device-map", default=None, help="Spread a large model over devices and disk: auto, balanced, ..."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
)


def model_options(command: Command) -> Command:
    """Options that say which model and how it is loaded; the command gets them as one `spec`, a `ModelSpec`."""

    @functools.wraps(command)
    def with_spec(
        model: str, dtype: str, device: str | None, device_map: str | None, trust_remote_code: bool, **others: Any
    ) -> Any:
        from sparing.loading import ModelSpec

        return command(spec=ModelSpec(model, dtype, device, device_map, trust_remote_code), **others)

    for option in reversed(_MODEL_OPTIONS):
        with_spec = option(with_spec)
    return with_spec  # type: ignore[return-value]


def chat_option(command: Command) -> Command:
    """`--chat`, for commands that ask what users ask: a field of their `spec`. Goes below `model_options`."""

    @functools.wraps(command)
    def with_chat(spec: Any, chat: bool, **others: Any) -> Any:
        return command(spec=replace(spec, chat=chat), **others)

    return click.option("--chat/--no-chat", default=False, help="Ask in the tokenizer's chat template.")(with_chat)  # type: ignore[return-value]


def command_line() -> str:
    """The command that is running, as it could be typed again."""
    return shlex.join(["sparing", *sys.argv[1:]])


def whole_numbers(what: str, text: str) -> list[int]:
    """Comma-separated; at least one."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise InvalidInputError(what, text, "whole numbers, comma-separated")
    return found


def count_or_share(what: str, text: str) -> int | float:
    """ "8" or "0.1"."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise InvalidInputError(what, text, "a whole number, or a share in (0, 1]") from None


def split_tasks(text: str, chat: bool) -> list[tuple[str, Task]]:
    """Tasks by name or file, comma-separated, each beside its text; see `tasks.named`."""
    from sparing import tasks

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InvalidInputError("tasks", text, "at least one of " + ", ".join(tasks.names()))
    return [(part, tasks.named(part, chat)) for part in parts]
