"""One item = one task, in this process by default, on a Ray cluster when asked; the same results either way.

A worker is made once per process (it loads its model there) and then given items. On Ray each worker is an actor with
its share of CPUs and GPUs; results stream to the driver in the order in which they are ready, and an item whose worker
was lost is given to a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from sparing.errors import InvalidInputError, MissingExtraError, WorkerLostError

Item = TypeVar("Item")
Result = TypeVar("Result")

# How often an item is tried on a fresh worker before it is given up: it may be what kills them.
ATTEMPTS = 3


def run_tasks(
    make_worker: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    *,
    ray: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) as results come; items are read as they are needed.

    Args:
        make_worker: makes the function that does the work; on Ray it is sent to every worker and called there once.
        ray: None for this process, "auto" for the cluster that this machine belongs to (a local one is started if
            there is none), or the address of a cluster.
        workers: how many on Ray; by default as many as the cluster's CPUs (or GPUs) allow.
        cpus, gpus: what one worker needs.

    Raises:
        MissingExtraError: Ray was asked for and is not installed. InvalidInputError: no cluster at the address, or
            none that a worker fits into. WorkerLostError: an item's worker was lost three times. What `make_worker`
            and the work itself raise comes through.
    """
    if ray is None:
        work = make_worker()
        for item in items:
            yield item, work(item)
        return
    yield from _on_ray(make_worker, iter(items), ray, workers, cpus, gpus)


def _on_ray(
    make_worker: Callable[[], Callable[[Item], Result]],
    items: Iterator[Item],
    address: str,
    workers: int | None,
    cpus: float,
    gpus: float,
) -> Iterator[tuple[Item, Result]]:
    ray, started_here = _connect(address)

    class Worker:
        work: Callable[[Item], Result] | None = None

        def run(self, item: Item) -> Result:
            # Not in the constructor: an error there would be a lost worker to Ray.
            self.work = self.work or make_worker()
            return self.work(item)

    actor = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus)
    count = workers or _room(ray, cpus, gpus)
    running: dict[Any, tuple[Any, Item, int]] = {}
    try:
        for item in _first(items, count):
            made = actor.remote()
            running[made.run.remote(item)] = (made, item, 1)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            made, item, tries = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                if tries >= ATTEMPTS:
                    raise WorkerLostError(str(item)[:80], tries) from error
                made = actor.remote()
                running[made.run.remote(item)] = (made, item, tries + 1)
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            following = next(items, None)
            if following is not None:
                running[made.run.remote(following)] = (made, following, 1)
            yield item, result
    finally:
        for made, _, _ in running.values():
            ray.kill(made)
        if started_here:
            ray.shutdown()


def _connect(address: str) -> tuple[Any, bool]:
    """Ray, connected, and whether that was done here."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("Ray", "ray") from error
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    try:
        if address == "auto":
            ray.init(include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        allowed = f'"auto", or the address of a running cluster ({str(error).splitlines()[0]})'
        raise InvalidInputError("ray", address, allowed, "start one with `ray start --head`") from error
    return ray, True


def _room(ray: Any, cpus: float, gpus: float) -> int:
    """Workers that fit into the cluster."""
    there = ray.cluster_resources()
    rooms = [int(there.get(kind, 0) / each) for kind, each in (("CPU", cpus), ("GPU", gpus)) if each]
    room = min(rooms, default=1)
    if room < 1:
        allowed = f"at most {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, what the cluster has"
        fix = "say how many workers there are to be if the cluster grows by itself"
        raise InvalidInputError("a worker's share", f"{cpus:g} CPUs and {gpus:g} GPUs", allowed, fix)
    return room


def _first(items: Iterator[Item], count: int) -> Iterator[Item]:
    for _ in range(count):
        item = next(items, None)
        if item is None:
            return
        yield item
