"""Loading models: every kind of place they come from, and every way in which that goes wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import click
import huggingface_hub.errors as hub
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import sparing
from sparing.cli.options import chat_option, model_options
from sparing.core.fingerprint import fingerprint
from sparing.errors import InvalidInputError, MissingExtraError, UnsupportedModelError
from sparing.loading import Drafts, ModelSpec
from sparing.models import BUNDLED

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}[assistant]"


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model, to be broken."""
    return shutil.copytree(BUNDLED, tmp_path / "model")


def refused(kind, problem, **spec):
    with pytest.raises(kind, match=problem) as error:
        ModelSpec(**spec).load()
    assert "\n" not in str(error.value)
    return error.value


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def test_a_folder_is_a_model(folder):
    loaded = ModelSpec(str(folder), "float32").load()
    assert loaded.name == str(folder)
    assert loaded.description == ModelSpec("bundled", "float32").load().description
    assert loaded.max_length == loaded.model.config.max_position_embeddings
    assert not loaded.model.training
    assert ModelSpec(str(folder), "bfloat16").load().model.dtype == torch.bfloat16


def test_a_home_folder_may_be_written_short(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert ModelSpec("~/model").load().model.config.model_type == "llama"


# -- what is not there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./none", "~/none", "/none/at/all", "a/b/c", "none/"])
def test_no_such_folder(name):
    refused(UnsupportedModelError, "there is no such folder|could not be loaded", name=name)


def test_a_file_is_no_folder(folder):
    refused(UnsupportedModelError, "is a file, not a folder", name=str(folder / "config.json"))


def test_a_folder_without_a_model(tmp_path):
    refused(UnsupportedModelError, "has no config.json", name=str(tmp_path))


def test_a_model_without_a_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()
    refused(UnsupportedModelError, "its tokenizer .*tokenizer.save_pretrained", name=str(folder))


def test_a_model_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(UnsupportedModelError, "could not be loaded .*model.safetensors", name=str(folder))


def test_weights_that_are_missing_are_never_made_up(folder):
    def lose(weights):
        del weights["model.layers.1.self_attn.k_proj.weight"], weights["model.norm.weight"]

    change_weights(folder, lose)
    refused(UnsupportedModelError, "lacks 2 of its weights, such as model.layers.1.self_attn.k_proj", name=str(folder))


def test_weights_of_another_shape(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    refused(UnsupportedModelError, "could not be loaded", name=str(folder))


def test_a_torn_file_of_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(UnsupportedModelError, "could not be loaded", name=str(folder))


def test_a_configuration_that_is_none(folder):
    (folder / "config.json").write_text("{oops")
    refused(UnsupportedModelError, "not a valid JSON file", name=str(folder))


@pytest.mark.parametrize("kind", ["nonsense", "vit"])
def test_a_model_that_is_no_language_model(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    refused(UnsupportedModelError, "could not be loaded .*causal language model on the Hub", name=str(folder))


# -- devices and numbers ------------------------------------------------------------------------------------------


def test_unknown_numbers():
    refused(InvalidInputError, "dtype: got 'int8', allowed is auto or float32", dtype="int8")


@pytest.mark.parametrize("device", ["cuda:99", "xyz", "meta", ""])
def test_no_such_device(device):
    refused(InvalidInputError, f"device: got '{device}'", device=device)


def test_a_model_that_is_too_large(monkeypatch):
    def full(self, *_):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand failed")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    refused(UnsupportedModelError, "does not fit into the device's memory; use --device-map auto", name="bundled")


# -- device maps --------------------------------------------------------------------------------------------------


def test_a_device_map_changes_nothing_in_what_is_said(monkeypatch):
    pytest.importorskip("accelerate", reason="needs the extra [big]")
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k["device_map"]) or load(*a, **k)
    )
    plain, mapped = ModelSpec("bundled", "float32").load(), ModelSpec("bundled", "float32", device_map="auto").load()
    assert asked == [None, "auto"]
    assert mapped.fingerprint == plain.fingerprint
    ids = torch.randint(3, 2000, (1, 300), generator=torch.Generator().manual_seed(0))
    said = []
    for loaded in (plain, mapped):
        with sparing.use(loaded.model, sparing.SnapKV(keep=0.25)):
            said.append(loaded.model.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*said)


def test_device_maps_that_are_none():
    refused(InvalidInputError, "device_map: got 'all', allowed is auto or balanced", device_map="all")
    refused(InvalidInputError, "device: got 'cpu', allowed is none where", device="cpu", device_map="auto")


def test_device_maps_need_accelerate(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    assert 'pip install "sparing[big]"' in str(refused(MissingExtraError, "accelerate", device_map="auto"))


# -- code of the model's own --------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_models_own_runs_only_if_asked_for(folder, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_config(folder, model_type="own", architectures=["OwnModel"], auto_map=classes)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    error = refused(UnsupportedModelError, "comes with Python code of its own", name=str(folder))
    assert "--trust-remote-code" in str(error)
    assert not marker.exists()
    loaded = ModelSpec(str(folder), trust_remote_code=True).load()
    assert type(loaded.model).__name__ == "OwnModel"
    assert marker.exists()


# -- the Hub ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "problem"),
    [
        (hub.GatedRepoError, "is gated on the Hub; ask for access"),
        (hub.RepositoryNotFoundError, "is not on the Hub, or private"),
        (hub.RevisionNotFoundError, "has no such revision"),
        (hub.LocalEntryNotFoundError, "is not on this machine, and the Hub cannot be reached"),
        (hub.OfflineModeIsEnabled, "is not on this machine, and the Hub cannot be reached"),
    ],
)
def test_what_the_hub_says(monkeypatch, cause, problem):
    """transformers hides the cause behind an OSError whose words change between versions."""

    def fail(*_, **__):
        raise OSError("something\nin many lines") from cause.__new__(cause)

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    refused(UnsupportedModelError, f"^some/model: {problem}", name="some/model")


def test_without_a_connection(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(UnsupportedModelError, "not on this machine, and the Hub cannot be reached", name="some/model-not-cached")


@pytest.mark.parametrize(
    ("name", "asked"), [("some/model", ("some/model", None)), ("some/model@v1.0", ("some/model", "v1.0"))]
)
def test_a_revision_stands_behind_the_name(monkeypatch, name, asked):
    seen = []

    def note(source, **options):
        seen.append((source, options["revision"], options["trust_remote_code"]))
        raise OSError("enough")

    monkeypatch.setattr(AutoConfig, "from_pretrained", note)
    refused(UnsupportedModelError, "could not be loaded", name=name)
    assert seen == [(*asked, False)]
    refused(UnsupportedModelError, "names no revision", name="some/model@")


@pytest.mark.parametrize("name", ["no spaces!", "-x"])
def test_names_that_no_model_can_have(name):
    refused(UnsupportedModelError, "could not be loaded", name=name)


# -- chats and drafts ---------------------------------------------------------------------------------------------


def test_a_chat_needs_a_template(folder):
    refused(InvalidInputError, "only for a tokenizer with a chat template", name="bundled", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert ModelSpec(str(folder), chat=True).load().tokenizer.chat_template == TEMPLATE


def test_a_draft_model_needs_no_template():
    assert fingerprint(Drafts(ModelSpec("bundled", chat=True))("bundled")) == ModelSpec().load().fingerprint


# -- the command line ---------------------------------------------------------------------------------------------


@click.command()
@model_options
@chat_option
@click.option("--more", default=1)
def command(spec: ModelSpec, more: int) -> None:
    click.echo(repr((spec, more)))


def test_options_make_a_spec():
    def made(*words):
        return eval(CliRunner().invoke(command, words, catch_exceptions=False).output)

    assert made() == (ModelSpec(), 1)
    words = "--model a/b@v1 --dtype float32 --device-map auto --trust-remote-code --chat --more 2"
    assert made(*words.split()) == (ModelSpec("a/b@v1", "float32", None, "auto", True, True), 2)
    assert made("--device", "cpu", "--no-chat") == (ModelSpec(device="cpu"), 1)
