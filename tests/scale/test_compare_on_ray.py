"""A comparison on a local cluster of two workers has the rows of one in this process, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sparing.compare.cells import Cell, Contestant
from sparing.compare.observer import Observer
from sparing.compare.store import ResultStore
from sparing.compare.sweep import Sweep
from sparing.errors import UnknownNameError
from sparing.loading import ModelSpec
from sparing.scale.pool import Cluster
from sparing.tasks import registry

CONTESTANTS = [Contestant("snapkv", 0.5), Contestant("keydiff+adaptive", 0.25), Contestant("xattention & knorm", 0.5)]
CELLS = [Cell(registry.get(task), "query-agnostic", 128, (0, 1, 2)) for task in ("needle_single", "perplexity")]
TIMES = ("prefill_s", "decode_s_per_token", "peak_rss_bytes")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray")]


def swept(folder, cluster, progress=lambda cell: None):
    """Rows without times."""
    with Observer(ModelSpec(), CELLS, 0, folder, cluster, progress) as observer, ResultStore(folder) as store:
        observer.introduce(CONTESTANTS)
        Sweep(observer, CONTESTANTS, store).run()
        return [{name: value for name, value in row.items() if name not in TIMES} for row in store.rows()]


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def our_workers():
    """Ids of the actors' processes of this process's own cluster."""
    found = []
    for each in filter(str.isdigit, os.listdir("/proc")):
        try:
            is_worker = b"ray::Worker" in Path(f"/proc/{each}/cmdline").read_bytes()
            if is_worker and parent(parent(each)) == os.getpid():
                found.append(int(each))
        except OSError:  # it ended meanwhile
            continue
    return found


def test_rows_are_the_same_in_this_process_on_ray_and_when_a_worker_is_killed(tmp_path):
    killed = []

    def kill_one(cell):
        if not killed:
            killed.extend(our_workers()[:1])
            os.kill(killed[0], signal.SIGKILL)

    here = swept(tmp_path / "here", Cluster())
    assert swept(tmp_path / "ray", Cluster("auto", workers=2)) == here
    assert swept(tmp_path / "killed", Cluster("auto", workers=2), kill_one) == here
    assert killed, "no worker was killed, so nothing was shown"
    assert len(here) == 8


def test_a_driver_that_was_stopped_goes_on_where_it_was(tmp_path):
    count = 0

    def stop(cell):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, Cluster("auto", workers=2), stop)
    count = -100
    rows = swept(tmp_path, Cluster("auto", workers=2), stop)
    assert count == -100 + 4, "six contexts, of which two had been read"
    assert [row["n"] for row in rows] == [3] * 8


def test_an_error_in_a_worker_has_its_own_type_here(tmp_path):
    with (
        Observer(ModelSpec(), CELLS, 0, tmp_path, Cluster("auto", workers=1)) as observer,
        pytest.raises(UnknownNameError, match="snapkv"),
    ):
        observer.introduce([Contestant("snapvk", 0.5)])


def test_a_tuning_on_ray_finds_what_one_here_finds(tmp_path):
    pytest.importorskip("optuna", reason="the extra sparing[tune] is not installed")
    from sparing.tune import Request, tune

    found = []
    for name, cluster in (("here", Cluster()), ("ray", Cluster("auto", workers=2))):
        outcome = tune(
            ModelSpec(), [("needle_single", registry.get("needle_single"))], Request(memory=0.6), tmp_path / name,
            methods=["knorm", "kvzip"], lengths=(128,), samples=4, trials=4, cluster=cluster,
        )  # fmt: skip
        found.append([(held.contestant, held.loss, held.bytes_kept) for _, held in outcome.finalists])
    assert found[0] == found[1]
    assert found[0]
