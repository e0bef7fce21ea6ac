"""A sweep with a method that reads a part: its rows say how much, and that nothing was freed."""

from __future__ import annotations

from pathlib import Path

import sparing
from sparing.compare.cells import Cell, Contestant
from sparing.compare.observer import Observer
from sparing.compare.store import ResultStore
from sparing.compare.sweep import Sweep
from sparing.loading import ModelSpec
from sparing.tasks import registry


def test_rows_say_what_was_read(tmp_path: Path) -> None:
    methods = {"quest": sparing.Quest(keep=0.25), "snapkv": sparing.SnapKV(keep=0.25)}
    cells = [Cell(registry.get(task), "query-agnostic", 256, (0,)) for task in ("needle_single", "perplexity")]
    contestants = [Contestant.of(name, method) for name, method in methods.items()]
    with ResultStore(tmp_path) as store, Observer(ModelSpec(), cells, 0, tmp_path) as observer:
        observer.introduce(contestants)
        Sweep(observer, contestants, store).run()
        rows = store.rows()
    assert len(rows) == 6
    for row in rows:
        if row["method"] == "quest":
            assert 0.24 < row["read_share"] < 0.26
            # Two numbers of every channel per page of 16 keys, beside the keys themselves.
            assert 1 < row["bytes_kept"] / row["bytes_full"] < 1.08
        else:
            assert row["read_share"] is None
