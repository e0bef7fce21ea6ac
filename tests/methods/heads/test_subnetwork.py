"""The learned mask: needed heads stay, heads that reach nothing go, and what the notes say is so."""

import math

import pytest
import torch
from torch.nn import functional

from sparing.adapters.lens import ModelLens
from sparing.core.samples import NeedleSample
from sparing.errors import InvalidInputError
from sparing.methods.heads.subnetwork import Subnetwork, gated_loss
from sparing.scoring import score
from sparing.testing import assert_same_trace, tiny_model, trace


def planted(*heads):
    """A model in which only these heads reach the residual stream, and loudly."""
    model = tiny_model("llama")
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            keep = torch.zeros(4, 8)
            for layer, head in heads:
                keep[head] += 4.0 * (layer == number)
            block.self_attn.o_proj.weight.mul_(keep.flatten())
    return model


def samples(model, count=8):
    """Random prompts; the answer is what the model says next, so it can be had from its heads alone."""
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(1, 64, (1, 12 + i), generator=g)
        with torch.no_grad():
            answer = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :].tolist()
        made.append(NeedleSample(tuple(ids[0].tolist()), tuple(answer), ("?",), (0, 1), (0, 1), 2))
    return made


def slow_loss(model, data, dropped):
    """Each sample by itself, in a model whose projection has zeros where the dropped heads come in."""
    with torch.no_grad():
        for layer, head in dropped:
            model.model.layers[layer].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
        total = []
        for sample in data:
            logits = model(torch.tensor([[*sample.ids, *sample.answer_ids[:-1]]])).logits[0, len(sample.ids) - 1 :]
            total += functional.cross_entropy(logits, torch.tensor(sample.answer_ids), reduction="none").tolist()
    return sum(total) / len(total)


ALL = [(layer, head) for layer in range(2) for head in range(4)]


@pytest.mark.parametrize("needed", [[(0, 1)], [(1, 3)], [(0, 0), (1, 2)]])
def test_needed_heads_stay_and_others_go(needed):
    model = planted(*needed)
    data = samples(model)
    found = score(model, Subnetwork(), data=data)
    expected = torch.zeros(2, 4)
    for unit in needed:
        expected[unit] = 1.0
    assert torch.allclose(found.values, expected, atol=1e-3)
    assert int(found.extras["kept"]) == len(needed)
    everything, alone = found.extras["answer_loss"].tolist()
    assert alone == pytest.approx(everything, rel=1e-5)
    assert slow_loss(model, data, needed) > everything + 0.5  # they were needed indeed


def test_losses_are_those_of_the_model_with_and_without_the_dropped_heads():
    model = tiny_model("llama")
    data = samples(model)
    found = score(model, Subnetwork(penalty=2.0, steps=30, learning_rate=0.2), data=data, batch_size=3)
    dropped = [unit for unit in ALL if found.values[unit] < 0.5]
    assert 0 < len(dropped) < 8
    everything, alone = found.extras["answer_loss"].tolist()
    assert everything == pytest.approx(slow_loss(tiny_model("llama"), data, []), rel=1e-5)
    assert alone == pytest.approx(slow_loss(tiny_model("llama"), data, dropped), rel=1e-5)
    assert int(found.extras["kept"]) == 8 - len(dropped)
    assert found.notes[1].startswith(f"{8 - len(dropped)} of 8 heads kept; loss on the answers {alone:.4g} with these")


def test_gates_multiply_the_heads_outputs():
    """Half a gate is half the projection's columns."""
    model, data = tiny_model("llama"), samples(tiny_model("llama"), 3)
    halved = tiny_model("llama")
    with torch.no_grad():
        halved.model.layers[1].self_attn.o_proj.weight[:, 16:24] *= 0.5
        gates = torch.ones(2, 4)
        gates[1, 2] = 0.5
        assert float(gated_loss(ModelLens(model), data, gates)) == pytest.approx(slow_loss(halved, data, []), rel=1e-5)


def test_the_first_step_has_every_gate_half_open():
    model = tiny_model("llama")
    data = samples(model, 3)
    found = score(model, Subnetwork(penalty=0.4, steps=1), data=data)
    with torch.no_grad():
        half = float(gated_loss(ModelLens(model), data, torch.full((2, 4), 0.5)))
    assert found.extras["loss"][0].tolist() == pytest.approx([half, 0.2], rel=1e-5)


def test_gates_grow_sharper_by_a_factor_each_step():
    """Where no head reaches anything, m has the penalty's gradient alone, and AdamW's steps are worked out here."""
    model = planted()
    found = score(model, Subnetwork(penalty=0.8, steps=3, learning_rate=0.1, sharpness=4.0), data=samples(model, 2))
    number = first = second = 0.0
    penalties = []
    for step, sharpness in enumerate([1.0, 2.0, 4.0], 1):
        gate = 1 / (1 + math.exp(-sharpness * number))
        penalties.append(0.8 * gate)
        gradient = 0.8 / 8 * sharpness * gate * (1 - gate)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        number -= 0.1 * (first / (1 - 0.9**step)) / math.sqrt(second / (1 - 0.999**step))
    assert found.extras["loss"][:, 1].tolist() == pytest.approx(penalties, rel=1e-5)
    assert found.values.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-4 * number))] * 8, rel=1e-4)


def test_a_higher_penalty_keeps_fewer_heads():
    model = tiny_model("llama")
    data = samples(model)
    kept = [int(score(model, Subnetwork(penalty=p, steps=40), data=data).extras["kept"]) for p in (0.0, 1.0, 1000.0)]
    assert kept[0] > kept[1] > kept[2] == 0


def test_same_seed_same_gates():
    model = tiny_model("llama")
    data = samples(model)
    measure = lambda seed: score(model, Subnetwork(steps=6), data=data, seed=seed, batch_size=2).values  # noqa: E731
    assert torch.equal(measure(1), measure(1))
    assert not torch.equal(measure(1), measure(2))


def test_time_limit_and_interruption_leave_the_model_as_it_was():
    model = tiny_model("llama")
    data, before = samples(model, 3), trace(model)

    def interrupt(done, total, what):
        raise KeyboardInterrupt

    found = score(model, Subnetwork(), data=data, max_seconds=1e-9)
    assert found.notes[0] == "stopped after 1 of 100 steps: 1e-09 s had passed"
    with pytest.raises(KeyboardInterrupt):
        score(model, Subnetwork(), data=data, progress=interrupt)
    assert_same_trace(before, trace(model))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bad", [{"penalty": -0.1}, {"steps": 0}, {"learning_rate": 0.0}, {"sharpness": 0.5}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        Subnetwork(**bad)
