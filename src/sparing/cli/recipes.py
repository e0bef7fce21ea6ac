"""The option of commands that run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from sparing.errors import InvalidInputError

if TYPE_CHECKING:
    from sparing.recipe import Recipe

RECIPE = click.option(
    "--recipe", "recipe_file", default=None, type=click.Path(path_type=Path),
    help="Do what a recipe of `sparing tune` says.",
)  # fmt: skip


# Parameters of commands that a recipe replaces.
SAID = (
    "model", "dtype", "device", "device_map", "chat", "method_text", "keep_text", "task_text", "lengths", "samples",
    "mode", "seed",
)  # fmt: skip


def recipe_of(context: click.Context, path: Path | None) -> Recipe | None:
    """The recipe that was given, if one was.

    Raises:
        InvalidInputError: something that it says is given as well. InputFileError: it is no recipe.
    """
    from sparing.recipe import load

    if path is None:
        return None
    trusted: bool = context.params["trust_remote_code"]
    said = {option.name: option.opts[0] for option in context.command.params if option.name in SAID}
    given = [said[name] for name in said if context.get_parameter_source(str(name)) != ParameterSource.DEFAULT]
    if given:
        allowed = "none of " + ", ".join(said.values())
        raise InvalidInputError("recipe", f"{path} and {' '.join(given)}", allowed, "the recipe says these already")
    return load(path, trusted)
