"""Samples of the user's own for scorers of heads: good files, and bad ones refused with the line."""

from __future__ import annotations

import json

import pytest

from sparing.errors import InputFileError, InvalidInputError
from sparing.tasks.probe_files import load_samples
from tests.tasks.letters import Letters

PAIR = {"clean": "Ada is in Rome", "corrupt": "Eve is in Rome", "answer": " Italy", "wrong": " France"}
RANKING = {"query": "Who?", "documents": ["Ada came.", "It rained."], "gold": [0]}


@pytest.fixture
def load(tmp_path):
    """Return a function that writes rows (objects or lines) to a file and loads it."""

    def load(kind, *rows, name="mine.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return load_samples(kind, path, Letters())

    return load


def text_of(ids):
    return bytes(token for token in ids if token < 256).decode()


def test_plain_text_is_one_sample(load):
    [sample] = load("text", "Ada came.", "Then she left.", name="notes.txt")
    assert sample.ids[0] == 256
    assert text_of(sample.ids) == "Ada came.\nThen she left."
    assert sample.response == 0


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.NDJSON", "mine.json"])
def test_texts_with_and_without_a_response(load, name):
    whole, split = load("text", {"text": "Ada came."}, "", {"text": "Who?", "response": " Ada."}, name=name)
    assert text_of(whole.ids) == "Ada came."
    assert whole.response == 0
    assert text_of(split.ids) == "Who? Ada."
    assert text_of(split.ids[split.response :]) == " Ada."


def test_line_separators_inside_a_text_are_text(load):
    [sample] = load("text", {"text": "a\u2028b\x85c"})
    assert text_of(sample.ids) == "a\u2028b\x85c"


def test_needles_are_files_as_for_compare(load):
    row = {"context": "Ada came on Monday.", "question": ["Who?", "When?"], "answers": ["Ada", "Monday"]}
    who, when = load("needle", row)
    assert text_of(who.ids[slice(*who.value)]) == "Ada"
    assert text_of(when.ids[slice(*when.value)]) == " Monday"
    with pytest.raises(InvalidInputError, match="word for word"):
        load("needle", row | {"answers": ["Ada", "Friday"]})
    with pytest.raises(InputFileError, match="line 2 lacks answers"):
        load("needle", row, {"context": "a", "question": "b"})


def test_pairs(load):
    [sample] = load("pair", PAIR | {"answer": "Italy", "wrong": "France"})
    assert text_of(sample.clean) == PAIR["clean"]
    assert text_of(sample.corrupt) == PAIR["corrupt"]
    assert sample.changed == (1, 2, 3)
    assert (sample.answer, sample.wrong) == (ord("I"), ord("F"))
    [sample] = load("pair", PAIR | {"wrong": "\n"})
    assert (sample.answer, sample.wrong) == (ord(" "), ord("\n"))


def test_rankings(load):
    [sample] = load("ranking", RANKING)
    assert [text_of(sample.ids[slice(*span)]) for span in sample.documents] == [" Ada came.", " It rained."]
    assert sample.gold == (0,)


BAD = [
    ("text", {"texts": "Ada"}, "KeyError"),
    ("text", {"text": 5}, "no text sample"),
    ("text", {"text": ""}, "text is empty"),
    ("text", {"text": "a", "response": ["b"]}, "no text sample"),
    ("pair", {"clean": "a", "corrupt": "b", "answer": "c"}, "KeyError: 'wrong'"),
    ("pair", PAIR | {"corrupt": "Adam is in Rome"}, "clean has 15 tokens, corrupt 16"),
    ("pair", PAIR, "begin with the same token"),  # both with a space
    ("pair", PAIR | {"answer": ""}, "answer is empty"),
    ("ranking", {"query": "Who?", "documents": ["a"]}, "KeyError: 'gold'"),
    ("ranking", RANKING | {"gold": [2]}, "gold among them"),
    ("ranking", RANKING | {"gold": []}, "gold among them"),
    ("ranking", RANKING | {"gold": 0}, "no ranking sample"),
    ("ranking", RANKING | {"gold": [0.5]}, "gold among them"),
    ("ranking", RANKING | {"documents": []}, "gold among them"),
    ("ranking", RANKING | {"documents": "Ada came."}, "documents is no list"),
    ("ranking", RANKING | {"documents": ["Ada", None]}, "no ranking sample"),
]
GOOD = {"text": {"text": "a"}, "pair": PAIR | {"answer": "Italy"}, "ranking": RANKING}


@pytest.mark.parametrize(("kind", "row", "problem"), BAD)
def test_bad_rows_are_refused_with_their_line(load, kind, row, problem):
    with pytest.raises(InputFileError, match=f"line 3 is no {kind} sample") as error:
        load(kind, GOOD[kind], "", row)
    assert problem in str(error.value)


@pytest.mark.parametrize("kind", ["text", "pair", "ranking"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [("{", "is not JSON"), ("[1]", "not a JSON object"), ('"Ada"', "not a JSON object"), ("[" * 10**5, "not JSON")],
    ids=["half", "list", "text", "deep"],
)
def test_lines_that_are_no_objects_are_refused_with_their_number(load, kind, line, problem):
    with pytest.raises(InputFileError, match="line 2") as error:
        load(kind, GOOD[kind], line)
    assert problem in str(error.value)


@pytest.mark.parametrize("kind", ["text", "pair", "ranking", "needle"])
def test_files_that_hold_nothing_are_refused(load, tmp_path, kind):
    with pytest.raises(InputFileError, match="empty"):
        load(kind, "", " ")
    with pytest.raises(InputFileError, match="cannot be read"):
        load_samples(kind, tmp_path / "none.jsonl", Letters())
    (tmp_path / "binary.jsonl").write_bytes(b"\0\1")
    with pytest.raises(InputFileError, match="binary"):
        load_samples(kind, tmp_path / "binary.jsonl", Letters())


@pytest.mark.parametrize("kind", ["none", "passkey"])
def test_scorers_that_make_their_own_data_take_no_file(load, kind):
    with pytest.raises(InputFileError, match="makes its own data"):
        load(kind, {"text": "a"})
