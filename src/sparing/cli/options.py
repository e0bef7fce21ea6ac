"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL_OPTIONS = (
    click.option("--model", default="bundled", show_default=True, help='"bundled", a folder, or a name on the Hub.'),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--device", default=None, help="cpu, cuda, ...; by default a GPU if there is one."),
)


def model_options(command: Command) -> Command:
    """Options that say which model and how it is loaded; the command gets them as one `spec`, a `ModelSpec`."""

    @functools.wraps(command)
    def with_spec(model: str, dtype: str, device: str | None, **others: Any) -> Any:
        from sparing.loading import ModelSpec

        return command(spec=ModelSpec(model, dtype, device), **others)

    for option in reversed(_MODEL_OPTIONS):
        with_spec = option(with_spec)
    return with_spec  # type: ignore[return-value]
