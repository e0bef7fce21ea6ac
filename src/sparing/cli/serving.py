"""Serving a model whose caches are compressed: `sparing serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparing.cli.options import model_options
from sparing.cli.recipes import RECIPE, model_and_method, recipe_of
from sparing.errors import InvalidInputError

if TYPE_CHECKING:
    from sparing.loading import ModelSpec

TOKEN_VARIABLE = "SPARING_API_KEY"


@click.command()
@model_options
@click.option("--method", "method_text", default="snapkv", show_default=True, help="See `sparing methods`.")
@click.option("--keep", "keep_text", default="0.25", show_default=True, help='A budget: 0.25, 512 or "64MiB".')
@RECIPE
@click.option("--host", default="127.0.0.1", show_default=True, help="Other machines need a token, see --token-env.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--memory", default="2GiB", show_default=True, help="All caches and documents together.")
@click.option("--max-concurrent", default=8, show_default=True, type=click.IntRange(1), help="Requests at a time.")
@click.option("--max-queue", default=64, show_default=True, type=click.IntRange(0), help="Requests that wait.")
@click.option("--max-request-bytes", default="4MiB", show_default=True, help="Of a request's body.")
@click.option("--ranker", default="icr", show_default=True, help="Of /v1/rerank; see `sparing rerank --help`.")
@click.option("--token-env", default=None, help=f"Variable that holds the token; by default {TOKEN_VARIABLE}, if set.")
def serve(
    spec: ModelSpec, method_text: str, keep_text: str, recipe_file: Path | None, host: str, port: int, memory: str,
    max_concurrent: int, max_queue: int, max_request_bytes: str, ranker: str, token_env: str | None,
) -> None:  # fmt: skip
    """Serve a model over an OpenAI-compatible API, every request's cache compressed."""
    from sparing.serve import require_extra

    require_extra()
    from sparing.core.budget import parse_bytes
    from sparing.core.ranker import parse_ranker
    from sparing.serve.server import bind, url_of
    from sparing.serve.server import serve as run
    from sparing.serve.settings import Settings

    settings = Settings(
        host, port, parse_bytes(memory, "memory"), max_concurrent, max_queue,
        parse_bytes(max_request_bytes, "max_request_bytes"), _token(token_env),
    )  # fmt: skip
    by = parse_ranker(ranker)
    recipe = recipe_of(recipe_file)
    with bind(settings) as bound:  # before minutes go into loading
        loaded, method = model_and_method(spec, method_text, keep_text, recipe)
        what = f"{loaded.name} with {method.label}, keep {method.keep}"
        run(
            loaded, method, settings, bound, lambda: click.echo(f"serving {what} at {url_of(bound)} (Ctrl-C stops)"), by
        )
    click.echo("stopped")


def _token(variable: str | None) -> str | None:
    """The token, which no command line should show.

    Raises:
        InvalidInputError: the variable that was named is not set.
    """
    token = os.environ.get(variable or TOKEN_VARIABLE) or None
    if variable is not None and token is None:
        raise InvalidInputError("--token-env", variable, "the name of an environment variable that holds a token")
    return token


COMMANDS = (serve,)
