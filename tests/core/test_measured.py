"""Measurements in methods: equality, files of several, text, and models that they were not made on."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

import sparing
from sparing.adapters.lens import ModelLens
from sparing.adapters.structure import read_structure
from sparing.core.measured import needed_by
from sparing.core.method import Evict, methods
from sparing.core.parsing import parse_method
from sparing.core.scores import ModelIdentity, Scores, load_scores, save_scores
from sparing.errors import InputFileError, InvalidInputError, ScoresMismatchError, SparingError, UnknownNameError
from sparing.session import use
from sparing.testing import CHECKS, TINY_MODELS, run_check, tiny_model
from sparing.testing.measurements import planted_scores

MODEL = ModelIdentity("mine", "LlamaForCausalLM", 2, 4, 2, 8, "abc")
ECHO, INDUCTION = (planted_scores(name, MODEL) for name in ("echo", "induction"))
GATES = planted_scores("duo", MODEL)


def test_measurements_are_equal_by_what_was_measured():
    same = dataclasses.replace(ECHO, values=ECHO.values.clone(), environment={"date": "another"}, notes=("slow",))
    assert same == ECHO
    assert hash(same) == hash(ECHO)
    for other in (
        dataclasses.replace(ECHO, values=ECHO.values + 1e-6),
        dataclasses.replace(ECHO, scorer="induction"),
        dataclasses.replace(ECHO, parameters={"block": 3}),
        dataclasses.replace(ECHO, data={"seed": 1}),
        dataclasses.replace(ECHO, model=dataclasses.replace(MODEL, fingerprint="abd")),
    ):
        assert other != ECHO
    assert repr(ECHO) == f"Scores('echo', '{ECHO.digest}')"


def test_a_method_says_which_measurement_it_uses():
    """The text of a method is what a row of a comparison is known by."""
    one, two = sparing.DuoAttention(0.5, GATES), sparing.DuoAttention(0.5, planted_scores("duo", MODEL, seed=1))
    assert one != two
    assert GATES.digest in repr(one)
    assert repr(one) != repr(two)


@pytest.mark.parametrize("given", [(ECHO,), (ECHO, INDUCTION), (GATES, ECHO, GATES)], ids=len)
def test_a_file_gives_back_all_measurements(tmp_path, given):
    full = tuple(dataclasses.replace(s, extras={"loss": torch.arange(3.0)}, standard_error=s.values) for s in given)
    path = save_scores(tmp_path / "deep" / "some.safetensors", full)
    assert [p.name for p in path.parent.iterdir()] == ["some.safetensors"]
    back = load_scores(path)
    assert back == full
    assert torch.equal(back[-1].extras["loss"], torch.arange(3.0))
    assert torch.equal(back[0].standard_error, full[0].standard_error)
    if len(given) == 1:
        assert Scores.load(path) == full[0]
    else:
        with safe_open(path, "pt") as file:  # readable without sparing
            assert json.loads(file.metadata()["1.scorer"]) == given[1].scorer
        with pytest.raises(InputFileError, match="holds several measurements"):
            Scores.load(path)


def test_text_names_a_file(tmp_path):
    path = save_scores(tmp_path / "both.safetensors", (ECHO, INDUCTION))
    assert parse_method(f"razor(scores={path}, sinks=2)", 0.3) == sparing.RazorAttention(
        0.3, (ECHO, INDUCTION), sinks=2
    )
    spread = parse_method(f"razor(scores='{path}')+adaptive", 0.3)
    assert isinstance(spread, Evict)
    assert spread.scorer == sparing.RazorAttention(0.3, (ECHO, INDUCTION)).parts().scorer


@pytest.mark.parametrize("name", [name for name, info in methods().items() if info.needs])
def test_without_a_file_the_way_to_one_is_said(name, tmp_path):
    with pytest.raises(InvalidInputError, match=f"{name}.scores: got None.*sparing calibrate --method {name}"):
        parse_method(name)
    with pytest.raises(InputFileError, match=r"cannot be read as scores.*sparing calibrate"):
        parse_method(f"{name}(scores={tmp_path / 'missing.safetensors'})")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InputFileError):
        parse_method(f"{name}(scores={tmp_path / 'text'})")
    assert not methods()[name].training_free


def test_scores_are_no_field_of_methods_that_need_none():
    with pytest.raises(UnknownNameError, match="field of snapkv"):
        parse_method("snapkv(scores=x)")


def test_what_a_method_needs():
    assert needed_by("compresskv") == ("semantic_retrieval", "layer_error")
    with pytest.raises(InvalidInputError, match=r"allowed is one of compresskv, dhsa, duo, headkv, razor, sale"):
        needed_by("snapkv")
    with pytest.raises(UnknownNameError, match="did you mean duo"):
        needed_by("duoo")


class Forbidden(Exception):
    """Raised when a model runs that should not."""


def test_another_model_is_refused_before_anything_is_read():
    """qwen3 has the same numbers of layers and heads, a Llama with another size the same class."""
    model = tiny_model("llama")
    mine = planted_scores("duo", ModelLens(model).identity)
    with use(model, sparing.DuoAttention(0.5, mine)):
        pass
    for other in (tiny_model("qwen3"), tiny_model("llama", num_hidden_layers=3), tiny_model("llama", head_dim=16)):
        with pytest.raises(
            ScoresMismatchError, match=r"duo scores were measured on LlamaForCausalLM, 2 attention layers"
        ):
            use(other, sparing.DuoAttention(0.5, mine))


def test_a_session_with_a_measured_method_leaves_no_trace():
    from sparing.testing import assert_same_trace, trace

    model = tiny_model("llama")
    model(torch.ones(1, 3, dtype=torch.int64))
    before = trace(model)
    with use(model, sparing.DuoAttention(0.5, planted_scores("duo", ModelLens(model).identity))):
        pass
    assert_same_trace(before, trace(model))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_compressed_layers_know_their_number_among_all_that_attend(name):
    """The lens counts attention modules in the order of their calls; each knows its place in the cache."""
    model = tiny_model(name)
    try:
        structure, lens = read_structure(model), ModelLens(model)
    except SparingError as refusal:
        pytest.skip(f"refused by name: {refusal}")
    places = [layer.attention.layer_idx for layer in lens.layers]
    assert [places[number] for number in structure.attention_layers] == list(structure.full_layers)


class AlwaysTheFirstHead(sparing.CompressKV):
    """Chooses heads by their number, whatever was measured."""

    def parts(self):
        parts = super().parts()
        return dataclasses.replace(parts, scorer=dataclasses.replace(parts.scorer, heads=((0,), (0,))))


def test_the_contract_finds_a_method_that_does_not_look_at_its_measurement():
    check = CHECKS["kv_heads_are_interchangeable"]
    run_check(check, sparing.CompressKV)
    with pytest.raises(AssertionError, match="scores after permuting KV heads"):
        run_check(check, AlwaysTheFirstHead)


def test_the_contract_finds_a_text_that_names_another_measurement(monkeypatch):
    monkeypatch.setattr(Scores, "__repr__", lambda self: f"Scores({self.scorer!r}, 'another')")
    with pytest.raises(KeyError):
        run_check(CHECKS["fields_are_stored_unchanged"], sparing.DuoAttention)
