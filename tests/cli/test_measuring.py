"""`sparing scorers`, `score` and `agree`, as typed."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest
import torch
from safetensors import safe_open

from sparing.core.head_scorer import scorers
from sparing.core.scores import Scores

QUICK = ["score", "--scorer", "sink_mass", "--length", 32, "--samples", 2]


def test_scorers_are_listed(sparing):
    done = sparing("scorers")
    assert done.code == 0
    assert all(re.search(rf"^{name}\b", done.out, re.MULTILINE) for name in scorers())


def test_scorers_as_json(sparing):
    rows = json.loads(sparing("scorers", "--json").out)
    assert [row["name"] for row in rows] == list(scorers())
    for row in rows:
        assert set(row) == {"name", "family", "axes", "data", "paper", "summary"}
        assert row["axes"]
        assert row["summary"]


def test_score_finds_the_copy_heads_and_says_so(sparing, retrieval):
    """Layer 2 of the bundled model copies with all its heads."""
    scores = Scores.load(retrieval)
    assert {unit[0] for unit in scores.top(4)} == {2}
    assert scores.values.shape == (4, 4)
    assert scores.n == 2
    assert scores.data["length"] == 128
    assert scores.data["samples"] == 2
    assert scores.data["seed"] == 0
    assert scores.model.name == "bundled"


def test_the_file_is_readable_with_safetensors_alone(retrieval):
    with safe_open(retrieval, framework="pt") as file:
        metadata, values = file.metadata(), file.get_tensor("values")
    read = {name: json.loads(text) for name, text in metadata.items()}
    assert read["format"] == "sparing-scores-1"
    assert read["scorer"] == "retrieval"
    assert read["axes"] == ["layer", "head"]
    assert read["model"]["num_heads"] == 4
    assert {"torch", "transformers", "date", "sparing"} <= set(read["environment"])
    assert values.dtype == torch.float32


def test_the_ten_best_heads_are_printed_best_first(sparing, tmp_path):
    out = tmp_path / "new folder" / "sinks.safetensors"
    done = sparing(*QUICK, "--out", out)
    assert done.code == 0, done.err
    printed = re.findall(r"^layer (\d+)  head (\d+) +(\S+) ± \S+$", done.out, re.MULTILINE)
    scores = Scores.load(out)
    assert [(int(layer), int(head)) for layer, head, _ in printed] == scores.ranked()[:10]
    # Four significant digits are printed.
    assert [float(value) for *_, value in printed] == pytest.approx(
        [float(scores.values[unit]) for unit in scores.ranked()[:10]], rel=1e-3
    )
    assert "n = 2" in done.out
    assert str(out) in done.out
    assert [path.name for path in out.parent.iterdir()] == ["sinks.safetensors"]


def test_the_same_command_measures_the_same(sparing, tmp_path):
    for name in ("a", "b"):
        assert sparing(*QUICK, "--out", tmp_path / name).code == 0
    assert torch.equal(Scores.load(tmp_path / "a").values, Scores.load(tmp_path / "b").values)
    sparing(*QUICK, "--seed", 1, "--out", tmp_path / "c")
    assert not torch.equal(Scores.load(tmp_path / "a").values, Scores.load(tmp_path / "c").values)


def test_data_of_ones_own(sparing, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Text {i} about rivers and stones."}) + "\n" for i in range(3)))
    words = ["score", "--scorer", "attention_span", "--data", texts, "--out"]
    assert sparing(*words, tmp_path / "all").code == 0
    assert Scores.load(tmp_path / "all").n == 3
    assert Scores.load(tmp_path / "all").data["made"] == "given"
    assert sparing(*words, tmp_path / "two", "--samples", 2).code == 0
    assert Scores.load(tmp_path / "two").n == 2


def test_fields_of_the_scorer(sparing, tmp_path):
    words = ["score", "--length", 96, "--samples", 1, "--scorer", "retrieval(min_recall=0.25)", "--out", tmp_path / "o"]
    assert sparing(*words).code == 0
    assert Scores.load(tmp_path / "o").parameters["min_recall"] == 0.25


def test_patience_stops_early_and_says_so(sparing, tmp_path):
    words = ["--samples", 16, "--batch-size", 1, "--patience", 2, "--out", tmp_path / "out"]
    done = sparing("score", "--scorer", "retrieval", "--length", 96, *words)
    assert done.code == 0, done.err
    assert "stopped after 3 samples" in done.out
    assert Scores.load(tmp_path / "out").n == 3


def test_against_another_measurement(sparing, retrieval, tmp_path):
    done = sparing("score", "--scorer", "retrieval", "--length", 128, "--samples", 2, "--against", retrieval,
                   "--out", tmp_path / "again")  # fmt: skip
    assert "rank correlation 1.000, 100% of the top 2 shared" in done.out


def test_agree_by_hand(sparing, retrieval, tmp_path):
    """Sixteen units against themselves, and upside down: rank correlation 1 and -1."""
    scores = Scores.load(retrieval)
    upright = dataclasses.replace(scores, values=torch.arange(16.0).view(4, 4), standard_error=None)
    upright.save(tmp_path / "up")
    dataclasses.replace(upright, values=-upright.values).save(tmp_path / "down")
    assert "rank correlation 1.000, 100% of the top 2 shared" in sparing("agree", tmp_path / "up", tmp_path / "up").out
    down = sparing("agree", tmp_path / "up", tmp_path / "down", "--top", 4).out
    assert "rank correlation -1.000, 0% of the top 4 shared" in down
    # Of the 12 best (4 to 15) and the 12 worst (0 to 11), 8 are the same.
    assert "67% of the top 12 shared" in sparing("agree", tmp_path / "up", tmp_path / "down", "--top", "0.75").out


BAD_SCORE = {
    "unknown scorer": ({"--scorer": "retreival"}, "did you mean retrieval"),
    "unknown field": ({"--scorer": "sink_mass(width=3)"}, "width"),
    "a value that is none": ({"--scorer": "retrieval(min_recall=often)"}, "often"),
    "unclosed bracket": ({"--scorer": "retrieval(min_recall=0.5"}, "retrieval"),
    "too long": ({"--length": "99999"}, "at most the model's 8192"),
    "too short for the question": ({"--scorer": "retrieval", "--length": "8"}, "at least"),
    "length of 0": ({"--length": "0"}, "--length"),
    "no samples": ({"--samples": "0"}, "--samples"),
    "patience": ({"--patience": "-1"}, "--patience"),
    "no time": ({"--max-seconds": "0"}, "max_seconds: got 0.0"),
    "time that is no number": ({"--max-seconds": "nan"}, "max_seconds: got nan"),
    "dtype": ({"--dtype": "int8"}, "bfloat16"),
    "device": ({"--device": "abacus"}, "device: got 'abacus'"),
    "no model": ({"--model": "no/such/folder"}, "no such folder"),
    "no data": ({"--data": "missing.txt"}, "missing.txt"),
    "nothing to compare with": ({"--against": "missing.safetensors"}, "missing.safetensors"),
    "one sample only": ({"--scorer": "residual_patching", "--length": "64"}, "exactly 1"),
    "an output that is a folder": ({"--out": "."}, "."),
}


@pytest.mark.parametrize("name", BAD_SCORE)
def test_bad_input_of_score(name, refused, tmp_path, monkeypatch):
    given, expected = BAD_SCORE[name]
    monkeypatch.chdir(tmp_path)
    options = {"--scorer": "sink_mass", "--length": 32, "--samples": 2, "--out": "out.safetensors"} | given
    refused(tmp_path, expected, "score", *(word for option in options.items() for word in option))


@pytest.mark.parametrize(
    ("line", "expected"),
    [("{half", "line 2 is not JSON"), ("[1]", "line 2"), ('{"txt": "typo"}', "line 2 is no text sample")],
)
def test_bad_lines_of_data_are_named(line, expected, refused, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "fine text"}) + "\n" + line + "\n")
    refused(tmp_path, expected, "score", "--scorer", "sink_mass", "--data", data, "--out", tmp_path / "out")


def test_a_scorer_that_makes_its_own_data_takes_none(refused, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("text")
    refused(tmp_path, "leave --data out", "score", "--scorer", "induction", "--data", data, "--out", tmp_path / "out")


def test_an_earlier_file_stays_when_a_new_measurement_fails(refused, retrieval, tmp_path):
    kept = tmp_path / "out"
    kept.write_bytes(retrieval.read_bytes())
    refused(tmp_path, "at least", "score", "--scorer", "retrieval", "--length", 8, "--out", kept)
    assert kept.read_bytes() == retrieval.read_bytes()


def test_what_cannot_be_compared(refused, retrieval, tmp_path):
    scores = Scores.load(retrieval)
    layers = tmp_path / "layers"
    dataclasses.replace(scores, values=scores.values[:, 0], axes=("layer",), standard_error=None).save(layers)
    smaller = tmp_path / "smaller"
    dataclasses.replace(scores, values=scores.values[:2], standard_error=None).save(smaller)
    text = tmp_path / "text"
    text.write_text("no scores")
    refused(tmp_path, "layer × head", "agree", retrieval, layers)
    refused(tmp_path, "(4, 4)", "agree", retrieval, smaller)
    refused(tmp_path, "cannot be read as scores", "agree", retrieval, text)
    refused(tmp_path, "missing", "agree", retrieval, tmp_path / "missing")


@pytest.mark.parametrize("top", ["0", "-1", "1.5", "nan", "half"])
def test_tops_that_are_none(top, refused, retrieval, tmp_path):
    refused(
        tmp_path, repr(float(top)) if top not in ("0", "half") else top, "agree", retrieval, retrieval, "--top", top
    )


def test_the_page_and_the_picture_show_what_was_measured(sparing, retrieval, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plots`)")
    files = {name: tmp_path / "new" / name for name in ("a.safetensors", "a.html", "a.png")}
    shown = ("--html", files["a.html"], "--png", files["a.png"], "--against", retrieval)
    done = sparing(*QUICK, "--out", files["a.safetensors"], *shown)
    assert done.code == 0, done.err
    page = files["a.html"].read_text("utf-8")
    best = Scores.load(files["a.safetensors"]).ranked()[0]
    assert f"Highest: layer {best[0]}, head {best[1]} (" in page
    assert "sink_mass against retrieval" in page
    assert "sparing score --scorer sink_mass" in page
    assert files["a.png"].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(files)


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(tmp_path, "sparing[plots]", *QUICK, "--out", tmp_path / "a", "--png", tmp_path / "a.png")


def test_a_comparison_with_other_units_is_refused_before_anything_is_measured(sparing, refused, tmp_path):
    (tmp_path / "in").mkdir()
    other = tmp_path / "in" / "timeline"
    assert sparing("score", "--scorer", "waad_fai", "--samples", 1, "--length", 64, "--out", other).code == 0
    refused(tmp_path, "layer × head", *QUICK, "--out", tmp_path / "a", "--against", other)
