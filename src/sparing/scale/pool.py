"""One item = one task, in this process by default, on a Ray cluster when asked; the same results either way.

A worker is made once per process (it loads its model there) and then given items, also those of later runs. On Ray
each worker is an actor with its share of CPUs and GPUs; results stream to the driver in the order in which they are
ready, and an item whose worker was lost is given to a new one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from sparing.errors import InvalidInputError, MissingExtraError, WorkerLostError

Item = TypeVar("Item")
Result = TypeVar("Result")

# How often an item is tried on a fresh worker before it is given up: it may be what kills them.
ATTEMPTS = 3


@dataclass(frozen=True)
class Cluster:
    """Where work is done.

    Attributes:
        ray: None for this process, "auto" for the cluster that this machine belongs to (a local one is started if
            there is none), or the address of a cluster.
        workers: how many on Ray; by default as many as the cluster's CPUs (or GPUs) allow.
        cpus, gpus: what one worker needs.
    """

    ray: str | None = None
    workers: int | None = None
    cpus: float = 1
    gpus: float = 0


class Pool(Generic[Item, Result]):
    """Workers that are made when the first item comes, and kept until the block is left.

    Args:
        make_worker: makes the function that does the work; on Ray it is sent to every worker and called there once.
        cluster: where.

    Raises:
        MissingExtraError: Ray was asked for and is not installed. InvalidInputError: no cluster at the address, or
            none that a worker fits into. WorkerLostError: an item's worker was lost three times. What `make_worker`
            and the work itself raise comes through.
    """

    def __init__(self, make_worker: Callable[[], Callable[[Item], Result]], cluster: Cluster | None = None) -> None:
        self.cluster = cluster or Cluster()
        self._make_worker = make_worker
        self._work: Callable[[Item], Result] | None = None
        self._ray: Any = None
        self._started_ray = False
        self._idle: list[Any] = []

    def __enter__(self) -> Pool[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work = None
        for worker in self._idle:
            self._ray.kill(worker)
        self._idle = []
        if self._started_ray:
            self._ray.shutdown()
            self._started_ray = False

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) as results come; items are read as they are needed."""
        if self.cluster.ray is not None:
            yield from self._on_ray(self.cluster.ray, iter(items))
            return
        for item in items:
            self._work = self._work or self._make_worker()
            yield item, self._work(item)

    def _on_ray(self, address: str, items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        if self._ray is None:
            self._ray, self._started_ray = _connect(address)
        size = self.cluster.workers or _room(self._ray, self.cluster)
        running: dict[Any, tuple[Any, Item, int]] = {}

        def start(item: Item, worker: Any = None, tries: int = 1) -> None:
            worker = worker or (self._idle.pop() if self._idle else self._new_worker())
            running[worker.run.remote(item)] = (worker, item, tries)

        try:
            for item in itertools.islice(items, size):
                start(item)
            while running:
                (ready,), _ = self._ray.wait(list(running), num_returns=1)
                worker, item, tries = running.pop(ready)
                try:
                    result = self._ray.get(ready)
                except self._ray.exceptions.RayActorError as error:
                    if tries >= ATTEMPTS:
                        raise WorkerLostError(str(item)[:80], tries) from error
                    start(item, tries=tries + 1)
                    continue
                except self._ray.exceptions.RayTaskError as error:
                    self._idle.append(worker)
                    raise error.cause from error
                following = next(items, None)
                if following is None:
                    self._idle.append(worker)
                else:
                    start(following, worker)
                yield item, result
        finally:
            for worker, _, _ in running.values():  # busy with what nobody waits for any more
                self._ray.kill(worker)

    def _new_worker(self) -> Any:
        make_worker = self._make_worker

        class Worker:
            work: Callable[[Item], Result] | None = None

            def run(self, item: Item) -> Result:
                # Not in the constructor: an error there would be a lost worker to Ray.
                self.work = self.work or make_worker()
                return self.work(item)

        actor = self._ray.remote(Worker).options(num_cpus=self.cluster.cpus, num_gpus=self.cluster.gpus)
        return actor.remote()


def run_tasks(
    make_worker: Callable[[], Callable[[Item], Result]], items: Iterable[Item], cluster: Cluster | None = None
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) as results come, from workers that are gone afterwards. See `Pool`."""
    with Pool(make_worker, cluster) as pool:
        yield from pool.run(items)


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


def _room(ray: Any, cluster: Cluster) -> int:
    """Workers that fit into the cluster."""
    there = ray.cluster_resources()
    asked = (("CPU", cluster.cpus), ("GPU", cluster.gpus))
    room = min((int(there.get(kind, 0) / each) for kind, each in asked if each), default=1)
    if room < 1:
        allowed = f"at most {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, what the cluster has"
        fix = "say how many workers there are to be if the cluster grows by itself"
        raise InvalidInputError("a worker's share", f"{cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs", allowed, fix)
    return room
