"""`sparing rerank`, as typed."""

from __future__ import annotations

import json
import math

import pytest

from sparing.core.ranker import rankers
from sparing.tasks.ranking_sets import fact_set

MADE = fact_set(seed=100, documents=10, queries=1)
QUERY = MADE.queries[0]
RIGHT = MADE.grades[0].index(2)


def written(path, grades=MADE.grades[0], **more):
    rows = [{"id": f"d{i}", "text": text} | more for i, text in enumerate(MADE.documents)]
    for row, grade in zip(rows, grades, strict=False):
        row["relevance"] = grade
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def docs(tmp_path):
    return written(tmp_path / "docs.jsonl")


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_table_a_file_and_how_good_it_is(sparing, docs, tmp_path):
    out = tmp_path / "new" / "ranked.jsonl"
    done = sparing("rerank", "--query", QUERY, "--docs", docs, "--out", out)
    assert done.code == 0, done.err
    rows = lines(out)
    assert [row["rank"] for row in rows] == list(range(1, 11))
    assert sorted(row["id"] for row in rows) == sorted(f"d{i}" for i in range(10))
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert {row["id"]: row["text"] for row in rows} == {f"d{i}": text for i, text in enumerate(MADE.documents)}
    assert f"d{RIGHT}" in {row["id"] for row in rows[:2]}
    gain = sum(row["relevance"] / math.log2(row["rank"] + 1) for row in rows) / (2 + 1 / math.log2(3))
    assert f"nDCG@10: {gain:.4f}" in done.out
    table = [line.split() for line in done.out.splitlines()[1:11]]
    assert [cells[:2] for cells in table] == [[str(row["rank"]), row["id"]] for row in rows]
    assert f"ranked: {out}" in done.out
    assert [path.name for path in out.parent.iterdir()] == ["ranked.jsonl"]


def test_what_was_written_can_be_ranked_again(sparing, docs, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    assert sparing("rerank", "--query", QUERY, "--docs", docs, "--out", first).code == 0
    assert sparing("rerank", "--query", QUERY, "--docs", first, "--out", again).code == 0
    assert [row["rank"] for row in lines(again)] == list(range(1, 11))
    documents = [{row["id"]: row["text"] for row in lines(path)} for path in (docs, first, again)]
    assert documents[0] == documents[1] == documents[2]


def test_reorder_writes_the_best_at_both_ends(sparing, docs, tmp_path):
    done = sparing("rerank", "--query", QUERY, "--docs", docs, "--reorder", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert [row["rank"] for row in lines(tmp_path / "out")] == [1, 3, 5, 7, 9, 10, 8, 6, 4, 2]
    assert done.out.splitlines()[1].split()[0] == "1", "the table stays in order"


def test_a_measurement_of_heads(sparing, retrieval, docs):
    done = sparing("rerank", "--query", QUERY, "--docs", docs, "--ranker", f"qrhead(scores={retrieval},top=4)")
    assert done.code == 0, done.err
    assert f"d{RIGHT}" in done.out.splitlines()[1] + done.out.splitlines()[2]


def test_documents_that_are_not_judged(sparing, tmp_path):
    done = sparing("rerank", "--query", QUERY, "--docs", written(tmp_path / "docs", grades=()))
    assert done.code == 0, done.err
    assert "nDCG" not in done.out
    assert "relevance" not in done.out


def test_documents_of_which_none_is_relevant(sparing, tmp_path):
    done = sparing("rerank", "--query", QUERY, "--docs", written(tmp_path / "docs", grades=[0]))
    assert done.code == 0, done.err
    assert "nDCG@10: none, no document is relevant" in done.out


def test_brackets_in_documents_are_shown_as_they_are(sparing, tmp_path):
    done = sparing("rerank", "--query", QUERY, "--docs", written(tmp_path / "docs", title="[red]Sea[/red]\n[/b]"))
    assert done.code == 0, done.err
    assert "[red]Sea[/red] [/b]" in done.out


def test_help_lists_the_rankers(sparing):
    done = sparing("rerank", "--help")
    assert done.code == 0
    listed = " ".join(done.out.partition("Rankers:")[2].split())
    assert all(f"{name} " in listed and info.summary in listed for name, info in rankers().items())


BAD = {
    "no documents": ({"--docs": "missing.jsonl"}, "missing.jsonl"),
    "a bad line": ({"--docs": "bad.jsonl"}, "line 2 is not JSON"),
    "no query": ({"--query": None}, "--query"),
    "an empty query": ({"--query": " "}, "a text that is not empty"),
    "unknown ranker": ({"--ranker": "irc"}, "did you mean icr"),
    "unknown field": ({"--ranker": "icr(revers=true)"}, "did you mean reverse"),
    "qrhead without heads": ({"--ranker": "qrhead"}, "sparing score --scorer qrhead"),
    "no such scores": ({"--ranker": "qrhead(scores=missing)"}, "missing"),
    "a wide window": ({"--ranker": "first(window=30)"}, "from 2 to 26"),
    "too long": ({"--docs": "long.jsonl"}, "8192 positions"),
    "no model": ({"--model": "no/such/folder"}, "no/such/folder"),
    "reorder of nothing": ({"--reorder": "", "--out": None}, "--out"),
    "out is a folder": ({"--out": "folder"}, "folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, refused, docs, tmp_path, monkeypatch):
    given, expected = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "text": "x"}\n{"id"\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": 1, "text": "the river " * 9000}) + "\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept.txt").write_text("mine")
    options = {"--query": QUERY, "--docs": str(docs), "--out": "out.jsonl"} | given
    words = [part for option, value in options.items() if value is not None for part in (option, value) if part]
    refused(tmp_path, expected, "rerank", *words)
