"""The seam of prompts with segments: which models have it, and what the cache holds."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, SmolLM3Config

from sparing.adapters.lens import ModelLens
from sparing.adapters.segments import SEGMENTS, SegmentedCache, Turning, require_turnable, zero_positions
from sparing.adapters.structure import read_structure
from sparing.core.segments import Layout
from sparing.errors import CacheStateError, UnsupportedModelError
from sparing.methods.rerank.pine import Pine
from sparing.segments import position_invariant
from sparing.testing import TINY_MODELS, tiny_config, tiny_model
from sparing.testing.inspection import assert_same_trace, trace

WORKING = ["llama", "mistral", "mixtral", "phi3", "qwen3"]
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


def random_model(config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def smollm3(no_rope_layers):
    common = {k: v for k, v in tiny_config("llama").to_dict().items() if k in SIZES}
    return random_model(SmolLM3Config(**common, no_rope_layers=no_rope_layers, use_sliding_window=False))


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip


# -- which models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKING)
def test_models_with_rotary_positions_and_full_attention_work(name):
    model = tiny_model(name)
    layers, rotary = require_turnable(model)
    assert layers == model.config.num_hidden_layers
    assert rotary.is_fixed


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gpt2", "its positions are not rotary"),
        ("gemma3", "not all of its layers have plain full attention"),
        ("gpt_oss", "not all of its layers have plain full attention"),
        ("deepseek_v3", "do not all rotate queries and keys"),
        ("jamba", "plain full attention|recurrent state"),
        ("qwen3_next", "plain full attention|recurrent state"),
    ],
)
def test_other_models_are_refused(name, problem):
    model = tiny_model(name)
    model(IDS)
    before = trace(model)
    with pytest.raises(UnsupportedModelError, match=problem):
        require_turnable(model)
    assert_same_trace(before, trace(model))


def test_every_tiny_model_is_in_one_of_the_lists():
    refused = {"gpt2", "gemma3", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next"}
    assert set(WORKING) | refused == set(TINY_MODELS)


def test_angles_that_depend_on_the_length_are_refused():
    model = tiny_model("llama", **rope("dynamic", factor=2.0))
    with pytest.raises(UnsupportedModelError, match="depends on the length of the sequence"):
        require_turnable(model)


def test_a_layer_without_positions_is_refused():
    assert require_turnable(smollm3([1, 1]))[0] == 2
    with pytest.raises(UnsupportedModelError, match="do not all rotate queries and keys"):
        require_turnable(smollm3([1, 0]))


def test_another_rotation_in_one_layer_is_refused():
    """The second layer turns the other way round."""
    model = tiny_model("llama")

    def backwards(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos, -sin)}

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(backwards, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="do not all rotate"):
        require_turnable(model)
    hook.remove()
    assert require_turnable(model)[0] == 2


def test_a_softmax_with_sinks_is_refused():
    model = tiny_model("gpt_oss", layer_types=["full_attention", "full_attention"])
    with pytest.raises(UnsupportedModelError, match="a cap or sinks"):
        require_turnable(model)


@pytest.mark.parametrize("changed", [0, 1])
def test_keys_or_values_that_change_after_the_cache_are_refused(changed):
    model = tiny_model("llama")
    with position_invariant(model), pytest.raises(UnsupportedModelError, match="changes keys or values after"):
        model(IDS, past_key_values=_CopyingCache(model, changed))


class _CopyingCache(SegmentedCache):
    """Stands for a model that does something to its keys or values after they were cached."""

    def __init__(self, model, changed):
        self.changed = changed
        super().__init__(2, Layout(1, (3,)), read_structure(model).rotary, Pine())

    def update(self, *args, **kwargs):
        states = list(super().update(*args, **kwargs))
        states[self.changed] = states[self.changed].clone()
        return tuple(states)


# -- turning, and what is held -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_is_what_the_model_does_to_the_bit(name, dtype):
    """Of the first layer, whose input does not depend on positions: its keys at any position, from those at 0."""
    model = tiny_model(name, dtype)
    _, rotary = require_turnable(model)
    at_zero, at_place = (first_keys(model, positions) for positions in (torch.zeros(1, 8, dtype=torch.int64), PLACES))
    turn = Turning(rotary, at_zero)
    turn.reserve(1000)
    assert torch.equal(turn(at_zero, PLACES[0]), at_place)
    assert torch.equal(turn(at_zero, PLACES[:, None].expand(1, 2, 8)), at_place)  # a position for every vector


PLACES = torch.tensor([[0, 3, 1, 99, 7, 400, 5, 12]])


def first_keys(model, positions):
    found = []
    lens = ModelLens(model)

    def watch(call, attend):
        found.append(call.keys)
        return attend(call)

    with torch.no_grad(), lens.hooked(attention=watch):
        model(IDS, position_ids=positions, attention_mask=torch.ones_like(IDS), use_cache=False)
    return found[0]


@pytest.mark.parametrize("kind", [rope("yarn", factor=4.0, original_max_position_embeddings=128),
                                  rope("linear", factor=2.0)])  # fmt: skip
def test_scaled_embeddings_are_turned_right(kind):
    model = tiny_model("llama", torch.float64, **kind)
    with position_invariant(model) as session, torch.no_grad():
        mine = session.logits(IDS[:, :2], [IDS[:, 2:5]], IDS[:, 5:])
        # YaRN's factor is rounded to float32 (2^-24) when it is put on the angles and not when it is taken off.
        assert (mine - model(IDS).logits[0, -3:]).abs().max() < 1e-5


def test_keys_are_cached_unrotated():
    """Two tokens that are alike have equal keys in the first layer, wherever they are."""
    model = tiny_model("llama")
    with position_invariant(model) as session, torch.no_grad():
        _, cache = session._begin([1, 2], [[9, 5], [5, 5]], [5, 6])
        model(torch.tensor([[1, 2, 5, 5, 9, 5, 5, 6]]), past_key_values=cache)
    keys = cache.layers[0].keys[0, 0]
    same = [2, 3, 5, 6]
    assert torch.equal(keys[same], keys[[2]].expand(4, -1))
    assert (keys[0] - keys[2]).abs().max() > 1e-3


def test_segments_that_are_read_in_parts_are_refused():
    model = tiny_model("llama")
    with position_invariant(model) as session, torch.no_grad():
        _, cache = session._begin([1, 2], [[3, 4], [5, 6]], [7, 8])
        with pytest.raises(CacheStateError, match="tokens 0 to 4 are read, but the 6 up to the last segment"):
            model(IDS[:, :4], past_key_values=cache)
        with pytest.raises(CacheStateError, match="prefill_chunk_size"):
            session.generate([1, 2], [[3, 4], [5, 6]], [7, 8], max_new_tokens=1, prefill_chunk_size=3)


def test_the_suffix_may_be_read_in_parts():
    model = tiny_model("qwen3", torch.float64)
    with position_invariant(model) as session, torch.no_grad():
        whole = session.logits([1, 2], [[3, 4], [5, 6]], [7, 8, 9])
        _, cache = session._begin([1, 2], [[3, 4], [5, 6]], [7, 8, 9])
        parts = [model(ids, past_key_values=cache).logits[0] for ids in (IDS[:, :7], torch.tensor([[8, 9]]))]
    assert (torch.cat(parts)[-3:] - whole).abs().max() < 1e-9


def test_functions_are_known_to_transformers_inside_the_block_only():
    model = tiny_model("llama")
    session = position_invariant(model)
    assert not set(SEGMENTS.names.values()) & set(AttentionInterface._global_mapping)
    with session:
        assert set(SEGMENTS.names.values()) <= set(AttentionInterface._global_mapping)
    assert not set(SEGMENTS.names.values()) & set(AttentionInterface._global_mapping)


def test_positions_are_taken_out_of_forwards():
    given = {"input_ids": IDS, "position_ids": torch.arange(8)[None], "use_cache": True}
    assert zero_positions((), given)["position_ids"].tolist() == [[0] * 8]
    assert zero_positions((IDS,), {})["position_ids"].shape == (1, 8)
    assert given["position_ids"].sum() == 28
