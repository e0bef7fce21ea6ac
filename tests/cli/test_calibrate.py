"""`sparing calibrate`: from a model to a file to a comparison and an answer, and what is refused."""

import json

import pytest
import torch
from click.testing import CliRunner

import sparing
from sparing.cli import cli
from sparing.core.method import methods
from sparing.core.parsing import parse_method
from sparing.core.scores import load_scores
from sparing.errors import InvalidInputError, ScoresMismatchError, SparingError, UnknownNameError
from sparing.models import resolve
from sparing.testing import tiny_model

SMALL = ["--samples", "1", "--length", "128"]


def run(*words):
    done = CliRunner().invoke(cli, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def razor(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrate") / "razor.safetensors"
    done = run("calibrate", "--method", "razor", "--model", "bundled", *SMALL, "--out", path)
    assert f'use it as "razor(scores={path})"' in done.output
    return path


def test_a_file_holds_what_the_method_needs(razor):
    found = load_scores(razor)
    assert [scores.scorer for scores in found] == ["echo", "induction"]
    method = parse_method(f"razor(scores={razor})", 0.5)
    assert method.retrieval_heads()[0][0] == 2  # the bundled model copies in layer 2


def test_it_is_what_score_measures(razor):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve("bundled")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    induction = sparing.score(model, "induction", tokenizer, samples=1, length=128)
    assert torch.equal(load_scores(razor)[1].values, induction.values)
    both = sparing.calibrate(model, "razor", tokenizer, samples=1, length=128)
    assert [scores.scorer for scores in both] == ["echo", "induction"]
    with sparing.use(model, sparing.RazorAttention(0.5, both)) as session:
        model.generate(torch.arange(5, 105)[None], max_new_tokens=2, do_sample=False)
    assert session.report().plan.tokens_kept == 50 * 8


def test_compare_and_generate_use_the_file(razor, tmp_path):
    name, out = f"razor(scores={razor},recent=16)", tmp_path / "out"
    words = ["--methods", f"{name},streaming_llm", "--keep", "0.5", "--lengths", "256", "--samples", "1"]
    run("compare", *words, "--tasks", "needle_single", "--mode", "query-agnostic", "--out", out)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    assert any(row["method"].startswith("razor(scores=") for row in rows)
    context = tmp_path / "context.txt"
    context.write_text("The special magic number for old river is: 48213. " + "The grass is green. " * 30, "utf-8")
    done = run("generate", "--context", context, "--question", "Which number?", "--max-new-tokens", 2, "--method", name)
    assert done.exit_code == 0


def test_another_model_is_refused_before_anything_runs(razor, tmp_path):
    model = tiny_model("llama", vocab_size=600)
    model.save_pretrained(tmp_path / "other")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(resolve("bundled")).save_pretrained(tmp_path / "other")
    words = ["--methods", f"razor(scores={razor})", "--model", tmp_path / "other", "--out", tmp_path / "out"]
    with pytest.raises(ScoresMismatchError, match="were measured on LlamaForCausalLM, 4 attention layers"):
        run("compare", *words, "--tasks", "needle_single")
    assert not (tmp_path / "out").exists()
    (tmp_path / "context.txt").write_text("text " * 50)
    asked = ["--context", tmp_path / "context.txt", "--question", "Which?", "--model", tmp_path / "other"]
    with pytest.raises(ScoresMismatchError, match="measure this model"):
        run("generate", "--method", f"razor(scores={razor})", *asked)


def test_what_needs_no_measurement_is_refused_before_a_model_is_loaded(tmp_path):
    out = ["--model", "no/such/model", "--out", tmp_path / "x"]
    with pytest.raises(InvalidInputError, match=r"method: got 'snapkv', allowed is one of .*duo"):
        run("calibrate", "--method", "snapkv", *out)
    with pytest.raises(UnknownNameError, match="did you mean"):
        run("calibrate", "--method", "razr", *out)


def test_all_methods_leaves_out_those_that_need_a_file(capsys):
    from sparing.cli.comparing import _contestants, _say_what_is_left_out

    names = {contestant.name for contestant in _contestants("all", "0.5")}
    assert names.isdisjoint(name for name, info in methods().items() if info.needs)
    _say_what_is_left_out()
    said = capsys.readouterr().err
    assert "left out: duo (needs a measurement: sparing calibrate --method duo" in said
    with pytest.raises(SparingError, match=r"duo\.scores: got None"):
        _contestants("duo", "0.5")


def test_the_list_says_what_a_method_needs():
    listed = {entry["name"]: entry for entry in json.loads(run("methods", "--json").output)}
    assert listed["compresskv"]["needs"] == ["semantic_retrieval", "layer_error"]
    assert listed["snapkv"]["needs"] == []


def test_the_list_of_methods_says_what_they_need_and_what_goes_with_them():
    listed = {entry["name"]: entry for entry in json.loads(run("methods", "--json").output)}
    assert listed["specpc"]["needs_draft"]
    assert not listed["xattention"]["needs_draft"]
    text = " ".join(run("methods").output.split())
    assert "drop stored tokens, with another allocator: name+uniform" in text
    assert "score blocks of a prompt, likewise: name+rows, name+layer, name+top_mass" in text
