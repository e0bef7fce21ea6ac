"""Options of commands whose work can be spread over a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_CLUSTER_OPTIONS = (
    click.option("--ray", default=None, help='Work on a Ray cluster: "auto", or its address.'),
    click.option("--workers", default=None, type=click.IntRange(1), help="On Ray: how many; by default all that fit."),
    click.option("--cpus", default=1.0, show_default=True, type=click.FloatRange(0), help="On Ray: CPUs per worker."),
    click.option("--gpus", default=0.0, show_default=True, type=click.FloatRange(0), help="On Ray: GPUs per worker."),
)


def cluster_options(command: Command) -> Command:
    """Options that say where work is done; the command gets them as one `cluster`, a `Cluster`."""

    @functools.wraps(command)
    def with_cluster(ray: str | None, workers: int | None, cpus: float, gpus: float, **others: Any) -> Any:
        from sparing.errors import InvalidInputError
        from sparing.scale.pool import Cluster

        if ray is None and (workers is not None or (cpus, gpus) != (1.0, 0.0)):
            given = {"workers": workers, "cpus": cpus, "gpus": gpus}
            raise InvalidInputError("workers", given, "nothing without --ray", "add --ray auto")
        return command(cluster=Cluster(ray, workers, cpus, gpus), **others)

    for option in reversed(_CLUSTER_OPTIONS):
        with_cluster = option(with_cluster)
    return with_cluster  # type: ignore[return-value]
