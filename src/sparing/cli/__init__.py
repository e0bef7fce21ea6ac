"""The command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys

import click

import sparing
from sparing.cli import acting, calibrating, comparing, generating, listing, measuring, reranking, serving, tuning
from sparing.errors import OutputError, SparingError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sparing.__version__, prog_name="sparing")
def cli() -> None:
    """Find what matters in a transformer's context, and keep only that."""


for module in (comparing, tuning, generating, listing, measuring, calibrating, acting, reranking, serving):
    for command in module.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Entry point: errors that we raise on purpose become one line and exit code 2, never a traceback."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\ninterrupted; what was measured is kept, and the same command goes on from there", err=True)
        sys.exit(130)
    except SparingError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"error: {OutputError(error.filename or 'output', str(error.strerror or error))}", err=True)
        sys.exit(2)
