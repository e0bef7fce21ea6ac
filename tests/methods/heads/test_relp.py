"""RelP: rules that change gradients and nothing else, against the paper's stop-gradients written out."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.adapters.relevance import STABILISER
from sparing.core.samples import PairSample
from sparing.errors import InvalidInputError, UnsupportedModelError
from sparing.methods.heads.activation_patching import KINDS
from sparing.methods.heads.attribution_patching import AttributionPatching
from sparing.methods.heads.relp import DEFAULT, RULES, RelevancePatching, ResidualRelevance, at_work, parse_rules
from sparing.scoring import score
from sparing.testing import tiny_model
from tests.methods.heads import gradients, slow

ALL = "+".join(RULES)
CLOSE = 1e-6
SOME_RULES = [*RULES, DEFAULT, ALL]


def exact_llama(seed: int = 0):
    """Without biases, and float64 throughout."""
    return gradients.with_norms(slow.model_of("llama", seed))


# -- the rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", SOME_RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "gpt2"])
def test_the_forward_stays_as_it_was_bit_for_bit(name, dtype, rules):
    model = tiny_model(name, dtype)
    lens = ModelLens(model)
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :5] = False
    before = lens.forward(ids, mask).detach()[mask]
    with at_work(lens, rules):
        assert torch.equal(lens.forward(ids, mask).detach()[mask], before)
        with torch.no_grad():
            assert torch.equal(lens.forward(ids, mask)[mask], before)


@pytest.mark.parametrize("rules", ["layer_norm", "identity", "half", "layer_norm+identity", DEFAULT])
@pytest.mark.parametrize("seed", [0, 1])
def test_heads_are_the_formula_with_the_papers_stop_gradients(rules, seed):
    model = exact_llama(seed)
    sample = slow.pair(model, seed=seed)
    found = score(model, RelevancePatching(rules), data=[sample]).values
    ruled = gradients.with_rules(exact_llama(seed), rules)
    expected = gradients.per_head(gradients.effects(model, sample, gradients.heads_place, ruled))
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=CLOSE)
    plain = score(model, AttributionPatching(), data=[sample]).values
    assert float((found - plain).abs().max()) > 1e-4, "the rules make a difference"


def test_places_are_the_formula_with_the_papers_stop_gradients():
    model = exact_llama()
    sample = slow.pair(model)
    found = score(model, ResidualRelevance(), data=[sample])
    ruled = gradients.with_rules(exact_llama(), DEFAULT)
    for kind, place in enumerate(gradients.PLACES):
        expected = gradients.effects(model, sample, place, ruled).sum(-1)
        assert torch.allclose(found.values[:, :, kind].double(), expected, rtol=1e-5, atol=CLOSE), KINDS[kind]
    assert found.axes == ("layer", "position", "kind")
    assert found.labels["kind"] == KINDS
    assert not found.values[:, : min(sample.changed)].any()


@pytest.mark.parametrize(("name", "plus"), [("llama", 0.0), ("gemma3", 1.0)])
def test_the_gradient_of_a_root_mean_square_norm(name, plus):
    """∂ Σ r·norm(x) = r · (plus + weight) / scale, with weights that are not one."""
    model = slow.model_of(name)
    norm = slow.blocks(model)[0].input_layernorm
    x, r = _random_input(norm)
    found = _gradient_by_rule(model, norm, x, r)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    expected = r * (plus + norm.weight) / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    assert torch.allclose(found, expected, rtol=1e-5)  # the module's weight is read off in float32


def test_the_gradient_of_a_layer_norm():
    """The mean is subtracted in the gradient as well; the bias has no part in it."""
    model = slow.model_of("gpt2")
    norm = slow.blocks(model)[0].ln_1
    x, r = _random_input(norm)
    torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    found = _gradient_by_rule(model, norm, x, r)
    through = r * norm.weight / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    assert torch.allclose(found, through - through.mean(-1, keepdim=True), rtol=1e-9, atol=1e-12)


def _random_input(norm):
    g = torch.Generator().manual_seed(1)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=g)  # away from 0, also with 1 added
    return (3 * torch.randn(2, 5, 32, dtype=torch.float64, generator=g) + 1 for _ in range(2))


def _gradient_by_rule(model, norm, x, r):
    leaf = x.clone().requires_grad_()
    with at_work(ModelLens(model), "layer_norm"):
        return torch.autograd.grad((norm(leaf) * r).sum(), leaf)[0]


def test_identity_and_half_by_hand():
    """One neuron: gate g, up u, silu(g)·u; identity takes silu(g)/g as the slope, half gives each factor a half."""
    model = exact_llama()
    block = slow.mlp(model, 0)
    with torch.no_grad():
        for linear in (block.gate_proj, block.up_proj, block.down_proj):
            linear.weight.zero_()
        block.gate_proj.weight[0, 0], block.up_proj.weight[0, 0], block.down_proj.weight[0, 0] = 2.0, 3.0, 1.0
    x = torch.zeros(1, 1, 32, dtype=torch.float64)
    x[..., 0] = 0.5  # gate 1, up 1.5
    sigmoid = float(torch.tensor(1.0, dtype=torch.float64).sigmoid())
    slope = sigmoid * (1 + (1 - sigmoid))  # of silu at 1
    by_gate, by_up = 2.0 * 1.5, 3.0 * sigmoid
    expected = {
        "layer_norm": slope * by_gate + by_up,
        "identity": sigmoid * by_gate + by_up,
        "half": (slope * by_gate + by_up) / 2,
        "identity+half": (sigmoid * by_gate + by_up) / 2,
    }
    lens = ModelLens(model)
    for rules, value in expected.items():
        leaf = x.clone().requires_grad_()
        with at_work(lens, rules):
            (found,) = torch.autograd.grad(block(leaf)[0, 0, 0], leaf)
        assert float(found[0, 0, 0]) == pytest.approx(value, abs=3 * STABILISER), rules


# -- conservation ------------------------------------------------------------------------------------------------------


def relevance_of_embeddings(model, ids, rules):
    """Σ embedding · gradient of the largest last logit, that logit, and how much the stabiliser may have cost.

    act(x) / (x ± s) · x misses act(x) by at most s · |act(x) / x| <= s, for silu; of a neuron's relevance half comes by
    way of its gate, so that s/2 · Σ |up · ∂logit/∂(act·up)| is all that can be missing.
    """
    lens = ModelLens(model)
    leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
    ups, products = [], []
    with ExitStack() as stack:
        stack.enter_context(at_work(lens, rules))
        for layer in range(lens.num_layers):
            block = slow.mlp(model, layer)
            stack.callback(block.up_proj.register_forward_hook(lambda _, args, out: ups.append(out.detach())).remove)
            stack.callback(block.down_proj.register_forward_pre_hook(lambda _, args: products.append(args[0])).remove)
        with lens.hooked(sites={"resid_pre": lambda layer, x: leaf if layer == 0 else None}):
            logit = lens.forward(ids, last=1)[0, -1].max()
        gradient, *through = torch.autograd.grad(logit, [leaf, *products])
    missing = sum(float((up * g).abs().sum()) for up, g in zip(ups, through, strict=True)) * STABILISER / 2
    return float((leaf.detach() * gradient).sum()), float(logit.detach()), missing


@pytest.mark.parametrize("seed", range(3))
def test_with_all_rules_the_embeddings_relevance_is_the_logit(seed):
    model = exact_llama(seed)
    ids = torch.randint(1, 64, (1, 16), generator=torch.Generator().manual_seed(seed))
    total, logit, missing = relevance_of_embeddings(model, ids, ALL)
    assert abs(logit) > 0.1
    assert missing < 1e-3
    assert total == pytest.approx(logit, abs=missing + 1e-9)


@pytest.mark.parametrize("without", RULES)
def test_without_any_one_of_the_rules_it_is_not(without):
    model = exact_llama()
    ids = torch.randint(1, 64, (1, 16), generator=torch.Generator().manual_seed(0))
    total, logit, missing = relevance_of_embeddings(model, ids, "+".join(rule for rule in RULES if rule != without))
    assert abs(total - logit) > 100 * missing


# -- a trace that is not left ------------------------------------------------------------------------------------------


def traces(model):
    """Everything that a rule may have put on a module."""
    hooked = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    swapped = [name for name, m in model.named_modules() if "forward" in vars(m)]
    return hooked, swapped


@pytest.mark.parametrize("rules", SOME_RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_everything_is_as_it_was_afterwards_and_after_an_error(name, rules):
    model = slow.model_of(name)
    lens = ModelLens(model)
    implementation, before = model.config._attn_implementation, _gradient(model)
    assert traces(model) == ([], [])
    with at_work(lens, rules):
        # The rule of attention works through the model's attention function, and GPT-2's MLP has no gate to halve.
        leaves_modules_alone = rules == "attention" or (name == "gpt2" and rules == "half")
        assert (traces(model) == ([], [])) == leaves_modules_alone
    assert traces(model) == ([], [])
    with pytest.raises(ZeroDivisionError), at_work(lens, rules):
        raise ZeroDivisionError
    assert traces(model) == ([], [])
    assert model.config._attn_implementation == implementation
    assert torch.equal(_gradient(model), before)


def _gradient(model):
    embedding = model.get_input_embeddings().weight
    logits = model(torch.arange(1, 13)[None]).logits
    return torch.autograd.grad(logits[0, -1].max(), embedding)[0]


def test_an_error_within_a_forward_leaves_nothing():
    model = slow.model_of("llama")

    def fail(module, args):
        raise ZeroDivisionError

    sample = slow.pair(model)
    hook = slow.mlp(model, 1).down_proj.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        score(model, RelevancePatching(ALL), data=[sample])
    hook.remove()
    assert traces(model) == ([], [])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# -- names and refusals ------------------------------------------------------------------------------------------------


def test_rules_in_any_order_are_the_same():
    model = slow.model_of("llama")
    sample = slow.pair(model)
    values = [
        score(model, RelevancePatching("+".join(names)), data=[sample]).values
        for names in itertools.permutations(("layer_norm", "identity", "half"))
    ]
    assert all(torch.equal(each, values[0]) for each in values)
    assert parse_rules(DEFAULT) == {"layer_norm", "identity", "half"}
    assert torch.equal(score(model, "relp", data=[sample]).values, values[0])


@pytest.mark.parametrize("rules", ["", "layernorm", "layer_norm,half", "layer_norm+", "HALF"])
def test_rules_that_are_none_are_refused(rules):
    for scorer in (RelevancePatching, ResidualRelevance):
        with pytest.raises(InvalidInputError, match="layer_norm, identity, half, attention"):
            scorer(rules)


def test_models_without_plain_mlps_are_refused_and_left_as_they_were():
    model = tiny_model("mixtral")
    sample = PairSample((1, 2, 3, 4), (1, 5, 3, 4), 6, 7)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        score(model, RelevancePatching(), data=[sample])
    assert traces(model) == ([], [])


def test_prompts_that_cannot_be_patched_are_refused():
    model = slow.model_of("llama")
    for scorer in (RelevancePatching(), ResidualRelevance()):
        with pytest.raises(InvalidInputError, match="3 and 2 tokens"):
            score(model, scorer, data=[PairSample((1, 2, 3), (1, 2), 4, 5)])
        with pytest.raises(InvalidInputError, match="on both prompts"):
            score(model, scorer, data=[PairSample((1, 2, 3), (1, 2, 3), 4, 5)])
    with pytest.raises(InvalidInputError, match="exactly 1"):
        score(model, ResidualRelevance(), data=[slow.pair(model), slow.pair(model, seed=1)])
