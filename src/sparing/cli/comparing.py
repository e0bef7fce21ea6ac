"""Comparing methods: `sparing compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.cluster import cluster_options
from sparing.cli.options import chat_option, command_line, model_options, split_tasks, whole_numbers
from sparing.cli.recipes import RECIPE, measured_on, recipe_of
from sparing.errors import InvalidInputError

if TYPE_CHECKING:
    from sparing.compare.cells import Cell, Contestant
    from sparing.compare.observer import Observer
    from sparing.compare.sweep import Sweep
    from sparing.loading import ModelSpec
    from sparing.scale.pool import Cluster
    from sparing.tasks import Task

DEFAULT_TASKS = "needle_single,needle_multikey,kv_retrieval,perplexity"


@click.command()
@model_options
@chat_option
@click.option("--methods", "method_text", default="all", show_default=True, help="Names, comma-separated.")
@click.option("--keep", "keep_text", default="0.5,0.25", show_default=True, help='Budgets: 0.25, 512 or "64MiB".')
@click.option("--tasks", "task_text", default=DEFAULT_TASKS, show_default=True, help="Names, or files of your own.")
@click.option("--lengths", default="1024", show_default=True, help="Tokens per sample, comma-separated.")
@click.option("--samples", default=10, show_default=True, type=click.IntRange(1), help="Contexts per task and length.")
@click.option("--mode", type=click.Choice(["both", "query-agnostic", "query-aware"]), default="both", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the tasks.")
@RECIPE
@click.option("--plan", is_flag=True, help="Read one context of each kind, say what all would take, and stop.")
@click.option("--price", default=None, type=click.FloatRange(0), help="With --plan: of one worker for an hour.")
@click.option("--out", default="results/compare", show_default=True, type=click.Path(path_type=Path))
@cluster_options
def compare(
    spec: ModelSpec, method_text: str, keep_text: str, task_text: str, lengths: str, samples: int, mode: str,
    seed: int, recipe_file: Path | None, plan: bool, price: float | None, out: Path, cluster: Cluster,
) -> None:  # fmt: skip
    """Compare methods at several budgets on tasks, and write a report.

    With a recipe: run it on the work that it was measured on, and say whether its numbers hold.
    """
    from sparing.compare.cells import Contestant
    from sparing.compare.observer import Observer
    from sparing.compare.store import ResultStore
    from sparing.compare.sweep import Sweep

    if price is not None and not plan:
        raise InvalidInputError("price", price, "nothing without --plan")
    recipe = recipe_of(recipe_file)
    if recipe is not None:
        recipe.check_artifacts()
        spec, contestants = recipe.model, [Contestant(recipe.resolved, recipe.keep)]
        seed, cells, promised = measured_on(recipe)
    else:
        tasks = [task for _, task in split_tasks(task_text, spec.chat)]
        contestants, cells = _contestants(method_text, keep_text), _cells(tasks, lengths, mode, samples)
        if method_text == "all":
            _say_what_is_left_out()
    with Observer(spec, cells, seed, out, cluster) as observer:
        contestants = _fit(observer, contestants, explicit=method_text != "all" or recipe is not None)
        if recipe is not None:
            recipe.check_model(observer.facts.fingerprint)
            recipe.check_method(observer.parameters(contestants[0]))
        if plan:
            _forecast(observer, contestants, price)
            return
        with ResultStore(out) as store:
            if store.repaired:
                click.echo(f"{store.file}: {store.repaired}", err=True)
            sweep = Sweep(observer, contestants, store)
            _run_and_report(sweep)
            if recipe is not None:
                _say_if_it_holds(sweep, promised)


def _say_if_it_holds(sweep: Sweep, promised: Sequence[dict[str, float]]) -> None:
    """Compare what a recipe was measured to do with what it does in each cell; exit code 1 if they differ."""
    rows, contestant = {row["key"]: row for row in sweep.store.rows()}, sweep.contestants[-1]
    differences = []
    for number, numbers in enumerate(promised):
        row = rows[sweep.key(contestant, number)]
        differences += [
            f"{row['task']}: {name} is {row[name]:.6g}, the recipe says {value:.6g}"
            for name, value in numbers.items()
            if abs(row[name] - value) > 1e-9
        ]
    if differences:
        click.echo("the recipe's numbers do not hold here:\n" + "\n".join(differences), err=True)
        sys.exit(1)
    click.echo("the recipe's numbers hold: scores and bytes are the same")


def _contestants(method_text: str, keep_text: str) -> list[Contestant]:
    """Every method at every budget; "full" may be named but always runs anyway."""
    from sparing.compare.cells import Contestant
    from sparing.core.budget import parse_keep
    from sparing.core.method import methods as registered
    from sparing.core.parsing import check_method, split_methods

    names = split_methods(method_text)
    if method_text == "all":
        names = [info.name for info in registered().values() if info.needs_nothing]
    keeps = [parse_keep(part) for part in keep_text.split(",") if part.strip()]
    names = list(dict.fromkeys(name for name in names if name != "full"))
    if not keeps:
        raise InvalidInputError("keep", keep_text, 'at least one budget, such as "0.5,0.25"')
    found = [Contestant(name, keep) for name in names for keep in dict.fromkeys(keeps)]
    for contestant in found:  # what is no method is said before any model is loaded
        check_method(contestant.name, contestant.keep)
    return found


def _say_what_is_left_out() -> None:
    """Methods that their names alone do not make."""
    from sparing.core.method import methods as registered

    for info in registered().values():
        if info.needs_draft:
            click.echo(f"left out: {info.name} (needs a draft model: {info.name}(draft=NAME))", err=True)
        if info.needs:
            how = f"sparing calibrate --method {info.name}, then {info.name}(scores=FILE)"
            click.echo(f"left out: {info.name} (needs a measurement: {how})", err=True)


def _cells(tasks: list[Task], lengths: str, mode: str, samples: int) -> list[Cell]:
    from sparing.compare.cells import MODES, cells_of

    modes = [each for each in MODES if mode in ("both", each)]
    return cells_of(tasks, modes, whole_numbers("lengths", lengths), samples)


def _fit(observer: Observer, contestants: list[Contestant], explicit: bool) -> list[Contestant]:
    """A method that was asked for by name and cannot work is an error; of "all" it is left out, and said so."""
    refused = observer.introduce(contestants)
    for contestant, error in refused.items():
        if explicit:
            raise error
        click.echo(f"left out: {contestant.name} at {contestant.keep} ({error})", err=True)
    return [c for c in contestants if c not in refused]


def _forecast(observer: Observer, contestants: list[Contestant], price: float | None) -> None:
    """Print what the sweep would take with 1, 2, 4, ... workers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sparing.compare.forecast import look_ahead

    outlook = look_ahead(observer, contestants)
    if not outlook.seconds:
        click.echo("nothing is left to do: every context has been read")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("workers", "time", "worker hours", *(["cost"] if price is not None else [])):
        table.add_column(heading, justify="right")
    for each in outlook.choices():
        hours = each.workers * each.seconds / 3600
        cost = [f"{each.cost(price):.2f}"] if price is not None else []
        table.add_row(str(each.workers), _duration(each.seconds), f"{hours:.3g}", *cost)
    Console(emoji=False).print(table)
    click.echo(
        f"{len(outlook.seconds)} contexts are left, {sum(outlook.seconds):.3g} s of work as measured on one of each "
        f"cell; a worker is ready after {outlook.ready:.1f} s. What was read is kept."
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def _run_and_report(sweep: Sweep) -> None:
    """Run with a progress bar; whatever happens, what was measured is on disk and can be gone on with."""
    from rich.console import Console

    from sparing.cli.progress import ProgressBar
    from sparing.compare.observer import EXAMPLES
    from sparing.compare.report import render_report
    from sparing.compare.store import read_json, write_json_atomic, write_text_atomic
    from sparing.compare.table import render_table

    folder, observer = sweep.store.folder, sweep.observer
    run: dict[str, Any] = {
        "command": command_line(), "seed": observer.seed, "model": observer.spec.name,
        "model_description": observer.facts.description, "samples": max(len(cell.contexts) for cell in observer.cells),
        **observer.facts.environment, "started": _now(), "finished": None,
    }  # fmt: skip
    write_json_atomic(folder / "run.json", run)
    left, done = observer.left(sweep.contestants), 0
    total = sum(len(left[number]) for number in sweep.missing())
    with ProgressBar("reading") as told:

        def progress(cell: Cell) -> None:
            nonlocal done
            done += 1
            told(done, total, f"{cell.label} {cell.mode}")

        observer.progress = progress
        sweep.run()
    run["finished"] = _now()
    write_json_atomic(folder / "run.json", run)
    rows = sweep.store.rows()
    write_text_atomic(folder / "report.html", render_report(run, rows, read_json(folder / EXAMPLES)))
    render_table(rows, Console(emoji=False))
    click.echo(f"report: {folder / 'report.html'}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


COMMANDS = (compare,)
