"""The option of commands that run a recipe, and what a recipe says to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from sparing.errors import InputFileError, InvalidInputError

if TYPE_CHECKING:
    from sparing.compare.cells import Cell
    from sparing.core.method import Method
    from sparing.loading import LoadedModel, ModelSpec
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
# Numbers of a cell that are the same wherever it is read.
PROMISED = ("score", "bytes_kept", "bytes_full")
TUNE = "write one with `sparing tune`"


def recipe_of(path: Path | None) -> Recipe | None:
    """The recipe that the running command was given, if one was.

    Raises:
        InvalidInputError: something that it says is given as well. InputFileError: it is no recipe.
    """
    from sparing.recipe import load

    if path is None:
        return None
    context = click.get_current_context()
    trusted: bool = context.params["trust_remote_code"]
    said = {option.name: option.opts[0] for option in context.command.params if option.name in SAID}
    given = [said[name] for name in said if context.get_parameter_source(str(name)) != ParameterSource.DEFAULT]
    if given:
        allowed = "none of " + ", ".join(said.values())
        raise InvalidInputError("recipe", f"{path} and {' '.join(given)}", allowed, "the recipe says these already")
    return load(path, trusted)


def model_and_method(
    spec: ModelSpec, method_text: str, keep_text: str, recipe: Recipe | None
) -> tuple[LoadedModel, Method]:
    """What the recipe says, or else the options; the method is made before minutes go into loading the model."""
    from sparing.core.budget import parse_keep
    from sparing.core.parsing import parse_method
    from sparing.loading import Drafts

    if recipe is not None:
        method = recipe.method
        return recipe.load_model(), method
    drafts = Drafts(spec)
    method = parse_method(method_text, parse_keep(keep_text), drafts)
    loaded = spec.load()
    drafts.check(loaded)
    return loaded, method


def measured_on(recipe: Recipe) -> tuple[int, list[Cell], list[dict[str, float]]]:
    """On what a recipe was measured: seed and cells; and of each cell, the numbers that should come out again.

    Raises:
        InputFileError: the recipe does not say it, or a file of the user's own is another one now.
    """
    from sparing.compare.cells import Cell
    from sparing.tasks import named

    try:
        numbers = {(each["label"], each["mode"], each["length"]): each for each in recipe.expected["cells"]}
        cells, promised = [], []
        for each in recipe.work["cells"]:
            task = named(each["task"], recipe.model.chat)
            if task.label != each["label"]:
                problem = f"is not the file that the recipe was measured on (now {task.label}, then {each['label']})"
                raise InputFileError(each["task"], problem)
            cells.append(Cell(task, each["mode"], each["length"], tuple(each["contexts"])))
            found = numbers[task.label, each["mode"], each["length"]]
            promised.append({name: found[name] for name in PROMISED})
        seed: int = recipe.work["seed"]
    except (KeyError, TypeError) as error:
        raise InputFileError(recipe.folder, f"a recipe that does not say its work ({error!r})", TUNE) from error
    if not cells:
        raise InputFileError(recipe.folder, "a recipe that was measured on nothing", TUNE)
    return seed, cells, promised
