"""Edits folded into the weights against the same edits as hooks, and against weights worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparing.adapters.lens import ModelLens
from sparing.core.edits import AblateHeads, BiasHeads, ScaleHeads
from sparing.editing import edit, fold, save_edited
from sparing.errors import InvalidInputError, OutputError, UnsupportedModelError
from sparing.methods.heads.act import RedistributeSinks
from sparing.methods.heads.uniform_heads import UniformHeads
from sparing.methods.heads.zerotuning import BiasFirstToken
from sparing.testing import TINY_MODELS, tiny_model

MODELS = tuple(TINY_MODELS)
# Their configurations have no switch for a bias of the output projection.
BIASLESS = ("mistral", "phi3", "mixtral", "jamba")
WITH_BIAS = tuple(name for name in MODELS if name not in BIASLESS)
# The same float64 sum in two orders, 1e-16 apart, can fall to two sides of a rounding to float32 inside a norm:
# 2^-24 of logits near 10, grown by a few layers. What the edits change is larger than 1e-2, see below.
CLOSE = 1e-5
IDS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def hooked(model, *edits):
    with edit(model, *edits):
        return logits(model)


def scales(model):
    last = ModelLens(model).num_layers - 1
    return (ScaleHeads({(0, 1): 2.5, (last, 3): -0.5}), AblateHeads(((0, 2), (last, 0))))


def shifts(model):
    """A map of every kind that can be folded, on heads that overlap, so that their order matters."""
    lens = ModelLens(model)
    last, dim = lens.num_layers - 1, lens.head_dim
    reference = random(lens.num_layers, 5, lens.num_heads, dim, seed=1)
    return (
        ScaleHeads({(0, 1): 2.5, (last, 3): -0.5}),
        BiasHeads({(0, 1): random(dim), (last, 2): random(dim, seed=2)}),
        AblateHeads(((last, 0), (0, 3)), "mean", reference),
        ScaleHeads({(0, 1): 0.5, (last, 0): 3.0}),
    )


def contents(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()


def assert_unchanged(model, before):
    weights, config = before
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def assert_same(found, expected):
    assert float((found - expected).abs().max()) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_folded_scales_say_what_hooks_say(name):
    model = tiny_model(name, torch.float64)
    intact, expected = logits(model), hooked(model, *scales(model))
    assert float((expected - intact).abs().max()) > 1e-2
    fold(model, *scales(model))
    assert_same(logits(model), expected)


@pytest.mark.parametrize("name", WITH_BIAS)
def test_folded_shifts_say_what_hooks_say(name):
    model = tiny_model(name, torch.float64)
    expected = hooked(model, *shifts(model))
    backwards = hooked(model, *reversed(shifts(model)))
    assert float((expected - backwards).abs().max()) > 1e-2, "the order should matter here"
    fold(model, *shifts(model))
    assert_same(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_oss", "deepseek_v3"])
def test_a_saved_checkpoint_says_what_hooks_say(name, tmp_path):
    model = tiny_model(name, torch.float64)
    before, expected = contents(model), hooked(model, *shifts(model))
    folder = save_edited(model, None, shifts(model), tmp_path / "edited")
    assert_unchanged(model, before)
    experts = {"experts_implementation": "eager"} if hasattr(model.config, "_experts_implementation") else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **experts).eval()
    assert type(loaded) is type(model)
    assert_same(logits(loaded), expected)


@pytest.mark.parametrize("name", ["mistral", "mixtral", "phi3"])
def test_what_needs_no_bias_is_saved_without_one(name, tmp_path):
    model = tiny_model(name, torch.float64)
    expected = hooked(model, *scales(model))
    folder = save_edited(model, None, scales(model), tmp_path / "edited")
    experts = {"experts_implementation": "eager"} if hasattr(model.config, "_experts_implementation") else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **experts).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_same(logits(loaded), expected)


def test_the_columns_of_a_scaled_head_are_scaled_and_no_others():
    model = tiny_model("llama", torch.float64)
    before = contents(model)[0]
    fold(model, ScaleHeads({(1, 2): -0.5}))
    key = "model.layers.1.self_attn.o_proj.weight"
    before[key][:, 16:24] *= -0.5
    assert model.state_dict().keys() == before.keys(), "no bias is needed"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_rows_of_gpt2_are_scaled_its_conv1d_stores_them_the_other_way_round():
    model = tiny_model("gpt2", torch.float64)
    before = contents(model)[0]
    fold(model, AblateHeads(((0, 3),)), BiasHeads({(0, 1): torch.arange(8.0)}))
    weight, bias = before["transformer.h.0.attn.c_proj.weight"], before["transformer.h.0.attn.c_proj.bias"]
    bias += torch.arange(8.0, dtype=torch.float64) @ weight[8:16]
    weight[24:32] = 0.0
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, before[name], rtol=1e-14, atol=0), name


def test_a_bias_is_what_the_projection_makes_of_the_vector():
    model = tiny_model("llama", torch.float64)
    before = contents(model)[0]
    vector = random(8)
    fold(model, BiasHeads({(1, 2): vector}))
    after = model.state_dict()
    expected = before["model.layers.1.self_attn.o_proj.weight"][:, 16:24] @ vector
    assert torch.allclose(after["model.layers.1.self_attn.o_proj.bias"], expected, rtol=1e-12, atol=0)
    # The switch of the configuration gives every projection a bias: all but this one are 0.
    added = after.keys() - before.keys()
    assert added == {f"model.layers.{i}.self_attn.{x}_proj.bias" for i in range(2) for x in "qkvo"}
    assert all(not after[name].any() for name in added if name != "model.layers.1.self_attn.o_proj.bias")
    assert model.config.attention_bias is True


def test_a_second_fold_edits_the_model_that_the_first_one_made():
    """What was shifted into the bias is no head's any more, so scaling the head later leaves it."""
    model = tiny_model("qwen3", torch.float64)
    vector, weight = random(8), ModelLens(model).output_weight(0)[1].clone()
    fold(model, BiasHeads({(0, 1): vector}))
    expected = hooked(model, ScaleHeads({(0, 1): 0.25}))
    fold(model, ScaleHeads({(0, 1): 0.25}))
    assert_same(logits(model), expected)
    assert torch.allclose(model.state_dict()["model.layers.0.self_attn.o_proj.bias"], vector @ weight)


# -- refusals ---------------------------------------------------------------------------------------------------


REFERENCE = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    "unfoldable",
    [
        UniformHeads(((0, 1),)),
        BiasFirstToken(((0, 1),)),
        RedistributeSinks(((0, 1),)),
        AblateHeads(((0, 1),), "resample", REFERENCE),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_depends_on_the_text_is_refused_by_name(unfoldable, tmp_path):
    model = tiny_model("llama")
    before = contents(model)
    with pytest.raises(InvalidInputError, match=rf"'{type(unfoldable).__name__}'.*use it with sparing\.edit"):
        fold(model, ScaleHeads({(0, 0): 2.0}), unfoldable)
    with pytest.raises(InvalidInputError, match=type(unfoldable).__name__):
        save_edited(model, None, [unfoldable], tmp_path / "edited")
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BIASLESS)
def test_a_bias_that_no_checkpoint_could_hold_is_refused(name, tmp_path):
    model = tiny_model(name)
    model(torch.ones(1, 2, dtype=torch.int64))  # early transformers change the configuration in the first forward
    before = contents(model)
    shift = BiasHeads({(0, 1): torch.ones(8)})
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}: .* no bias"):
        fold(model, ScaleHeads({(0, 0): 2.0}), shift)
    with pytest.raises(UnsupportedModelError, match="no bias"):
        save_edited(model, None, [shift], tmp_path / "edited")
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []
    fold(model, BiasHeads({(0, 1): torch.zeros(8)}))  # a shift by nothing needs no bias
    assert_unchanged(model, before)


def test_unknown_heads_and_no_edits_are_refused():
    model = tiny_model("llama")
    before = contents(model)
    with pytest.raises(InvalidInputError, match=r"edits: .*at least one"):
        fold(model)
    for head in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(InvalidInputError, match="layers 0 to 1, heads 0 to 3"):
            fold(model, ScaleHeads({(0, 0): 2.0}), ScaleHeads({head: 2.0}))
    assert_unchanged(model, before)


def test_a_folder_in_use_is_refused_and_nothing_is_left_behind(tmp_path, monkeypatch):
    model, change = tiny_model("llama"), [ScaleHeads({(0, 0): 2.0})]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already; name a new folder"):
        save_edited(model, None, change, taken)
    with pytest.raises(OutputError, match="exists already"):
        save_edited(model, None, change, taken / "notes.txt")
    with pytest.raises(OutputError):
        save_edited(model, None, change, taken / "notes.txt" / "below")

    def full(self, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OutputError, match="disk full"):
        save_edited(model, None, change, tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "notes.txt"]
    assert (taken / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    model = tiny_model("llama")
    (tmp_path / "empty").mkdir()
    save_edited(model, None, [ScaleHeads({(0, 0): 2.0})], str(tmp_path / "empty"))
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "empty").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["empty"], "the scratch folder is gone"
