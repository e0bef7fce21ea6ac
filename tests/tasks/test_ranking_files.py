"""Files of documents to be ranked, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from sparing.errors import InputFileError
from sparing.tasks.ranking_files import GivenDocument, load_documents

GOOD = {"id": "a", "text": "the river"}


def written(tmp_path, *rows):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_documents_in_order(tmp_path):
    path = written(
        tmp_path, GOOD, "", {"id": 7, "text": "ships", "title": "Sea", "relevance": 1.5, "source": "elsewhere"},
        {"id": "7", "text": "ü", "title": "", "relevance": None},
    )  # fmt: skip
    found = load_documents(path)
    assert found == [GivenDocument("a", "the river"), GivenDocument(7, "ships", "Sea", 1.5), GivenDocument("7", "ü")]
    assert [document.content for document in found] == ["the river", "Sea\nships", "ü"]
    assert found[1].row == {"id": 7, "text": "ships", "title": "Sea", "relevance": 1.5}
    assert found[0].row == GOOD


BAD = {
    "no json": ("{", "is not JSON"),
    "nested": ("[" * 100_000, "is not JSON"),
    "a list": ("[1]", "not a JSON object"),
    "no id": ({"text": "x"}, "the id None"),
    "an empty id": (GOOD | {"id": ""}, "the id ''"),
    "an id that is true": (GOOD | {"id": True}, "the id True"),
    "an id that is a list": (GOOD | {"id": ["x"]}, "the id"),
    "no text": ({"id": "x"}, "the text None"),
    "a blank text": ({"id": "x", "text": "  "}, "with words in it"),
    "a text that is a number": ({"id": "x", "text": 5}, "the text 5"),
    "a title that is a number": (GOOD | {"id": "x", "title": 5}, "the title 5"),
    "a relevance that is a word": (GOOD | {"id": "x", "relevance": "high"}, "the relevance 'high'"),
    "a relevance below 0": (GOOD | {"id": "x", "relevance": -1}, "the relevance -1"),
    "a relevance that is true": (GOOD | {"id": "x", "relevance": True}, "the relevance True"),
    "a relevance that is no number": ('{"id": "x", "text": "y", "relevance": NaN}', "the relevance nan"),
    "a relevance without end": ('{"id": "x", "text": "y", "relevance": 1e999}', "the relevance inf"),
    "a relevance beyond floats": (GOOD | {"id": "x", "relevance": 10**400}, "the relevance 1000"),
    "half a character": ('{"id": "x", "text": "\\ud800"}', "half a character"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(name, tmp_path):
    row, expected = BAD[name]
    with pytest.raises(InputFileError, match="line 3 ") as refused:
        load_documents(written(tmp_path, GOOD, "", row))
    assert expected in str(refused.value)


def test_an_id_twice_names_both_lines(tmp_path):
    with pytest.raises(InputFileError, match="lines 1 and 3 have the same id 'a'"):
        load_documents(written(tmp_path, GOOD, GOOD | {"id": "b"}, GOOD))


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(InputFileError, match="cannot be read"):
        load_documents(tmp_path / "missing.jsonl")
    with pytest.raises(InputFileError, match="is empty"):
        load_documents(written(tmp_path, "", " "))
