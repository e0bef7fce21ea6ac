"""`sparing tune`, and the recipe in `generate` and `compare`: on the bundled model, with work of one's own."""

from __future__ import annotations

import json

import pytest

from sparing.cli.progress import ProgressBar
from sparing.loading import ModelSpec
from sparing.tasks import get

pytest.importorskip("optuna", reason="the extra sparing[tune] is not installed")
QUICK = ["--methods", "kvzip,knorm,snapkv", "--trials", "5"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Ten texts with a planted fact each, as a file of the user's own."""
    tokenizer, task, rows = ModelSpec().load().tokenizer, get("needle_single"), []
    for index in range(10):
        sample = task.sample(tokenizer, 256, seed=5, index=index)
        text, question = tokenizer.decode(sample.context_ids), sample.questions[0]
        rows.append({"context": text, "question": question.text.strip(), "answers": list(question.answers)})
    file = tmp_path_factory.mktemp("mine") / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tuned(sparing, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    words = ["--tasks", "needle_single", "--lengths", "256", "--samples", "8", "--memory", "60%", "--max-loss", "10%"]
    done = sparing("tune", *words, *QUICK, "--out", out)
    assert done.code == 0, done.err
    return out, done


def test_a_recipe_and_a_page_are_written_and_said(tuned):
    out, done = tuned
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["text"].startswith("kvzip"), "the others lose needles"
    assert recipe["environment"]["command"].startswith("sparing tune --tasks")
    assert recipe["request"] == {"memory": 0.6, "max_loss": 0.1}
    assert recipe["expected"]["bytes_share"] <= 0.6
    assert recipe["work"]["cells"][0]["contexts"] == [4, 5, 6, 7], "the half that nothing was chosen by"
    assert f"Run {recipe['text']} at keep" in done.out.replace("\n", " ")
    assert str(out / "recipe.json") in done.out
    assert "held-out" in (out / "tune.html").read_text()


def test_compare_runs_the_recipe_and_its_numbers_hold(tuned, sparing, tmp_path):
    out, _ = tuned
    done = sparing("compare", "--recipe", out / "recipe.json", "--out", tmp_path)
    assert done.code == 0, done.err
    assert "the recipe's numbers hold: scores and bytes are the same" in done.out
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"full", json.loads((out / "recipe.json").read_text())["text"]}


def test_numbers_that_do_not_hold_are_said(tuned, sparing, tmp_path):
    out, _ = tuned
    recipe = json.loads((out / "recipe.json").read_text())
    recipe["expected"]["cells"][0]["score"] = 0.123
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = sparing("compare", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "out")
    assert done.code == 1
    assert "needle_single: score is 1, the recipe says 0.123" in done.err


def test_rows_of_other_runs_in_the_folder_are_not_the_recipes(tuned, sparing, tmp_path):
    """The same method on the same task, but on other contexts."""
    recipe = tuned[0] / "recipe.json"
    assert sparing("compare", "--recipe", recipe, "--out", tmp_path).code == 0
    assert json.loads((tmp_path / "run.json").read_text())["samples"] == 4
    results = tmp_path / "results.jsonl"
    mine = json.loads(results.read_text().splitlines()[-1])
    assert mine["method"] != "full"
    with results.open("a") as rows:
        rows.write(json.dumps(mine | {"key": "0" * 16, "score": 0.123}) + "\n")
    done = sparing("compare", "--recipe", recipe, "--out", tmp_path)
    assert (done.code, "the recipe's numbers hold" in done.out) == (0, True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"parameters": "KVzip(keep=0.9)"}, "means another method in this version"),
        ({"fingerprint": "0" * 12}, "another model than bundled is now"),
        ({"artifacts": {"gone.safetensors": "0"}}, "the recipe needs it beside it"),
        ({"work": {}}, "does not say its work (KeyError('cells'))"),
        ({"work": {"cells": [{"task": "needle_single"}], "seed": 0}}, "does not say its work (KeyError('label'))"),
        ({"work": {"cells": [], "seed": 0}}, "measured on nothing"),
        ({"expected": {}}, "does not say its work"),
        ({"expected": {"cells": []}}, "does not say its work"),
    ],
)
def test_a_recipe_that_is_no_longer_so_is_refused_before_anything_is_read(values, said, tuned, sparing, tmp_path):
    recipe = json.loads((tuned[0] / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | values))
    done = sparing("compare", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "out")
    assert done.code == 2
    assert said in done.errors[0]
    assert not (tmp_path / "out").exists()


def test_generate_runs_the_recipe(tuned, sparing, mine, tmp_path):
    out, _ = tuned
    row = json.loads(mine.read_text().splitlines()[0])
    (tmp_path / "text.txt").write_text(row["context"])
    words = ["--context", tmp_path / "text.txt", "--question", row["question"], "--max-new-tokens", "12"]
    done = sparing("generate", "--recipe", out / "recipe.json", *words)
    assert done.code == 0, done.err
    assert row["answers"][0] in done.out
    assert "kept" in done.out


def test_a_recipe_and_what_it_says_already_are_not_given_together(tuned, sparing, tmp_path):
    out, _ = tuned
    done = sparing("compare", "--recipe", out / "recipe.json", "--methods", "knorm", "--out", tmp_path / "out")
    assert done.code == 2
    assert "--methods" in done.errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ones_own_file_is_split_and_searched(sparing, mine, tmp_path):
    """Without answers, so that the full cache's are the reference: a model of this size rarely finds the right ones."""
    rows = [json.loads(line) | {"answers": None} for line in mine.read_text().splitlines()[:4]]
    file = tmp_path / "open.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = sparing("tune", "--tasks", mine, "--max-loss", "20%", *QUICK, "--out", tmp_path / "gated")
    assert "score of the full cache: got" in done.errors[0]
    done = sparing("tune", "--tasks", file, "--max-loss", "70%", *QUICK, "--samples", "4", "--out", tmp_path)
    assert done.code == 0, done.err
    cell = json.loads((tmp_path / "recipe.json").read_text())["work"]["cells"][0]
    assert cell["task"] == str(file)
    assert len(cell["contexts"]) == 2
    done = sparing("compare", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "again")
    assert "numbers hold" in done.out


def test_a_file_that_changed_since_is_refused(sparing, tuned, mine, tmp_path):
    out, _ = tuned
    recipe = json.loads((out / "recipe.json").read_text())
    recipe["work"]["cells"][0] |= {"task": str(mine), "label": "user:mine:00000000", "length": None}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = sparing("compare", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "out")
    assert done.code == 2
    assert "not the file that the recipe was measured on" in done.errors[0]


def test_nothing_meets_the_request(sparing, tmp_path):
    (tmp_path / "recipe.json").write_text("an earlier one")
    words = ["--tasks", "needle_single", "--lengths", "256", "--samples", "4", "--memory", "12%", "--max-loss", "1%"]
    done = sparing("tune", *words, "--methods", "knorm", "--trials", "3", "--out", tmp_path)
    assert done.code == 1
    assert "Nothing that was tried meets the request" in done.out
    assert not (tmp_path / "recipe.json").exists(), "an earlier recipe would be taken for the answer"
    assert (tmp_path / "tune.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "at least one of --memory"),
        (["--memory", "150%"], "a share in (0, 1]"),
        (["--max-loss", "some"], "a share such as"),
        (["--latency", "30"], "30ms"),
        (["--bytes", "much"], "64MiB"),
        (["--memory", "0.5", "--methods", "snapvk"], "did you mean snapkv"),
        (["--memory", "0.5", "--lengths", "a"], "whole numbers"),
        (["--memory", "0.5", "--lengths", ","], "whole numbers"),
        (["--memory", "0.5", "--workers", "2"], "nothing without --ray"),
    ],
)
def test_bad_input(words, said, refused, tmp_path):
    refused(tmp_path, said, "tune", "--tasks", "needle_single", *words, "--out", tmp_path / "out")


def test_a_plan_says_what_a_sweep_takes_and_keeps_what_it_read(sparing, tmp_path):
    words = ["--methods", "knorm", "--keep", "0.5", "--tasks", "needle_single", "--lengths", "128", "--samples", "9"]
    done = sparing("compare", *words, "--mode", "query-aware", "--plan", "--price", "2", "--out", tmp_path)
    assert done.code == 0, done.err
    assert "8 contexts are left" in done.out
    assert [line.split()[0] for line in done.out.splitlines() if line.strip()[:1].isdigit()][:4] == ["1", "2", "4", "8"]
    assert len((tmp_path / "contexts" / "results.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "report.html").exists()
    refused = sparing("compare", *words, "--price", "2", "--out", tmp_path)
    assert (refused.code, "nothing without --plan" in refused.err) == (2, True)


def test_the_bar_of_a_comparison_that_goes_on_fills(sparing, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(ProgressBar, "__call__", lambda self, *words: told.append(words))
    words = ["--methods", "knorm", "--keep", "0.5", "--tasks", "needle_single", "--lengths", "128", "--samples", "3"]
    assert sparing("compare", *words, "--plan", "--out", tmp_path).code == 0
    assert sparing("compare", *words, "--out", tmp_path).code == 0
    assert [(done, total) for done, total, _ in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "Which tokens survive" in (tmp_path / "report.html").read_text(), "of what the plan has read"
