"""Models that accelerate has spread: weights on the disk, fetched when a module runs, and empty in between."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparing
from sparing.adapters.fold import fold_into
from sparing.adapters.lens import ModelLens
from sparing.core.edits import ScaleHeads
from sparing.core.fingerprint import fingerprint
from sparing.core.method import methods
from sparing.core.parsing import parse_method
from sparing.core.placement import input_device
from sparing.core.prefill import SparsePrefill
from sparing.errors import UnsupportedModelError
from sparing.testing.models import tiny_model

pytest.importorskip("accelerate", reason="needs the extra [big]")

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
ONE_LAYER = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}
NEARLY_ALL = dict.fromkeys(PARTS, "disk") | {"model.norm": "cpu", "model.rotary_emb": "cpu"}
IDS = torch.randint(1, 64, (1, 150), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[ONE_LAYER, NEARLY_ALL], ids=["one layer away", "nearly all away"])
def spread(folder, request):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=request.param).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


def said(model, text):
    """Tokens and logits with a method at work."""
    method = parse_method(text, 0.4)
    if isinstance(method, SparsePrefill):
        method = replace(method, dispatch="always")
    with sparing.use(model, method):
        out = model.generate(
            IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # ids are on no device that the model has
@pytest.mark.parametrize("text", [name for name, info in methods().items() if not (info.needs or info.needs_draft)])
def test_every_method_says_what_it_says_of_the_whole_model(whole, spread, text):
    for expected, found in zip(said(whole, text), said(spread, text), strict=True):
        assert torch.equal(expected, found)


def test_a_fingerprint_does_not_ask_where_weights_are(whole, spread):
    assert fingerprint(spread) == fingerprint(whole)


def test_a_fingerprint_is_of_the_model_not_of_its_folder(whole, folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint(elsewhere) == fingerprint(whole)
    assert fingerprint(tiny_model("llama", seed=1)) != fingerprint(whole)


def test_heads_are_seen_as_in_the_whole_model(whole, spread):
    seen = []
    for model in (whole, spread):
        lens, out = ModelLens(model), []
        with torch.no_grad(), lens.hooked(heads=lambda layer, z, out=out: out.append(z)):
            lens.forward(IDS, torch.ones_like(IDS))
        seen.append(torch.stack(out))
        assert torch.equal(lens.output_weight(1), ModelLens(whole).output_weight(1))
    assert torch.equal(*seen)


def test_weights_that_are_away_cannot_be_changed(spread):
    with pytest.raises(UnsupportedModelError, match="put away"):
        fold_into(ModelLens(spread), [ScaleHeads({(1, 0): 0.5})])


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
def test_segments_in_any_order(whole, spread):
    said = []
    for model in (whole, spread):
        with sparing.position_invariant(model) as session:
            said.append(session.generate([1, 2], [[5, 6, 7], [9, 10]], [20, 21], max_new_tokens=6, do_sample=False))
    assert torch.equal(*said)


def test_ids_go_where_the_embeddings_are(whole, spread):
    assert input_device(whole) == input_device(spread) == torch.device("cpu")


def test_a_tensor_parallel_model_is_refused(whole):
    """As transformers marks one; adaptive budgets of each process for itself were another method's."""
    model = copy.deepcopy(whole)
    model._tp_size = 2
    with pytest.raises(UnsupportedModelError, match="spread over processes"), sparing.use(model, sparing.SnapKV()):
        pass
    with pytest.raises(UnsupportedModelError, match="spread over processes"):
        ModelLens(model)
