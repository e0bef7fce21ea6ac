"""The pool: the same results in this process and on Ray, whatever happens to workers.

What goes to Ray is made inside functions: functions of this module are not importable in a worker.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparing.adapters.lens import ModelLens
from sparing.compare.store import read_rows
from sparing.core.scores import Scores
from sparing.corpus import score_corpus
from sparing.errors import InputFileError, InvalidInputError, MissingExtraError, WorkerLostError
from sparing.loading import ModelSpec
from sparing.models import resolve
from sparing.scale.pool import ATTEMPTS, Cluster, Pool, run_tasks


def squares(log=None):
    """Makes workers that square; every making and every task is written to a file, if one is given."""

    def note(what):
        if log is not None:
            with open(log, "a") as lines:
                lines.write(f"{what}\n")

    def make_worker():
        note("made")

        def square(item):
            note(item)
            return item * item

        return square

    return make_worker


def failing(bad):
    def make_worker():
        def work(item):
            if item == bad:
                raise InputFileError("shard.jsonl", f"item {item} is torn", "mend it")
            return item

        return work

    return make_worker


# -- in this process ---------------------------------------------------------------------------------------------------


def test_every_item_in_its_order():
    assert list(run_tasks(squares(), range(20))) == [(item, item * item) for item in range(20)]


def test_no_items_no_results():
    assert list(run_tasks(squares(), [])) == []


def test_the_worker_is_made_once_and_items_are_read_as_they_are_needed(tmp_path):
    log = tmp_path / "log"
    read = []

    def items():
        for item in range(5):
            read.append(item)
            yield item

    results = run_tasks(squares(log), items())
    assert next(results) == (0, 0)
    assert read == [0]
    assert list(results) == [(item, item * item) for item in range(1, 5)]
    assert log.read_text().split() == ["made", "0", "1", "2", "3", "4"]


def test_an_error_of_the_work_comes_through_after_the_results_before_it():
    results = run_tasks(failing(bad=2), range(5))
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(InputFileError, match="item 2 is torn"):
        next(results)


def test_an_error_of_making_the_worker_comes_through():
    def make_worker():
        raise InputFileError("model", "is not there")

    with pytest.raises(InputFileError, match="is not there"):
        list(run_tasks(make_worker, [1]))


def test_ray_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sparing\[ray\]"'):
        list(run_tasks(squares(), [1], Cluster("auto")))


def test_an_address_that_is_none_is_refused():
    pytest.importorskip("ray", reason="the extra sparing[ray] is not installed")
    with pytest.raises(InvalidInputError, match="ray: got 'nonsense'"):
        list(run_tasks(squares(), [1], Cluster("nonsense")))


# -- on Ray ------------------------------------------------------------------------------------------------------------


def test_a_cluster_that_the_pool_started_is_taken_down_again(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not one that this machine belongs to
    module = pytest.importorskip("ray", reason="the extra sparing[ray] is not installed")
    assert not module.is_initialized()
    results = run_tasks(squares(), range(3), Cluster("auto", workers=1))
    assert next(results) == (0, 0)
    assert module.is_initialized()
    results.close()
    assert not module.is_initialized()


def test_ray_gives_what_this_process_gives(ray, tmp_path):
    log = tmp_path / "log"
    found = sorted(run_tasks(squares(log), range(20), Cluster("auto")))
    assert found == list(run_tasks(squares(), range(20)))
    done = log.read_text().split()
    assert done.count("made") == 2, "one worker for each of the two CPUs"
    assert sorted(int(item) for item in done if item != "made") == list(range(20)), "nothing twice"
    assert ray.is_initialized(), "a cluster that was there stays"


def test_fewer_items_than_workers_and_none_at_all(ray):
    assert list(run_tasks(squares(), [3], Cluster("auto", workers=2))) == [(3, 9)]
    assert list(run_tasks(squares(), [], Cluster("auto"))) == []


def test_one_worker_keeps_the_order(ray):
    assert list(run_tasks(squares(), range(6), Cluster("auto", workers=1))) == [(i, i * i) for i in range(6)]


def test_items_are_read_as_they_are_needed_on_ray(ray):
    """Two are running, and one follows each that has been done."""
    read = []

    def items():
        for item in range(100):
            read.append(item)
            yield item

    results = run_tasks(squares(), items(), Cluster("auto", workers=2))
    next(results)
    assert len(read) == 3
    results.close()


def test_an_error_of_the_work_is_the_same_on_ray(ray):
    """With its own type and one-line message; where it happened in the worker is its cause."""
    with pytest.raises(InputFileError) as caught:
        list(run_tasks(failing(bad=2), range(5), Cluster("auto", workers=1)))
    assert str(caught.value) == "shard.jsonl: item 2 is torn; mend it"
    assert type(caught.value) is InputFileError
    assert "in work" in "".join(traceback.format_exception(caught.value))


def test_an_error_of_making_the_worker_is_no_lost_worker(ray):
    def make_worker():
        raise InputFileError("model", "is not there")

    with pytest.raises(InputFileError, match="is not there"):
        list(run_tasks(make_worker, [1], Cluster("auto")))


def test_an_error_of_reading_items_comes_through_and_frees_the_workers(ray):
    def items():
        yield from range(3)
        raise InputFileError("shard.jsonl", "line 4 is no JSON")

    with pytest.raises(InputFileError, match="line 4"):
        list(run_tasks(squares(), items(), Cluster("auto", workers=2)))
    # Both CPUs are free again, or this would wait for ever.
    assert len(list(run_tasks(squares(), range(4), Cluster("auto", workers=2)))) == 4


def test_a_worker_that_dies_once_costs_nothing_but_time(ray, tmp_path):
    """Item 1 kills the first process that is given it, as the system does when memory runs out."""
    died = tmp_path / "died"

    def make_worker():
        def work(item):
            if item == 1 and not died.exists():
                died.touch()
                os._exit(1)
            return item * item

        return work

    found = sorted(run_tasks(make_worker, range(4), Cluster("auto", workers=2)))
    assert died.exists()
    assert found == [(item, item * item) for item in range(4)]


def test_an_item_that_kills_every_worker_is_named(ray, tmp_path):
    log = tmp_path / "log"

    def make_worker():
        def work(item):
            if item == "poison":
                with open(log, "a") as lines:
                    lines.write("x")
                os._exit(1)
            return item

        return work

    found = []
    with pytest.raises(WorkerLostError, match=f"poison was lost {ATTEMPTS} times") as caught:
        found.extend(run_tasks(make_worker, ["fine", "poison"], Cluster("auto", workers=1)))
    assert found == [("fine", "fine")], "what was done before is kept"
    assert caught.value.tries == ATTEMPTS
    assert log.read_text() == "x" * ATTEMPTS


@pytest.mark.slow
def test_a_corpus_scored_on_ray_has_the_rows_of_one_scored_here(ray, tmp_path):
    measured = score_of_first_head()
    data = tmp_path / "web.jsonl"
    texts = [f"The magic number of river {i} is {i * 37}. " * (1 + i % 3) for i in range(12)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = {}
    for name, cluster in (("here", Cluster()), ("ray", Cluster("auto", workers=2))):
        sizes = {"top": 1, "max_tokens": 32, "batch_tokens": 64}
        assert score_corpus(ModelSpec(), measured, [data], tmp_path / name, **sizes, cluster=cluster) == 12
        rows[name] = sorted(read_rows(tmp_path / name), key=lambda row: row["key"])
    assert rows["ray"] == rows["here"]


def score_of_first_head():
    model = AutoModelForCausalLM.from_pretrained(resolve("bundled"))
    values = torch.zeros(4, 4)
    values[2, 0] = 1.0
    return Scores(values, ("layer", "head"), "by hand", ModelLens(model).identity)


def test_workers_are_kept_from_run_to_run(ray, tmp_path):
    log = tmp_path / "log"
    with Pool(squares(log), Cluster("auto", workers=2)) as pool:
        for _ in range(3):
            assert sorted(pool.run(range(4))) == [(item, item * item) for item in range(4)]
    assert log.read_text().split().count("made") == 2
    # They are gone with the block, or this would wait for ever.
    assert len(list(run_tasks(squares(), range(4), Cluster("auto", workers=2)))) == 4


def test_a_run_that_is_left_early_leaves_a_pool_that_works(ray):
    with Pool(squares(), Cluster("auto", workers=2)) as pool:
        results = pool.run(range(100))
        next(results)
        results.close()
        assert sorted(pool.run(range(4))) == [(item, item * item) for item in range(4)]


def test_workers_that_fit_nowhere_are_refused_instead_of_waited_for(ray):
    with pytest.raises(InvalidInputError, match="2 CPUs and 0 GPUs"):
        list(run_tasks(squares(), [1], Cluster("auto", gpus=1)))
    with pytest.raises(InvalidInputError, match="3 CPUs"):
        list(run_tasks(squares(), [1], Cluster("auto", cpus=3)))
