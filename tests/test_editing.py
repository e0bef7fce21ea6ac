"""Edits of heads inside a `with` block against plain torch hooks written by hand, in float64."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import sparing
from sparing.core.edits import AblateHeads, BiasHeads, ScaleHeads, chosen_heads
from sparing.core.samples import TextSample
from sparing.core.scores import Scores
from sparing.editing import ablate, edit, head_outputs
from sparing.errors import InvalidInputError, ScoresMismatchError, SparingError, UnsupportedModelError
from sparing.methods.heads.uniform_heads import UniformHeads
from sparing.methods.kv.knorm import Knorm
from sparing.scoring import score
from sparing.testing import tiny_model
from sparing.testing.inspection import assert_same_trace, trace
from tests.methods.heads import slow

IDS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))
# One model, one arithmetic: what is hooked at the same place by two ways is the same but for the last bits.
CLOSE = 1e-10


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def by_hand(model, change):
    """Logits when `change(layer, z)` edits z, (B, T, Hq, D), in place before the output projections."""

    def hook(layer):
        def before(module, args):
            z = args[0].clone().view(*args[0].shape[:2], slow.HEADS, slow.DIM)
            change(layer, z)
            return (z.flatten(2),)

        return before

    with ExitStack() as stack:
        for layer in range(len(slow.blocks(model))):
            stack.callback(slow.projection(model, layer).register_forward_pre_hook(hook(layer)).remove)
        return logits(model)


def what_the_projections_get(model, ids=IDS):
    """Per layer (B, T, Hq, D), seen by plain hooks that come after whatever is there already."""
    found = {}

    def keep(layer):
        return lambda module, args: found.__setitem__(layer, args[0].view(*args[0].shape[:2], slow.HEADS, slow.DIM))

    with ExitStack() as stack:
        for layer in range(len(slow.blocks(model))):
            stack.callback(slow.projection(model, layer).register_forward_pre_hook(keep(layer)).remove)
        logits(model, ids)
    return found


# -- each edit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow.NAMES)
def test_scaled_heads(name):
    model = slow.model_of(name)
    with edit(model, ScaleHeads({(0, 1): 2.5, (1, 3): -0.5, (1, 0): 0.0})):
        found = logits(model)

    def change(layer, z):
        if layer == 0:
            z[:, :, 1] *= 2.5
        if layer == 1:
            z[:, :, 3] *= -0.5
            z[:, :, 0] = 0.0

    assert torch.allclose(found, by_hand(model, change), atol=CLOSE)
    assert not torch.allclose(found, logits(model), atol=1e-2)


@pytest.mark.parametrize("name", slow.NAMES)
def test_biased_heads(name):
    model, first, second = slow.model_of(name), random(8), random(8, seed=1)
    with edit(model, BiasHeads({(0, 1): first, (1, 2): second})):
        found = logits(model)

    def change(layer, z):
        z[:, :, 1 + layer] += (first, second, torch.zeros(8))[layer]
        if layer == 2:
            assert name == "gemma3"

    assert torch.allclose(found, by_hand(model, change), atol=CLOSE)
    assert not torch.allclose(found, logits(model), atol=1e-2)


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("name", slow.NAMES)
def test_heads_that_say_nothing_or_their_mean(name, kind):
    model = slow.model_of(name)
    reference = random(len(slow.blocks(model)), 5, slow.HEADS, slow.DIM)
    with edit(model, AblateHeads(((0, 2), (1, 0), (1, 3)), kind, reference)):
        found = logits(model)

    def change(layer, z):
        for head in ([2], [0, 3], [])[layer]:
            z[:, :, head] = 0.0 if kind == "zero" else sum(reference[layer, token, head] for token in range(5)) / 5

    assert torch.allclose(found, by_hand(model, change), atol=CLOSE)
    assert not torch.allclose(found, logits(model), atol=1e-2)


@pytest.mark.parametrize("name", slow.NAMES)
def test_resampled_heads_say_what_they_said_at_some_token_of_the_reference(name):
    model = slow.model_of(name)
    reference = random(len(slow.blocks(model)), 50, slow.HEADS, slow.DIM)
    with edit(model, AblateHeads(((1, 0), (1, 3)), "resample", reference, seed=3)):
        found, given = logits(model), what_the_projections_get(model)
        again = logits(model)
    plain = what_the_projections_get(model)
    for head in (1, 2):
        assert torch.equal(given[1][:, :, head], plain[1][:, :, head])
    assert torch.equal(given[0], plain[0])
    same = [(given[1][:, :, None, head] == reference[1, :, head]).all(-1) for head in (0, 3)]  # (B, T, 50)
    assert all(bool((which.sum(-1) == 1).all()) for which in same), "each is one token of the reference"
    assert torch.equal(same[0], same[1]), "heads of a layer are drawn together"
    assert same[0].any(1).any(0).sum() > 15, "48 draws of 50 hit 31 different ones on average"
    assert torch.equal(found, again)
    with edit(model, AblateHeads(((1, 0), (1, 3)), "resample", reference, seed=4)):
        assert not torch.allclose(logits(model), found, atol=1e-3)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "uniform"])
def test_the_named_ways_of_taking_heads_away(kind):
    reference, heads = torch.zeros(2, 3, 4, 8), ((0, 1), (1, 2))
    made = ablate(kind, list(heads), reference)
    assert made == (UniformHeads(heads) if kind == "uniform" else AblateHeads(heads, kind, reference))
    assert made.touched() == heads


# -- blocks -----------------------------------------------------------------------------------------------------


def test_edits_act_in_their_order_as_nested_blocks_do():
    model, vector = slow.model_of("llama"), random(8)
    double, add = ScaleHeads({(0, 1): 2.0}), BiasHeads({(0, 1): vector})
    with edit(model, double, add):
        found = logits(model)
    with edit(model, double), edit(model, add):
        nested = logits(model)

    def change(layer, z):
        if layer == 0:
            z[:, :, 1] = 2 * z[:, :, 1] + vector

    assert torch.equal(found, nested)
    assert torch.allclose(found, by_hand(model, change), atol=CLOSE)


def test_edits_of_attention_and_of_outputs_go_together():
    """A uniform head whose output is then scaled by 0 is a head that was zeroed."""
    model = slow.model_of("gemma3")
    with edit(model, ScaleHeads({(1, 2): 0.0}), UniformHeads(((1, 2),))):
        both = logits(model)
    with edit(model, AblateHeads(((1, 2),))):
        assert torch.allclose(both, logits(model), atol=CLOSE)


@pytest.mark.parametrize("made", [ScaleHeads({(0, 1): 2.0}), UniformHeads(((0, 1),))], ids=["heads", "attention"])
def test_everything_is_undone_also_after_an_exception(made):
    model = tiny_model("llama")
    before, plain = trace(model), logits(model)
    with edit(model, made):
        assert not torch.allclose(logits(model), plain, atol=1e-3)
    assert_same_trace(before, trace(model))
    with pytest.raises(ZeroDivisionError), edit(model, made):
        1 / 0  # noqa: B018
    assert_same_trace(before, trace(model))
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generating_is_edited_step_by_step(name):
    """Greedy tokens with a cache are those of whole edited forwards without one."""
    model, ids = slow.model_of(name), IDS[:1]
    edits = [ScaleHeads({(0, 1): 3.0}), UniformHeads(((0, 2), (1, 0)))]  # layer 0 of Gemma 3 has a sliding window
    with edit(model, *edits):
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        expected = ids
        for _ in range(10):
            expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said, expected)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert not torch.equal(said, plain)


def test_an_edit_outside_works_with_a_compressed_cache_inside():
    model = tiny_model("llama")
    made = ScaleHeads({(0, 1): 3.0})
    folded = tiny_model("llama")
    sparing.fold(folded, made)
    ids, many = IDS[:1], {"attention_mask": torch.ones_like(IDS[:1]), "max_new_tokens": 8, "do_sample": False}
    with edit(model, made), sparing.use(model, Knorm(keep=0.5)):
        said = model.generate(ids, **many)
    with sparing.use(folded, Knorm(keep=0.5)):
        assert torch.equal(said, folded.generate(ids, **many))
    with pytest.raises(UnsupportedModelError, match="already in use"), edit(model, UniformHeads(((0, 0),))):  # noqa: SIM117
        with sparing.use(model, Knorm(keep=0.5)):
            pass


# -- reference outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow.NAMES)
def test_reference_outputs_are_those_of_the_samples_tokens_each_once(name):
    model = slow.model_of(name)
    samples = [TextSample(tuple(IDS[0].tolist())), TextSample(tuple(IDS[1, 5:20].tolist()))]
    spoken = [torch.cat(layer) for layer in zip(*(slow.heads_of(model, s.ids) for s in samples), strict=True)]
    found = head_outputs(model, samples, tokens=1000)
    assert found.shape == (len(spoken), 39, slow.HEADS, slow.DIM)
    few = head_outputs(model, samples, tokens=10, seed=1)
    assert few.shape == (len(spoken), 10, slow.HEADS, slow.DIM)
    places = []
    for some in (found, few):
        apart = torch.stack([torch.cdist(a.flatten(1), b.flatten(1)) for a, b in zip(some, spoken, strict=True)])
        assert float(apart.amin(-1).max()) < 1e-4  # a batch and single runs; norms round to float32
        assert all(torch.equal(layer.argmin(-1), apart[0].argmin(-1)) for layer in apart), "one token, all layers"
        places.append(apart[0].argmin(-1).tolist())
    assert sorted(places[0]) == list(range(39)), "pads are not drawn, and no token twice"
    assert len(set(places[1])) == 10


# -- bad input --------------------------------------------------------------------------------------------------


def test_edits_that_mean_nothing_are_refused():
    for make, message in (
        (lambda: ScaleHeads({}), "factors: "),
        (lambda: ScaleHeads({(0, 0): float("nan")}), "factors: .*finite"),
        (lambda: ScaleHeads({(0, 0): float("inf")}), "factors: .*finite"),
        (lambda: BiasHeads({}), "vectors: "),
        (lambda: AblateHeads(()), "pairs: .*at least one"),
        (lambda: AblateHeads(((0, 0),), "uniform"), "use UniformHeads"),
        (lambda: AblateHeads(((0, 0),), "mean"), "reference: .*head_outputs"),
        (lambda: ablate("resample", [(0, 0)]), "reference: .*head_outputs"),
        (lambda: ablate("shuffle", [(0, 0)]), "kind: got 'shuffle'"),
        (lambda: ablate("uniform", []), "pairs: .*at least one"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            make()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (ScaleHeads({(2, 0): 2.0}), "layers 0 to 1, heads 0 to 3"),
        (AblateHeads(((0, 4),)), "layers 0 to 1, heads 0 to 3"),
        (UniformHeads(((0, -1),)), "layers 0 to 1, heads 0 to 3"),
        (BiasHeads({(0, 1): torch.zeros(7)}), r"vector of head \(0, 1\): got \(7,\).*\(8,\)"),
        (AblateHeads(((0, 1),), "mean", torch.zeros(3, 5, 4, 8)), r"reference: got \(3, 5, 4, 8\)"),
        (AblateHeads(((0, 1),), "resample", torch.zeros(2, 0, 4, 8)), r"reference: got \(2, 0, 4, 8\)"),
        (AblateHeads(((0, 1),), "mean", torch.zeros(4, 8)), r"reference: got \(4, 8\)"),
    ],
)
def test_an_edit_that_does_not_fit_the_model_is_refused_and_changes_nothing(made, message):
    model = tiny_model("llama")
    before = trace(model)
    with pytest.raises(InvalidInputError, match=message), edit(model, ScaleHeads({(0, 0): 2.0}), made):
        pass
    assert_same_trace(before, trace(model))


def test_no_edits_no_samples_no_tokens_and_no_model_are_refused():
    model = tiny_model("llama")
    with pytest.raises(InvalidInputError, match=r"edits: .*at least one"), edit(model):
        pass
    with pytest.raises(InvalidInputError, match="samples: "):
        head_outputs(model, [])
    with pytest.raises(InvalidInputError, match="tokens: got 0"):
        head_outputs(model, [TextSample((1, 2, 3))], tokens=0)
    with (
        pytest.raises(SparingError, match="not a transformers model"),
        edit(torch.nn.Linear(2, 2), ScaleHeads({(0, 0): 2.0})),
    ):
        pass


def test_heads_are_named_or_taken_from_a_measurement():
    assert chosen_heads([(1, 2), [0, 3], (1, 2)]) == ((1, 2), (0, 3))
    with pytest.raises(InvalidInputError, match="at least one"):
        chosen_heads([])
    scores = score(tiny_model("llama"), "sink_mass", data=[TextSample(tuple(range(1, 20)))])
    assert chosen_heads(scores, 3) == tuple(scores.top(3))
    assert len(chosen_heads(scores, 0.25)) == 2
    with pytest.raises(InvalidInputError, match="top: got None"):
        chosen_heads(scores)
    others = Scores(torch.zeros(2, 2), ("layer", "kv_head"), "x", scores.model)
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        chosen_heads(others, 1)
