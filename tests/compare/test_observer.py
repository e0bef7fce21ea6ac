"""Observations: each context is read once, whoever asks, and what came of it outlives interruptions."""

from __future__ import annotations

import json
import time

import pytest

import sparing
from sparing.compare import worker
from sparing.compare.cells import GATE, Cell, Contestant, cells_of
from sparing.compare.forecast import look_ahead
from sparing.compare.observer import Observer
from sparing.compare.store import ResultStore
from sparing.compare.sweep import Sweep
from sparing.errors import InvalidInputError, MethodRefusedError, UnsupportedModelError
from sparing.loading import ModelSpec
from sparing.tasks import registry

SNAPKV, KNORM = Contestant("snapkv", 0.5), Contestant("knorm", 0.25)
TIMES = ("prefill_s", "decode_s_per_token", "peak_rss_bytes")


def cells(contexts=(0, 1, 2), tasks=("needle_single",)):
    return [Cell(registry.get(task), "query-agnostic", 128, tuple(contexts)) for task in tasks]


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(name="read")
def contexts_read(monkeypatch):
    """Every job that a worker does: (context, names of its readers)."""
    read, run = [], worker.ContextWorker._run

    def noted(self, job):
        read.append((job.index, [contestant.name for contestant in job.readers]))
        return run(self, job)

    monkeypatch.setattr(worker.ContextWorker, "_run", noted)
    return read


def test_a_context_is_read_once_by_everybody_who_has_not_read_it(tmp_path, read):
    with Observer(ModelSpec(), cells(), 0, tmp_path) as observer:
        observer.introduce([SNAPKV, KNORM])
        observer.observe([(0, 0, [SNAPKV]), (0, 1, [SNAPKV])])
        observer.observe([(0, index, [SNAPKV, KNORM]) for index in (0, 1, 2)])
        observer.observe([(0, index, [SNAPKV, KNORM]) for index in (0, 1, 2)])
    one, both = ["full", "knorm"], ["full", "snapkv", "knorm"]
    assert read == [(0, ["full", "snapkv"]), (1, ["full", "snapkv"]), (0, one), (1, one), (2, both)]


def test_everybody_is_introduced_once_and_a_refusal_is_remembered(tmp_path, monkeypatch):
    met, introduce = [], worker.ContextWorker._introduce

    def slow(self, item):
        met.extend(contestant.name for contestant in item.contestants)
        time.sleep(0.2)
        return introduce(self, item)

    def refuse(engine, *_):
        raise MethodRefusedError("knorm", "is refused here")

    monkeypatch.setattr(worker.ContextWorker, "_introduce", slow)
    with Observer(ModelSpec(), cells(), 0, tmp_path) as observer:
        assert observer.introduce([SNAPKV]) == {}
        ready = observer.ready
        with monkeypatch.context() as patch:
            patch.setattr(worker.Engine, "compress", refuse)
            first = observer.introduce([SNAPKV, KNORM])
        assert list(first) == [KNORM]
        assert observer.introduce([SNAPKV, KNORM]) == first
        assert observer.introduce([SNAPKV]) == {}
        assert observer.ready == ready
        assert look_ahead(observer, [SNAPKV]).ready == ready > 0.2, "the first time, when the model was loaded"
    assert met == ["full", "snapkv", "knorm"]


def test_the_example_is_kept_when_its_context_is_read_whoever_reads_it_first(tmp_path):
    """Also by a plan, or before an interruption: the context is not read again."""

    def shown():
        return json.loads((tmp_path / "examples.json").read_text())

    with Observer(ModelSpec(), cells(), 0, tmp_path) as observer:
        look_ahead(observer, [SNAPKV])
        before = shown()
        assert set(before["methods"]) == {"snapkv"}
        observer.introduce([KNORM])
        observer.observe([(0, 0, [KNORM])], show=(0, 0))
    assert shown() | {"methods": None} == before | {"methods": None}
    assert set(shown()["methods"]) == {"snapkv", "knorm"}
    assert shown()["methods"]["snapkv"] == before["methods"]["snapkv"]
    with Observer(ModelSpec(), cells(), 1, tmp_path) as observer:
        look_ahead(observer, [KNORM])
    assert set(shown()["methods"]) == {"knorm"}, "another seed, another text"


def test_what_was_interrupted_goes_on_at_the_first_missing_context(tmp_path, read):
    def stop(cell):
        raise KeyboardInterrupt

    with Observer(ModelSpec(), cells(), 0, tmp_path, progress=stop) as observer, ResultStore(tmp_path) as store:
        observer.introduce([SNAPKV])
        with pytest.raises(KeyboardInterrupt):
            Sweep(observer, [SNAPKV], store).run()
        assert store.rows() == []
    with Observer(ModelSpec(), cells(), 0, tmp_path) as observer, ResultStore(tmp_path) as store:
        observer.introduce([SNAPKV])
        Sweep(observer, [SNAPKV], store).run()
        rows = store.rows()
    assert [index for index, _ in read] == [0, 1, 2]
    with Observer(ModelSpec(), cells(), 0, tmp_path / "whole") as observer, ResultStore(tmp_path / "whole") as store:
        observer.introduce([SNAPKV])
        Sweep(observer, [SNAPKV], store).run()
        assert untimed(store.rows()) == untimed(rows)


def test_another_seed_or_budget_is_another_observation(tmp_path, read):
    for seed, contestant in ((0, SNAPKV), (1, SNAPKV), (0, Contestant("snapkv", 0.25))):
        with Observer(ModelSpec(), cells([0]), seed, tmp_path) as observer:
            observer.introduce([contestant])
            assert not observer.has(contestant, 0, 0)
            observer.observe([(0, 0, [contestant])])
    assert len(read) == 3


def test_a_method_made_in_python_is_what_its_text_makes(tmp_path):
    made = Contestant.of("by hand", sparing.SnapKV(keep=0.5))
    with Observer(ModelSpec(), cells([0]), 0, tmp_path) as observer:
        observer.introduce([made, SNAPKV])
        assert observer.parameters(made) == observer.parameters(SNAPKV) == repr(sparing.SnapKV(keep=0.5))
        observer.observe([(0, 0, [made])])
        assert observer.has(SNAPKV, 0, 0)


def test_text_that_is_no_method_is_an_error_of_the_introduction(tmp_path):
    rotated = Contestant("snapkv & snapkv", 0.5)
    with Observer(ModelSpec(), cells([0]), 0, tmp_path) as observer, pytest.raises(MethodRefusedError):
        observer.introduce([SNAPKV, rotated])


def test_a_cell_that_is_too_long_is_refused_before_anything_is_read(tmp_path, read):
    long = [*cells([0]), Cell(registry.get("needle_single"), "query-aware", 100_000, (0,))]
    with Observer(ModelSpec(), long, 0, tmp_path) as observer, pytest.raises(InvalidInputError, match="at most"):
        observer.introduce([SNAPKV])
    assert read == []


def test_a_plan_reads_one_context_of_each_cell_and_keeps_it(tmp_path, read):
    with Observer(ModelSpec(), cells(range(5), ("needle_single", "kv_retrieval")), 0, tmp_path) as observer:
        outlook = look_ahead(observer, [SNAPKV])
        assert [index for index, _ in read] == [0, 0]
        assert len(outlook.seconds) == 8
        assert outlook.seconds[:4] == [outlook.seconds[0]] * 4
        alone, crowd = outlook.on(1), outlook.on(100)
        assert alone.seconds == pytest.approx(outlook.ready + sum(outlook.seconds))
        assert (crowd.workers, crowd.seconds) == (8, outlook.ready + max(outlook.seconds))
        assert [each.workers for each in outlook.choices()] == [1, 2, 4, 8]
        # Two more have been read, so six are left.
        assert len(look_ahead(observer, [SNAPKV]).seconds) == 6
        assert observer.left([SNAPKV]) == [[2, 3, 4]] * 2
        assert observer.left([]) == [[]] * 2


def test_a_plan_of_the_full_cache_alone(tmp_path):
    with Observer(ModelSpec(), cells(range(3)), 0, tmp_path) as observer:
        assert len(look_ahead(observer, []).seconds) == 2


def test_cells_of_a_file_have_the_contexts_that_it_has(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f'{{"context": "c {i}", "question": "q", "answers": "a"}}\n' for i in range(3)))
    from sparing.tasks import load_user_task

    found = cells_of([load_user_task(file), registry.get("needle_single")], ["query-aware"], [64, 128], 5)
    assert [(cell.length, len(cell.contexts)) for cell in found] == [(None, 3), (64, 5), (128, 5)]
    assert cells_of([load_user_task(file)], ["query-aware"], [], 5), "a file has lengths of its own"
    with pytest.raises(InvalidInputError, match="at least one number of tokens"):
        cells_of([registry.get("needle_single")], ["query-aware"], [], 5)
    assert GATE.is_full
    assert not SNAPKV.is_full


def test_a_model_that_is_none_leaves_no_folder(tmp_path):
    nothing = ModelSpec("no/such/folder")
    with Observer(nothing, cells([0]), 0, tmp_path / "out") as observer, pytest.raises(UnsupportedModelError):
        observer.introduce([SNAPKV])
    assert list(tmp_path.iterdir()) == []
