"""Listing what is registered: `sparing methods` and `sparing scorers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def methods(as_json: bool) -> None:
    """List the methods that compress."""
    from sparing.core.allocate import ALLOCATORS
    from sparing.core.allocate_blocks import BLOCK_ALLOCATORS
    from sparing.core.method import methods as registered
    from sparing.kernels import native

    columns = ("name", "family", "unit", "moment", "paper", "summary")
    _show(registered().values(), columns, ("training_free", "needs", "takes", "needs_draft"), as_json)
    if not as_json:
        click.echo("\nThose that drop stored tokens, with another allocator: name+" + ", name+".join(ALLOCATORS) + ".")
        click.echo("Those that score blocks of a prompt, likewise: name+" + ", name+".join(BLOCK_ALLOCATORS) + ".")
        click.echo("Those of the KV cache, with stored tokens as codes of 8 or 4 bits: name(bits=8), name(bits=4).")
        click.echo('One that reads prompts sparsely with one of the KV cache: "name & name".')
        click.echo(native.status())


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def scorers(as_json: bool) -> None:
    """List the scorers of heads, layers and positions."""
    from sparing.core.head_scorer import scorers as registered

    _show(registered().values(), ("name", "family", "axes", "data", "paper", "summary"), (), as_json)


def _show(infos: Iterable[Any], columns: Sequence[str], only_json: Sequence[str], as_json: bool) -> None:
    """A table for people, or JSON for programs."""
    if as_json:
        import json

        click.echo(
            json.dumps([{name: getattr(info, name) for name in (*columns, *only_json)} for info in infos], indent=1)
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column("what" if heading == "summary" else heading, overflow="fold", no_wrap=heading == "name")
    for info in infos:
        cells = [getattr(info, name) for name in columns]
        table.add_row(*(" × ".join(cell) if isinstance(cell, tuple) else str(cell) for cell in cells))
    Console().print(table)


COMMANDS = (methods, scorers)
