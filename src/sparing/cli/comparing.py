"""Comparing methods and answering from a compressed cache: `sparing compare` and `sparing generate`."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import model_options
from sparing.errors import InputFileError, InvalidInputError

if TYPE_CHECKING:
    from sparing.compare.sweep import Cell, Contestant, Sweep
    from sparing.loading import Drafts, ModelSpec
    from sparing.tasks import Task

DEFAULT_TASKS = "needle_single,needle_multikey,kv_retrieval,perplexity"


@click.command()
@model_options
@click.option("--methods", "method_text", default="all", show_default=True, help="Names, comma-separated.")
@click.option("--keep", "keep_text", default="0.5,0.25", show_default=True, help='Budgets: 0.25, 512 or "64MiB".')
@click.option("--tasks", "task_text", default=DEFAULT_TASKS, show_default=True, help="Names, or files of your own.")
@click.option("--lengths", default="1024", show_default=True, help="Tokens per sample, comma-separated.")
@click.option("--samples", default=10, show_default=True, type=click.IntRange(1), help="Contexts per task and length.")
@click.option("--mode", type=click.Choice(["both", "query-agnostic", "query-aware"]), default="both", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the tasks.")
@click.option("--out", default="results/compare", show_default=True, type=click.Path(path_type=Path))
def compare(
    spec: ModelSpec, method_text: str, keep_text: str, task_text: str, lengths: str, samples: int, mode: str,
    seed: int, out: Path,
) -> None:  # fmt: skip
    """Compare methods at several budgets on tasks, and write a report."""
    from sparing.compare.store import ResultStore
    from sparing.compare.sweep import Sweep
    from sparing.loading import Drafts

    drafts = Drafts(spec)
    contestants, tasks = _contestants(method_text, keep_text, drafts), _tasks(task_text)
    cells = _cells(tasks, _lengths(lengths), mode)
    if method_text == "all":
        _say_what_is_left_out()
    loaded = spec.load()
    drafts.check(loaded)
    with ResultStore(out) as store:
        if store.repaired:
            click.echo(f"{store.file}: {store.repaired}", err=True)
        sweep = Sweep(loaded, contestants, samples, seed, store)
        _leave_out_refused(sweep, cells[0], explicit=method_text != "all")
        run = {"command": shlex.join(["sparing", *sys.argv[1:]]), "seed": seed, "model": spec.name}
        run |= {"model_description": loaded.description, "samples": samples}
        _run_and_report(sweep, cells, run)


@click.command()
@model_options
@click.option("--method", "method_text", default="snapkv", show_default=True, help="See `sparing methods`.")
@click.option("--keep", "keep_text", default="0.25", show_default=True, help='A budget: 0.25, 512 or "64MiB".')
@click.option("--context", required=True, type=click.Path(path_type=Path), help="A text file.")
@click.option("--question", required=True, help="Appended to the context, on a line of its own.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--query-aware", is_flag=True, help="Let the method see the question before it drops anything.")
@click.option("--compare-full", is_flag=True, help="Answer from the full cache as well.")
def generate(
    spec: ModelSpec, method_text: str, keep_text: str, context: Path, question: str, max_new_tokens: int,
    query_aware: bool, compare_full: bool,
) -> None:  # fmt: skip
    """Answer a question about a text from a compressed cache."""
    from sparing.compare.ask import ask
    from sparing.core.budget import parse_keep
    from sparing.core.parsing import parse_method
    from sparing.loading import Drafts
    from sparing.tasks.user_files import read_text

    drafts = Drafts(spec)
    method = parse_method(method_text, parse_keep(keep_text), drafts)
    text = read_text(context, "it should hold the text that the question is about")
    if not question.strip():
        raise InvalidInputError("question", question, "some text")
    loaded = spec.load()
    drafts.check(loaded)
    ask(loaded, method, text, question, max_new_tokens, query_aware, compare_full)


def _contestants(method_text: str, keep_text: str, drafts: Drafts | None = None) -> list[Contestant]:
    """Every method at every budget; "full" may be named but always runs anyway."""
    from sparing.compare.sweep import Contestant
    from sparing.core.budget import parse_keep
    from sparing.core.method import methods as registered
    from sparing.core.parsing import parse_method, split_methods

    names = split_methods(method_text)
    if method_text == "all":
        names = [info.name for info in registered().values() if not (info.needs or info.needs_draft)]
    keeps = [parse_keep(part) for part in keep_text.split(",") if part.strip()]
    names = list(dict.fromkeys(name for name in names if name != "full"))
    if not keeps:
        raise InvalidInputError("keep", keep_text, 'at least one budget, such as "0.5,0.25"')
    return [Contestant(name, parse_method(name, keep, drafts)) for name in names for keep in dict.fromkeys(keeps)]


def _say_what_is_left_out() -> None:
    """Methods that their names alone do not make."""
    from sparing.core.method import methods as registered

    for info in registered().values():
        if info.needs_draft:
            click.echo(f"left out: {info.name} (needs a draft model: {info.name}(draft=NAME))", err=True)
        if info.needs:
            how = f"sparing calibrate --method {info.name}, then {info.name}(scores=FILE)"
            click.echo(f"left out: {info.name} (needs a measurement: {how})", err=True)


def _tasks(text: str) -> list[Task]:
    """Tasks by name or file, comma-separated."""
    from sparing import tasks

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InvalidInputError("tasks", text, "at least one of " + ", ".join(tasks.names()))
    return [task_named(part) for part in parts]


def task_named(text: str) -> Task:
    """A registered task by name; anything with a dot or a slash is a file of the user's own."""
    from sparing import tasks

    is_file = Path(text).suffix != "" or "/" in text
    return tasks.load_user_task(text) if is_file else tasks.get(text)


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidInputError("lengths", text, "whole numbers of tokens, comma-separated") from None


def _cells(tasks: list[Task], lengths: list[int], mode: str) -> list[Cell]:
    from sparing.compare.sweep import MODES, Cell

    cells = []
    for each in MODES:
        if mode in ("both", each):
            for task in tasks:
                # A text of the user's own has the length that it has.
                own: list[Any] = [None] if task.num_samples is not None else lengths
                cells += [Cell(task, each, length) for length in own]
    if not cells:
        raise InvalidInputError("lengths", "", "at least one number of tokens")
    return cells


def _leave_out_refused(sweep: Sweep, cell: Cell, explicit: bool) -> None:
    """A method that was asked for by name and cannot work is an error; of "all" it is left out, and said so."""
    refused = sweep.refusals(cell)
    for contestant, error in refused.items():
        if explicit:
            raise error
        click.echo(f"left out: {contestant.name} at {contestant.method.keep} ({error})", err=True)
    sweep.contestants = [c for c in sweep.contestants if c not in refused]


def _run_and_report(sweep: Sweep, cells: list[Cell], run: dict[str, Any]) -> None:
    """Run with a progress bar; whatever happens, what was measured is on disk and can be gone on with."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from sparing.compare.environment import environment
    from sparing.compare.report import render_report
    from sparing.compare.store import write_json_atomic, write_text_atomic
    from sparing.compare.table import render_table

    folder = sweep.store.folder
    run = {**run, **environment(), "started": _now(), "finished": None}
    write_json_atomic(folder / "run.json", run)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        todo = [cell for cell in cells if not sweep.is_done(cell)]
        job = bar.add_task("reading", total=sum(sweep.contexts(cell) for cell in todo))

        def progress(cell: Cell, done: int) -> None:
            at = f"@{cell.length}" if cell.length else ""
            bar.update(job, advance=1, description=f"{cell.task.label}{at} {cell.mode}")

        sweep.progress = progress
        sweep.run(cells)
    write_json_atomic(folder / "run.json", run | {"finished": _now()})
    if sweep.example is not None:
        write_json_atomic(folder / "examples.json", sweep.example)
    rows = sweep.store.rows()
    report = render_report(run | {"finished": _now()}, rows, _read_json(folder / "examples.json"))
    write_text_atomic(folder / "report.html", report)
    render_table(rows, Console())
    click.echo(f"report: {folder / 'report.html'}")


def _read_json(path: Path) -> Any:
    import json

    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputFileError(path, f"cannot be read ({error})", "delete it and run the command again") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


COMMANDS = (compare, generate)
