"""The lens against the model's own eager attention and against plain forwards."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import Cache

from sparing.adapters.lens import ModelLens
from sparing.core.lens import Lens
from sparing.errors import InvalidInputError, UnsupportedModelError
from sparing.measures.attention import attention_rows, row_tiles
from sparing.methods.kv.knorm import Knorm
from sparing.session import use
from sparing.testing import TINY_MODELS, tiny_model
from sparing.testing.inspection import assert_same_trace, trace

MODELS = tuple(TINY_MODELS)
DENSE = tuple(name for name, spec in TINY_MODELS.items() if not spec.recurrent)
LENGTH, PADS = 40, 7  # longer than the sliding windows of 16
# Eager attention rounds its float64 probabilities to float32 (2^-24 = 6e-8) before it goes on, and so do most norms.
ROWS_AGREE = 1e-6
# A recurrent layer before the attention carries a float32 state through every token.
CARRIED = 1e-5


def tokens(batch=2, length=LENGTH, seed=0):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(name):
    return CARRIED if TINY_MODELS[name].recurrent else ROWS_AGREE


def left_pads(batch=2, length=LENGTH, pads=PADS):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, :pads] = False
    return mask


def watched(lens, run):
    """What `run` returns, and per layer the rows that were seen and the logits' calls, in the order of the calls."""
    seen = [[] for _ in range(lens.num_layers)]

    def watch(call, attend):
        seen[call.layer].append(attention_rows(call))
        return attend(call)

    with torch.no_grad(), lens.hooked(attention=watch):
        return run(), seen


def eager_maps(name, ids, mask):
    """The maps that the model's own eager attention returns: each sequence by itself, zeros where its pads would be."""
    model = tiny_model(name, torch.float64)
    model.set_attn_implementation("eager")
    found = []
    for row, real in zip(ids, mask, strict=True):
        with torch.no_grad():
            maps = model(row[real][None], output_attentions=True, use_cache=False).attentions
        pads = int((~real).sum())
        alone = [layer.double() for layer in maps if layer is not None]
        found.append([torch.nn.functional.pad(layer, (pads, 0, pads, 0)) for layer in alone])
    return [torch.cat(layers) for layers in zip(*found, strict=True)]


# -- watching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_eager_attention(name, padded):
    ids, mask = tokens(), left_pads(pads=PADS * padded)
    lens = ModelLens(tiny_model(name, torch.float64))
    _, seen = watched(lens, lambda: lens.forward(ids, mask))
    maps = eager_maps(name, ids, mask)
    assert len(maps) == lens.num_layers
    for (rows,), expected in zip(seen, maps, strict=True):
        assert rows.shape == expected.shape == (2, lens.num_heads, LENGTH, LENGTH)
        assert float((rows - expected).abs().max()) < close(name)
        assert not rows[1, :, : PADS * padded].any(), "rows of pads see nothing"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_a_model_loaded_with_eager_attention_is_watched_alike(name):
    ids, mask = tokens(), left_pads()
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    lens = ModelLens(model)
    with torch.no_grad():
        plain = lens.forward(ids, mask)
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        own = model(ids, attention_mask=mask.long(), position_ids=positions, output_attentions=True).attentions
    said, seen = watched(lens, lambda: lens.forward(ids, mask))
    assert torch.equal(said, plain)
    for (rows,), expected in zip(seen, own, strict=True):
        assert float((rows - expected * mask[:, None, :, None]).abs().max()) < ROWS_AGREE


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gpt2"])
def test_tiles_and_single_rows_are_parts_of_the_map(name):
    lens = ModelLens(tiny_model(name, torch.float64))
    wrong = []

    def watch(call, attend):
        whole = attention_rows(call)
        wrong.append(float((attention_rows(call, slice(17, 18)) - whole[:, :, 17:18]).abs().max()))
        tiles = torch.cat([tile for _, tile in row_tiles(call, start=3)], dim=2)
        wrong.append(float((tiles - whole[:, :, 3:]).abs().max()))
        return attend(call)

    with torch.no_grad(), lens.hooked(attention=watch):
        lens.forward(tokens(), left_pads())
    assert len(wrong) == 2 * lens.num_layers
    assert max(wrong) < 1e-12


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_watching_changes_no_bit_of_the_logits(name, padded):
    lens, ids, mask = ModelLens(tiny_model(name)), tokens(), left_pads(pads=PADS * padded)
    with torch.no_grad():
        plain = lens.forward(ids, mask)
        told = dict.fromkeys(("resid_pre", "attn_out", "mlp_out", "resid_post"), lambda layer, x: None)
        with lens.hooked(heads=lambda layer, z: None, sites=told):
            said, seen = watched(lens, lambda: lens.forward(ids, mask))
    assert torch.equal(said, plain)
    assert all(len(calls) == 1 for calls in seen)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_is_watched_without_changing_a_bit(name, padded):
    """A prompt, a chunk of three, then tokens one by one: their rows are those of the whole map."""
    ids, mask = tokens(), left_pads(pads=PADS * padded)
    lens = ModelLens(tiny_model(name, torch.float64))
    if TINY_MODELS[name].recurrent and not hasattr(Cache, "has_previous_state"):
        with pytest.raises(UnsupportedModelError, match="install a newer transformers"):
            lens.new_cache()
        return
    chunked = not TINY_MODELS[name].recurrent  # a carried state goes on token by token only
    ends = [30, *([33] if chunked else []), *range(34 if chunked else 31, LENGTH + 1)]

    def decode():
        cache, said, start = lens.new_cache(), [], 0
        for end in ends:
            said.append(lens.forward(ids[:, start:end], mask[:, :end], cache=cache))
            start = end
        return torch.cat(said, dim=1)

    with torch.no_grad():
        plain = decode()
    said, seen = watched(lens, decode)
    assert torch.equal(said, plain)
    for calls, whole in zip(seen, eager_maps(name, ids, mask), strict=True):
        for start, end, rows in zip([0, *ends], ends, calls, strict=False):
            stored = rows.shape[-1]  # a sliding window forgets what no row can see any more
            expected = whole[:, :, start:end, :end]
            assert not expected[..., : end - stored].any()
            assert float((rows - expected[..., end - stored :]).abs().max()) < close(name)


@pytest.mark.parametrize("name", DENSE)
def test_a_left_padded_batch_says_what_single_runs_say(name):
    lens, ids, mask = ModelLens(tiny_model(name, torch.float64)), tokens(), left_pads()
    with torch.no_grad():
        together = lens.forward(ids, mask)
        alone = lens.forward(ids[1:, PADS:])
    assert float((together[1:, PADS:] - alone).abs().max()) < TINY_MODELS[name].tolerance


# -- changing ---------------------------------------------------------------------------------------------------


def test_what_hooks_return_is_what_the_model_goes_on_with():
    lens, ids = ModelLens(tiny_model("llama", torch.float64)), tokens()
    with torch.no_grad():
        plain = lens.forward(ids)
        ways = {
            "attention": lens.hooked(attention=lambda call, attend: torch.zeros_like(attend(call))),
            "heads": lens.hooked(heads=lambda layer, z: torch.zeros_like(z)),
            "attn_out": lens.hooked(sites={"attn_out": lambda layer, x: torch.zeros_like(x)}),
        }
        said = {}
        for name, way in ways.items():
            with way:
                said[name] = lens.forward(ids)
    assert not torch.allclose(said["heads"], plain)
    # the output projection of Llama has no bias: three ways to say nothing
    assert torch.equal(said["heads"], said["attention"])
    assert torch.equal(said["heads"], said["attn_out"])


def test_of_nested_blocks_the_outer_acts_first():
    """f(x) = 2x outside, g(x) = x + 1 inside: what goes on is 2x + 1 at every place."""
    lens, ids = ModelLens(tiny_model("llama", torch.float64)), tokens(1, 8)

    def double(layer, x):
        return 2 * x

    def add(layer, x):
        return x + 1

    def both(layer, x):
        return 2 * x + 1

    with torch.no_grad():
        for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
            with lens.hooked(sites={site: double}), lens.hooked(sites={site: add}):
                nested = lens.forward(ids)
            with lens.hooked(sites={site: both}):
                assert torch.equal(nested, lens.forward(ids)), site
        with lens.hooked(heads=double), lens.hooked(heads=add):
            nested = lens.forward(ids)
        with lens.hooked(heads=both):
            assert torch.equal(nested, lens.forward(ids))
        with (
            lens.hooked(attention=lambda call, attend: 2 * attend(call)),
            lens.hooked(attention=lambda call, attend: attend(call) + 1),
        ):
            nested = lens.forward(ids)
        with lens.hooked(heads=both):
            assert torch.equal(nested, lens.forward(ids))


def test_an_inner_block_ends_alone():
    lens, ids = ModelLens(tiny_model("gpt2")), tokens(1, 8)
    calls = []

    def note(name):
        return lambda call, attend: (calls.append(name), attend(call))[1]

    with torch.no_grad(), lens.hooked(attention=note("outer")):
        with lens.hooked(attention=note("inner")):
            lens.forward(ids)
        assert sorted(calls) == ["inner", "inner", "outer", "outer"]
        lens.forward(ids)
        assert calls[4:] == ["outer", "outer"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "jamba"])
def test_everything_is_restored_also_after_an_exception(name):
    model, ids = tiny_model(name), tokens()
    said = model(ids).logits
    before = trace(model)  # early transformers change the configuration in the first forward
    lens = ModelLens(model)
    assert_same_trace(before, trace(model))
    every = dict.fromkeys(("resid_pre", "attn_out", "mlp_out", "resid_post"), lambda layer, x: 0 * x)

    def fail(call, attend):
        raise RuntimeError("on purpose")

    with lens.hooked(attention=lambda call, attend: 0 * attend(call), heads=lambda layer, z: 0 * z, sites=every):
        assert not torch.equal(lens.forward(ids), said)
    assert_same_trace(before, trace(model))
    with pytest.raises(RuntimeError, match="on purpose"), lens.hooked(heads=lambda layer, z: 0 * z, sites=every):  # noqa: SIM117
        with lens.hooked(attention=fail):
            lens.forward(ids)
    assert_same_trace(before, trace(model))
    with pytest.raises(ZeroDivisionError), lens.hooked(attention=fail):
        1 / 0  # noqa: B018
    assert_same_trace(before, trace(model))
    assert torch.equal(model(ids).logits, said)


# -- running ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_going_on_from_a_layer_is_the_whole_forward(name, padded):
    lens, ids, mask = ModelLens(tiny_model(name)), tokens(), left_pads(pads=PADS * padded)
    into, out_of = {}, {}
    with torch.no_grad():
        with lens.hooked(sites={"resid_pre": into.__setitem__, "resid_post": out_of.__setitem__}):
            whole = lens.forward(ids, mask)
        for layer in range(lens.num_layers):
            assert torch.equal(lens.forward_from(layer, into[layer], mask), whole), layer
        if lens.layers[-1].block is lens.blocks[-1]:
            assert torch.equal(lens.forward_from(lens.num_layers, out_of[lens.num_layers - 1], mask), whole)
        assert torch.equal(lens.forward_from(0, into[0], mask, last=3), whole[:, -3:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_change_goes_on_from_its_layer(name):
    """A changed residual stream of layer 1 and the same change in a whole forward say the same."""
    lens, ids = ModelLens(tiny_model(name)), tokens()
    into = {}

    def change(layer, x):
        into.setdefault(layer, x)
        return 1.5 * x if layer == 1 else None

    with torch.no_grad():
        with lens.hooked(sites={"resid_pre": change}):
            whole = lens.forward(ids)
        assert torch.equal(lens.forward_from(1, 1.5 * into[1]), whole)
        assert not torch.allclose(lens.forward_from(1, into[1]), whole)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_heads_add_is_the_output_of_attention(name):
    lens, ids = ModelLens(tiny_model(name, torch.float64)), tokens()
    heads, out = {}, {}
    with torch.no_grad(), lens.hooked(heads=heads.__setitem__, sites={"attn_out": out.__setitem__}):
        lens.forward(ids)
    for layer in range(lens.num_layers):
        weight = lens.output_weight(layer)
        assert weight.shape[:2] == (lens.num_heads, lens.head_dim)
        assert heads[layer].shape == (2, LENGTH, lens.num_heads, lens.head_dim)
        total = getattr(lens.layers[layer].projection, "bias", None)
        total = torch.zeros(()) if total is None else total
        for head in range(lens.num_heads):
            total = total + heads[layer][:, :, head] @ weight[head]
        assert torch.allclose(total, out[layer], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_final_states_are_what_the_unembedding_reads(name):
    lens, ids = ModelLens(tiny_model(name, torch.float64)), tokens()
    with torch.no_grad():
        states, logits = lens.final_states(ids), lens.forward(ids)
        assert torch.allclose(lens.model.get_output_embeddings()(states), logits, atol=1e-12)
        assert torch.allclose(lens.final_states(ids, last=2), states[:, -2:])


def test_what_a_lens_tells_of_its_model():
    lens: Lens = ModelLens(tiny_model("llama"), name="mine")
    identity = lens.identity
    shape = (2, 4, 2, 8)
    assert (lens.num_layers, lens.num_heads, lens.num_kv_heads, lens.head_dim) == shape
    assert (identity.num_layers, identity.num_heads, identity.num_kv_heads, identity.head_dim) == shape
    assert (identity.name, identity.architecture) == ("mine", "LlamaForCausalLM")
    assert (lens.vocabulary_size, lens.max_length) == (64, 512)
    assert ModelLens(tiny_model("jamba")).num_layers == 1, "only attention layers are counted"
    assert ModelLens(tiny_model("llama", seed=1)).identity.fingerprint != identity.fingerprint


# -- refusals ---------------------------------------------------------------------------------------------------


def test_what_is_no_decoder_of_transformers_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear: not a transformers model"):
        ModelLens(torch.nn.Linear(2, 2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="or it is no decoder; use a decoder-only model"):
        ModelLens(t5)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1))
    before = trace(mamba)
    with pytest.raises(UnsupportedModelError, match="no attention layer was called"):
        ModelLens(mamba)
    assert_same_trace(before, trace(mamba))


def test_a_layer_or_site_that_does_not_exist_is_refused():
    lens = ModelLens(tiny_model("llama"))
    residual = torch.zeros(1, 4, 32)
    for layer in (-1, 3):
        with pytest.raises(InvalidInputError, match=r"layer: got .*0 to 2"):
            lens.forward_from(layer, residual)
    with (
        pytest.raises(InvalidInputError, match=r"site: got 'nowhere'.*resid_pre"),
        lens.hooked(sites={"nowhere": lambda layer, x: None}),
    ):
        pass


def test_layers_of_several_shapes_are_refused():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = (torch.nn.Linear(32, 32, bias=False) for _ in range(2))
    attention.num_key_value_groups = 1
    before = trace(model)
    with pytest.raises(UnsupportedModelError, match=r"layers differ in .*\(4, 2, 8\), \(4, 4, 8\)"):
        ModelLens(model)
    assert_same_trace(before, trace(model))


def test_heads_need_a_projection_and_places_need_to_be_found():
    lens = ModelLens(tiny_model("llama"))
    object.__setattr__(lens.layers[1], "projection", None)
    object.__setattr__(lens.layers[1], "mlp", None)
    before = trace(lens.model)
    with pytest.raises(UnsupportedModelError, match="layer 1 has no output projection"):
        lens.output_weight(1)
    with pytest.raises(UnsupportedModelError, match="layer 1 has no output"), lens.hooked(heads=lambda layer, z: None):
        pass
    for site in ("attn_out", "mlp_out"):
        told = {site: lambda layer, x: None}
        with pytest.raises(UnsupportedModelError, match=f"its {site} was not found"), lens.hooked(sites=told):
            pass
    assert_same_trace(before, trace(lens.model))  # layer 0 had its hook already
    watched(lens, lambda: lens.forward(tokens()))  # watching needs neither


def test_a_model_that_is_in_use_is_refused():
    model = tiny_model("llama")
    with use(model, Knorm(keep=0.5)), pytest.raises(UnsupportedModelError, match="already in use"):
        ModelLens(model)
    lens = ModelLens(model)
    with lens.hooked(attention=lambda call, attend: attend(call)):
        with pytest.raises(UnsupportedModelError, match="already in use"), use(model, Knorm(keep=0.5)):
            pass
        lens.forward(tokens())
