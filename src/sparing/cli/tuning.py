"""Choosing what to run: `sparing tune`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.cluster import cluster_options
from sparing.cli.options import chat_option, command_line, model_options, split_tasks, whole_numbers

if TYPE_CHECKING:
    from sparing.loading import ModelSpec
    from sparing.scale.pool import Cluster
    from sparing.tune import Outcome

# Nothing meets the request: not a mistake of the user's (2), and not a recipe either.
NOTHING_FOUND = 1


@click.command()
@model_options
@chat_option
@click.option("--tasks", "task_text", required=True, help="The work: files of your own, or names, comma-separated.")
@click.option("--memory", default=None, help="Share of the full cache's bytes that may be held: 0.25 or 25%.")
@click.option("--bytes", "byte_text", default=None, help="What the cache of one prompt may hold: 2GiB.")
@click.option("--latency", default=None, help="Time per decoded token: 30ms.")
@click.option("--first-token", default=None, help="Time until a prompt has been read and compressed: 2s.")
@click.option("--max-loss", default=None, help="How much of the full cache's score may be lost: 1%.")
@click.option("--methods", "method_text", default="all", show_default=True, help="What is searched, comma-separated.")
@click.option("--mode", type=click.Choice(["query-agnostic", "query-aware"]), default="query-agnostic",
              show_default=True, help="Is the question known when the cache is compressed?")  # fmt: skip
@click.option("--lengths", default="1024", show_default=True, help="Tokens per sample of named tasks.")
@click.option("--samples", default=32, show_default=True, type=click.IntRange(4), help="Contexts; half are held out.")
@click.option("--trials", default=60, show_default=True, type=click.IntRange(1), help="Candidates that are proposed.")
@click.option("--gate", default=0.95, show_default=True, type=click.FloatRange(0, 1),
              help="A task counts if the full cache scores at least this.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="results/tune", show_default=True, type=click.Path(path_type=Path))
@cluster_options
def tune(
    spec: ModelSpec, task_text: str, memory: str | None, byte_text: str | None, latency: str | None,
    first_token: str | None, max_loss: str | None, method_text: str, mode: Any, lengths: str, samples: int,
    trials: int, gate: float, seed: int, out: Path, cluster: Cluster,
) -> None:  # fmt: skip
    """Find what to run for your model, your work and your limits, and write it down as a recipe."""
    from sparing.cli.progress import ProgressBar
    from sparing.core.budget import parse_bytes
    from sparing.core.parsing import check_method, split_methods
    from sparing.tune import Request
    from sparing.tune import tune as search
    from sparing.tune.request import parse_seconds, parse_share

    def given(parse: Any, text: str | None) -> Any:
        return None if text is None else parse(text)

    request = Request(
        given(parse_share, memory), given(parse_bytes, byte_text), given(parse_seconds, latency),
        given(parse_seconds, first_token), given(parse_share, max_loss),
    )  # fmt: skip
    methods = [] if method_text == "all" else split_methods(method_text)
    for text in methods:  # what is no method is said before any model is loaded
        check_method(text)
    with ProgressBar("tuning") as told:
        outcome = search(
            spec, split_tasks(task_text, spec.chat), request, out, methods=methods, mode=mode,
            lengths=whole_numbers("lengths", lengths), samples=samples, trials=trials, gate=gate, seed=seed,
            cluster=cluster, progress=told,
        )  # fmt: skip
    _write(outcome, out)
    _say(outcome, out)
    if outcome.recipe is None:
        sys.exit(NOTHING_FOUND)


def _write(outcome: Outcome, out: Path) -> None:
    """The page, and the recipe if there is one; a recipe of an earlier run that no longer stands goes."""
    from sparing.compare.store import write_text_atomic
    from sparing.tune.page import render_tuning

    run = {}
    if outcome.recipe is not None:
        made = {**outcome.recipe.environment, "command": command_line()}
        replace(outcome.recipe, environment=made).save(out / "recipe.json")
        hardware = ", ".join(made["hardware"][part] for part in ("cpu", "gpu") if made["hardware"][part])
        run = {"Model": outcome.recipe.model.name, "Hardware": hardware}
        run |= {name: str(made[name]) for name in ("sparing", "torch", "transformers", "python")}
    else:
        (out / "recipe.json").unlink(missing_ok=True)
    write_text_atomic(out / "tune.html", render_tuning(outcome, command_line(), run))


def _say(outcome: Outcome, out: Path) -> None:
    """The finalists as a table, and the verdict."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sparing.tune.words import milliseconds, percent, verdict

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="on held-out contexts", title_justify="left")
    for heading in ("finalist", "loss", "95 %", "worst", "bytes", "prefill s", "ms/token"):
        table.add_column(heading, justify="left" if heading == "finalist" else "right")
    for _, held in outcome.finalists:
        interval = f"{percent(held.loss.low)} to {percent(held.loss.high)}"
        table.add_row(held.label, percent(held.loss.mean), interval, percent(held.worst[0]), f"{held.share:.1%}",
                      f"{held.prefill_s:.3g}", milliseconds(held.decode_s))  # fmt: skip
    console = Console(emoji=False)
    console.print(table)
    for sentence in verdict(outcome):
        console.print(f"• {sentence}", highlight=False, markup=False)
    if outcome.recipe is not None:
        click.echo(f"recipe: {out / 'recipe.json'}")
    click.echo(f"page: {out / 'tune.html'}")


COMMANDS = (tune,)
