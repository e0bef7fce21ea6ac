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


def recipe_of(context: click.Context, path: Path | None, says: tuple[str, ...]) -> Recipe | None:
    """The recipe that was given, if one was.

    Args:
        says: the parameters of the command that a recipe replaces.

    Raises:
        InvalidInputError: one of them is given as well. InputFileError: it is no recipe.
    """
    from sparing.recipe import load

    if path is None:
        return None
    trusted: bool = context.params["trust_remote_code"]
    options = {option.name: option.opts[0] for option in context.command.params}
    given = [options[name] for name in says if context.get_parameter_source(name) != ParameterSource.DEFAULT]
    if given:
        allowed = "none of " + ", ".join(options[name] for name in says)
        raise InvalidInputError("recipe", f"{path} and {' '.join(given)}", allowed, "the recipe says these already")
    return load(path, trusted)
