"""Recipes: what is written is what is run, and what is no longer so is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import sparing
from sparing.core.scores import ModelIdentity, Scores, save_scores
from sparing.errors import InputFileError
from sparing.loading import ModelSpec
from sparing.recipe import FORMAT, Recipe, load


def made(text="snapkv(window=16)+adaptive", keep=0.25, **more):
    parameters = repr(sparing.parse_method(text, keep)) if "parameters" not in more else more.pop("parameters")
    return Recipe(ModelSpec(), ModelSpec().load().fingerprint, text, keep, parameters, {"cells": [], "seed": 0}, **more)


def gates(folder):
    """A file of scores, other ones each time."""
    folder.mkdir()
    identity = ModelIdentity("bundled", "LlamaForCausalLM", 4, 4, 2, 16, "")
    save_scores(folder / "duo.safetensors", [Scores(torch.rand(4, 2), ("layer", "kv_head"), "duo_gates", identity)])
    return folder / "duo.safetensors"


@pytest.fixture(name="file")
def recipe_file(tmp_path):
    made().save(tmp_path / "recipe.json")
    return tmp_path / "recipe.json"


def changed(file, **values):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | values))
    return file


def test_what_was_saved_is_loaded_and_runs(file):
    recipe = sparing.load(file)
    assert replace(recipe, folder=made().folder) == made(environment=recipe.environment)
    assert recipe.method == sparing.parse_method("snapkv(window=16)+adaptive", 0.25)
    loaded = recipe.load_model()
    ids = torch.tensor([loaded.tokenizer.encode("The river is wide. " * 20)])
    with sparing.use(loaded.model, recipe.method) as session:
        loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert session.report().share < 0.5


def test_files_that_a_method_needs_travel_with_the_recipe(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    text = f"duo(scores={gates(there)})"
    recipe = made(text, 0.5).save(here / "recipe.json")
    assert recipe.text == "duo(scores=recipe-duo.safetensors)"
    (there / "duo.safetensors").unlink()
    monkeypatch.chdir(there)
    assert repr(load(here / "recipe.json").method) == recipe.parameters
    (here / "recipe-duo.safetensors").write_bytes(b"something else")
    with pytest.raises(InputFileError, match="not the file that the recipe was made with"):
        _ = load(here / "recipe.json").method


@pytest.mark.parametrize("written", ["scores={}", "scores='{}'", "scores = {} , keep=0.5", 'min_prompt=8, scores="{}"'])
def test_files_are_found_however_they_are_written(written, tmp_path):
    file = gates(tmp_path / "there (1)")
    text = f"duo({written.format(file)}) "
    recipe = made(text, 0.5).save(tmp_path / "here" / "recipe.json")
    file.unlink()
    assert list(recipe.artifacts) == ["recipe-duo.safetensors"]
    assert repr(load(tmp_path / "here" / "recipe.json").method) == recipe.parameters


def test_two_files_of_one_name_are_two_files(tmp_path):
    files = [gates(tmp_path / name) for name in ("one", "two")]
    text = f"flexprefill & duo(scores={files[0]}) & duo(scores={files[1]}) & duo(scores={files[0]})"
    recipe = made(text, 0.5, parameters="").save(tmp_path / "recipe.json")
    assert len(recipe.artifacts) == 2
    recipe.check_artifacts()
    named = [part.partition("=")[2].strip(" )") for part in recipe.text.split("&")[1:]]
    assert named[0] == named[2] != named[1]


def test_another_meaning_of_the_same_text_is_refused(file):
    with pytest.raises(InputFileError, match="means another method in this version"):
        _ = load(changed(file, parameters="SnapKV(keep=0.25)")).method


def test_another_model_under_the_same_name_is_refused(file):
    with pytest.raises(InputFileError, match="another model than bundled is now"):
        load(changed(file, fingerprint="0" * 12)).load_model()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ("[1]", "not a recipe"),
        ("{}", "not a recipe"),
        (json.dumps({"format": FORMAT}), "wrong parts"),
        (json.dumps({"format": "sparing-recipe-9"}), "not a recipe"),
    ],
)
def test_what_is_no_recipe(content, said, tmp_path):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(InputFileError, match=said):
        load(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    "values",
    [{"keep": 1.5}, {"keep": None}, {"text": 3}, {"model": {"name": "bundled", "dtype": "float7"}}, {"model": {"n": 1}},
     {"work": []}, {"more": 1}],
)  # fmt: skip
def test_parts_that_are_wrong(values, file):
    with pytest.raises(InputFileError, match="wrong parts"):
        load(changed(file, **values))


def test_a_recipe_cannot_allow_code_to_run(file):
    spec = json.loads(file.read_text())["model"] | {"trust_remote_code": True}
    assert not load(changed(file, model=spec)).model.trust_remote_code
    assert load(file, trust_remote_code=True).model.trust_remote_code


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputFileError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_a_recipe_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sparing.errors.SparingError):
        made().save(tmp_path / "file" / "recipe.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
