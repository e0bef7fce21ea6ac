"""`sparing edit`, `ablate` and `corpus`, as typed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparing.core.edits import AblateHeads
from sparing.core.scores import Scores
from sparing.editing import edit, head_outputs
from sparing.models import resolve
from sparing.tasks.probes import text_samples

DIM = 32  # of a head of the bundled model


@pytest.fixture(scope="module")
def bundled():
    return AutoModelForCausalLM.from_pretrained(resolve("bundled")).eval()


@pytest.fixture
def other_model(retrieval, tmp_path):
    """Scores of a model of another shape, and scores of layers."""
    scores = Scores.load(retrieval)
    identity = dataclasses.replace(scores.model, num_layers=5)
    values = torch.rand(5, 4)
    return dataclasses.replace(scores, values=values, standard_error=None, model=identity).save(tmp_path / "other")


@pytest.fixture
def of_layers(retrieval, tmp_path):
    scores = Scores.load(retrieval)
    layers = dataclasses.replace(scores, values=scores.values[:, 0], axes=("layer",), standard_error=None)
    return layers.save(tmp_path / "layers")


# -- edit --------------------------------------------------------------------------------------------------------------


def test_a_scaled_checkpoint_differs_in_the_scaled_heads_alone(sparing, bundled, retrieval, tmp_path):
    """A power of two, so that every weight is scaled exactly."""
    out = tmp_path / "new" / "half"
    done = sparing("edit", "--scores", retrieval, "--top", 4, "--scale", 0.5, "--out", out)
    assert done.code == 0, done.err
    assert "edited 4 heads: 2.0, 2.1, 2.2, 2.3" in done.out
    before, after = bundled.state_dict(), AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    projection = "model.layers.2.self_attn.o_proj.weight"
    assert torch.equal(after.pop(projection), before[projection] * 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert AutoTokenizer.from_pretrained(out).encode("river") == AutoTokenizer.from_pretrained(
        resolve("bundled")
    ).encode("river")
    assert [path.name for path in out.parent.iterdir()] == ["half"]


def test_named_heads_are_taken_away(sparing, bundled, tmp_path):
    done = sparing("edit", "--heads", "2.1, 3.0", "--ablate", "zero", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for layer, head in ((2, 1), (3, 0)):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        columns = torch.zeros(4 * DIM, dtype=torch.bool)
        columns[head * DIM : (head + 1) * DIM] = True
        assert not after[name][:, columns].any()
        assert torch.equal(after[name][:, ~columns], bundled.state_dict()[name][:, ~columns])


def test_a_mean_ablated_checkpoint_says_what_the_edited_model_says(sparing, bundled, tmp_path):
    done = sparing("edit", "--heads", "2.1", "--ablate", "mean", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled"))
    reference = head_outputs(bundled, text_samples(tokenizer, 4, 512))
    ids = torch.tensor([tokenizer.encode("The special magic number for old river is: 48213. The grass is green.")])
    with torch.no_grad():
        intact, found = bundled(ids).logits, folded(ids).logits
        with edit(bundled, AblateHeads(((2, 1),), "mean", reference)):
            expected = bundled(ids).logits
    # float32 sums in another order; a forgotten shift or head shows by whole logits.
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((found - intact).abs().max()) > 0.1


def test_an_edited_checkpoint_is_a_model_like_any_other(sparing, tmp_path):
    """Without its copy heads the bundled model finds nothing, and the command line takes the folder by its path."""
    assert sparing("edit", "--heads", "2.0,2.1,2.2,2.3", "--ablate", "zero", "--out", tmp_path / "out").code == 0
    words = ["score", "--scorer", "sink_mass", "--length", 32, "--samples", 1, "--model", tmp_path / "out"]
    done = sparing(*words, "--out", tmp_path / "scores")
    assert done.code == 0, done.err
    assert Scores.load(tmp_path / "scores").model.name == str(tmp_path / "out")


BAD_EDIT = {
    "nothing to do": ({"--scale": None}, "one of --scale and --ablate"),
    "two things to do": ({"--ablate": "zero"}, "one of --scale and --ablate"),
    "no heads": ({"--heads": None}, "--heads, or --scores together with --top"),
    "heads named twice": ({"--top": "1"}, "not both"),
    "heads that are none": ({"--heads": "2"}, "layer.head"),
    "heads that are words": ({"--heads": "two.one"}, "layer.head"),
    "a negative head": ({"--heads": "-1.0"}, "layer.head"),
    "a head too many": ({"--heads": "2.4"}, "heads 0 to 3"),
    "a layer too many": ({"--heads": "4.0"}, "layers 0 to 3"),
    "scale that is no number": ({"--scale": "nan"}, "finite"),
    "scale without end": ({"--scale": "inf"}, "finite"),
    "scale that is a word": ({"--scale": "half"}, "--scale"),
    "another ablation": ({"--scale": None, "--ablate": "resample"}, "--ablate"),
    "scores without top": ({"--heads": None, "--scores": "{retrieval}"}, "together with --top"),
    "top of 0": ({"--heads": None, "--scores": "{retrieval}", "--top": "0"}, "share in (0, 1]"),
    "top above 1": ({"--heads": None, "--scores": "{retrieval}", "--top": "1.5"}, "share in (0, 1]"),
    "top that is no number": ({"--heads": None, "--scores": "{retrieval}", "--top": "few"}, "share in (0, 1]"),
    "no such scores": ({"--heads": None, "--scores": "missing", "--top": "1"}, "missing"),
    "scores of another model": ({"--heads": None, "--scores": "{other}", "--top": "1"}, "5 attention layers"),
    "scores of layers": ({"--heads": None, "--scores": "{layers}", "--top": "1"}, "layer × head"),
    "no model": ({"--model": "no/such/folder"}, "no such folder"),
    "a folder with something in it": ({"--out": "full"}, "exists already"),
    "a folder that is a file": ({"--out": "full/kept.txt"}, "exists already"),
}


@pytest.mark.parametrize("name", BAD_EDIT)
def test_bad_input_of_edit(name, refused, retrieval, other_model, of_layers, tmp_path, monkeypatch):
    given, expected = BAD_EDIT[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    options = {"--heads": "2.1", "--scale": "0.5", "--out": "out"} | given
    files = {"retrieval": retrieval, "other": other_model, "layers": of_layers}
    words = [part.format(**files) for word, value in options.items() if value is not None for part in (word, value)]
    refused(tmp_path, expected, "edit", *words)
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"


# -- ablate ------------------------------------------------------------------------------------------------------------


def ablation(scores, out, **more):
    options = {"length": 128, "samples": 2, "counts": "1,4", "draws": 2} | more
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["ablate", "--scores", scores, *given, "--out", out]


def test_the_curve_of_the_copy_heads_drops_and_the_others_do_not(sparing, retrieval, tmp_path):
    """Without the four heads of layer 2 the bundled model finds no needle; without the four worst heads it does."""
    out = tmp_path / "new" / "curve.json"
    done = sparing(*ablation(retrieval, out))
    assert done.code == 0, done.err
    curve = json.loads(out.read_text())
    assert curve["counts"] == [1, 4]
    assert curve["n"] == 2
    assert curve["heads"][:4] == [[2, 0], [2, 1], [2, 2], [2, 3]]
    assert len(curve["heads"]) == 16
    assert [len(draws) for draws in curve["random"]] == [2, 2]
    assert curve["full"] == 1.0
    assert curve["top"][1] == 0.0
    assert curve["bottom"][1] == 1.0
    assert "intact 1.00 on needle_single (n = 2)" in done.out
    assert "4 heads away: best-scored 0.00" in done.out
    assert str(out) in done.out
    assert [path.name for path in out.parent.iterdir()] == ["curve.json"]


@pytest.mark.parametrize("kind", ["mean", "uniform", "resample"])
def test_other_ways_to_take_heads_away(kind, sparing, retrieval, tmp_path):
    done = sparing(*ablation(retrieval, tmp_path / "out", kind=kind, samples=1, counts="4", draws=1))
    assert done.code == 0, done.err
    curve = json.loads((tmp_path / "out").read_text())
    assert curve["kind"] == kind
    assert curve["top"] == [0.0]


def test_the_same_seed_draws_the_same_heads(sparing, retrieval, tmp_path):
    for name in ("a", "b"):
        assert sparing(*ablation(retrieval, tmp_path / name, samples=1, counts="1")).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_task_from_a_file_has_as_many_samples_as_it_has(sparing, retrieval, tmp_path):
    notes = tmp_path / "notes.jsonl"
    question = "The special magic number for old river is:"
    text = "The grass is green. The special magic number for old river is: 48213. The sky is blue."
    notes.write_text(json.dumps({"context": text, "question": question, "answers": ["48213"]}) + "\n")
    done = sparing(*ablation(retrieval, tmp_path / "out", task=notes, samples=10, counts="1", draws=1))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out").read_text())["n"] == 1


BAD_ABLATE = {
    "no such scores": ({"scores": "missing"}, "missing"),
    "scores of another model": ({"scores": "{other}"}, "5 attention layers"),
    "scores of layers": ({"scores": "{layers}"}, "layer × head"),
    "too long": ({"length": "99999"}, "at most the model's 8192"),
    "too short": ({"length": "20"}, "at least"),
    "more than half of the heads": ({"counts": "9"}, "numbers from 1 to 8"),
    "no head": ({"counts": "0"}, "numbers from 1 to 8"),
    "counts that are none": ({"counts": "one"}, "whole numbers"),
    "no draws": ({"draws": "0"}, "--draws"),
    "unknown task": ({"task": "needle_singel"}, "did you mean needle_single"),
    "a task without answers": ({"task": "perplexity"}, "answers are generated"),
    "no such file": ({"task": "missing.jsonl"}, "missing.jsonl"),
    "a file without answers": ({"task": "free.txt"}, "add the answers"),
    "unknown kind": ({"kind": "noise"}, "--kind"),
    "no model": ({"model": "no/such/folder"}, "no such folder"),
}


@pytest.mark.parametrize("name", BAD_ABLATE)
def test_bad_input_of_ablate(name, refused, retrieval, other_model, of_layers, tmp_path, monkeypatch):
    given, expected = BAD_ABLATE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "free.txt").write_text("The grass is green.\nQ: What is green?\n")
    files = {"other": other_model, "layers": of_layers}
    scores = given.get("scores", str(retrieval)).format(**files)
    more = {option: value for option, value in given.items() if option != "scores"}
    refused(tmp_path, expected, *ablation(scores, "out", **({"samples": 1, "counts": "1"} | more)))


# -- corpus ------------------------------------------------------------------------------------------------------------

TEXTS = [f"The special magic number for old river is: {48213 + i}. " * (i + 1) for i in range(5)]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def test_corpus_scores_and_chooses(sparing, retrieval, shard, tmp_path):
    words = ["corpus", "--scores", retrieval, "--top", 4, "--data", shard, "--out", tmp_path / "out", "--share", "0.4"]
    done = sparing(*words)
    assert done.code == 0, done.err
    assert "5 texts scored now" in done.out
    assert "web: 2 of 5 chosen" in done.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    chosen = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    best = sorted(rows, key=lambda row: -row["score"])[:2]
    assert {row["id"] for row in chosen} == {row["id"] for row in best}
    assert "0 texts scored now" in sparing(*words).out


BAD_CORPUS = {
    "no such data": ({"--data": "missing"}, "missing"),
    "no such scores": ({"--scores": "missing"}, "missing"),
    "scores of layers": ({"--scores": "{layers}"}, "layer × head"),
    "top": ({"--top": "none"}, "share in (0, 1]"),
    "top above 1": ({"--top": "1.5"}, "share in (0, 1]"),
    "a share of nothing": ({"--share": "0"}, "share"),
    "a share above 1": ({"--share": "1.5"}, "share"),
    "short texts": ({"--max-tokens": "1"}, "--max-tokens"),
    "batches shorter than a text": ({"--max-tokens": "64", "--batch-tokens": "32"}, "at least max_tokens"),
}


@pytest.mark.parametrize("name", BAD_CORPUS)
def test_bad_input_of_corpus(name, refused, retrieval, of_layers, shard, tmp_path, monkeypatch):
    given, expected = BAD_CORPUS[name]
    monkeypatch.chdir(tmp_path)
    options = {"--scores": str(retrieval), "--data": str(shard), "--out": "out"} | given
    words = [part.format(layers=of_layers) for option in options.items() for part in option]
    refused(tmp_path, expected, "corpus", *words)


def test_scores_of_another_model_score_no_corpus(sparing, other_model, shard, tmp_path):
    done = sparing("corpus", "--scores", other_model, "--data", shard, "--out", tmp_path / "out")
    assert done.code == 2
    assert len(done.errors) == 1
    assert "5 attention layers" in done.errors[0]
