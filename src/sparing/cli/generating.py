"""Answering from a compressed cache: `sparing generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparing.cli.options import chat_option, model_options
from sparing.cli.recipes import RECIPE, model_and_method, recipe_of
from sparing.errors import InvalidInputError

if TYPE_CHECKING:
    from sparing.loading import ModelSpec


@click.command()
@model_options
@chat_option
@click.option("--method", "method_text", default="snapkv", show_default=True, help="See `sparing methods`.")
@click.option("--keep", "keep_text", default="0.25", show_default=True, help='A budget: 0.25, 512 or "64MiB".')
@RECIPE
@click.option("--context", "context_file", required=True, type=click.Path(path_type=Path), help="A text file.")
@click.option("--question", required=True, help="Appended to the context, on a line of its own.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--query-aware", is_flag=True, help="Let the method see the question before it drops anything.")
@click.option("--compare-full", is_flag=True, help="Answer from the full cache as well.")
def generate(
    spec: ModelSpec, method_text: str, keep_text: str, recipe_file: Path | None, context_file: Path, question: str,
    max_new_tokens: int, query_aware: bool, compare_full: bool,
) -> None:  # fmt: skip
    """Answer a question about a text from a compressed cache."""
    from sparing.compare.ask import ask
    from sparing.tasks.rows import read_text

    recipe = recipe_of(recipe_file)
    text = read_text(context_file, "it should hold the text that the question is about")
    if not question.strip():
        raise InvalidInputError("question", question, "some text")
    loaded, method = model_and_method(spec, method_text, keep_text, recipe)
    ask(loaded, method, text, question, max_new_tokens, query_aware, compare_full)


COMMANDS = (generate,)
