"""The learning loop: AdamW by its definition, schedules, limits, and a model that is left as it was found."""

import math

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.core.head_scorer import Run
from sparing.core.samples import NeedleSample
from sparing.errors import InvalidInputError
from sparing.measures.optimise import (
    answer_loss,
    constant,
    falling,
    frozen,
    learn,
    numbers_for,
    shuffled,
    trapezoid,
)
from sparing.testing import tiny_model


@pytest.fixture(scope="module")
def lens():
    return ModelLens(tiny_model("llama", torch.float64))


def needle(ids, answer):
    return NeedleSample(tuple(ids), tuple(answer), ("?",), (0, 1), (0, 1), len(answer))


def bowl(numbers):
    """(x - 3)², and a penalty |x| / 2."""
    return lambda step, batch: ((numbers - 3).square().sum(), numbers.abs().sum() / 2)


def adamw(start, gradient, rates):
    """AdamW without decay, one number, as its paper writes it."""
    x, m, v = start, 0.0, 0.0
    for t, rate in enumerate(rates, 1):
        g = gradient(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= rate * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


@pytest.mark.parametrize("schedule", [constant, falling, trapezoid])
def test_numbers_move_as_adamw_moves_them(lens, schedule):
    numbers = numbers_for(lens, torch.tensor([1.0]))
    learned = learn(
        lens, numbers, bowl(numbers), Run([0]), steps=20, learning_rate=0.1, batch_size=1, schedule=schedule
    )
    rates = [0.1 * schedule(step, 20) for step in range(20)]
    assert numbers.item() == pytest.approx(adamw(1.0, lambda x: 2 * (x - 3) + 0.5, rates), abs=1e-9)
    assert learned.curve.shape == (20, 2)
    assert learned.curve[0].tolist() == [4.0, 0.5]
    assert learned.notes == ("all 20 steps were taken",)


def test_numbers_stay_within_bounds(lens):
    numbers = numbers_for(lens, torch.ones(2))
    learn(lens, numbers, bowl(numbers), Run([0]), steps=5, learning_rate=1.0, batch_size=1, bounds=(0.0, 1.25))
    assert numbers.tolist() == [1.25, 1.25]


def test_schedules():
    """Ten steps: the ramps of the trapezoid are two steps long."""
    assert [trapezoid(step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]
    assert [trapezoid(step, 100) for step in (0, 1, 9, 19, 50, 80, 90, 99)] == pytest.approx(
        [0.1, 0.1, 0.5, 1, 1, 1, 0.5, 0.1]
    )
    assert [falling(step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert trapezoid(0, 1) == 1


def test_epochs_have_all_samples_in_orders_that_the_seed_gives():
    def three_epochs(seed):
        batches = shuffled(Run(list(range(10)), seed=seed), 4)
        return [next(batches) for _ in range(9)]

    epochs = three_epochs(1)
    assert [len(batch) for batch in epochs] == [4, 4, 2] * 3
    orders = [[sample for batch in epochs[i : i + 3] for sample in batch] for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epochs == three_epochs(1)
    assert epochs != three_epochs(2)


def test_the_time_limit_holds_and_is_told(lens):
    numbers, told = numbers_for(lens, torch.ones(1)), []
    run = Run([0], max_seconds=1e-9, progress=lambda *what: told.append(what))
    learned = learn(lens, numbers, bowl(numbers), run, steps=50, learning_rate=0.1, batch_size=1)
    assert learned.curve.shape == (1, 2)
    assert learned.notes == ("stopped after 1 of 50 steps: 1e-09 s had passed",)
    assert told == [(1, 50, "loss 4.5")]


def test_a_loss_that_explodes_is_named(lens):
    numbers = numbers_for(lens, torch.ones(1))
    with pytest.raises(InvalidInputError, match="loss at step 1: got inf"):
        learn(
            lens, numbers, lambda step, _: (numbers.sum() / (1 - step),), Run([0]), steps=3, learning_rate=1.0,
            batch_size=1,
        )  # fmt: skip


def test_a_frozen_model_gets_no_gradients_and_is_restored():
    model = tiny_model("llama")
    parameters = list(model.parameters())
    parameters[1].requires_grad_(False)
    before = [parameter.requires_grad for parameter in parameters]

    def interrupted():
        with torch.no_grad(), frozen(model):
            assert torch.is_grad_enabled()
            assert not any(parameter.requires_grad for parameter in parameters)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in parameters] == before


def test_answer_loss_is_the_cross_entropy_of_every_answer_token(lens):
    """One sequence at a time, one token at a time: -log p(token | all before it), then the mean over all tokens."""
    g = torch.Generator().manual_seed(0)
    samples = [
        needle(torch.randint(1, 64, (length,), generator=g).tolist(), torch.randint(1, 64, (n,), generator=g).tolist())
        for length, n in [(9, 3), (14, 1), (5, 4)]
    ]
    losses = []
    for sample in samples:
        for t, token in enumerate(sample.answer_ids):
            with torch.no_grad():
                logits = lens.model(torch.tensor([[*sample.ids, *sample.answer_ids[:t]]])).logits[0, -1]
            losses.append(float(logits.logsumexp(0) - logits[token]))
    with torch.no_grad():
        found = answer_loss(lens, samples)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(sum(losses) / 8, abs=1e-9)


def test_a_sample_without_an_answer_is_refused(lens):
    with pytest.raises(InvalidInputError, match="without an answer"):
        answer_loss(lens, [needle([1, 2], [3]), needle([1, 2], [])])


def test_numbers_are_as_exact_as_the_model(lens):
    assert numbers_for(lens, torch.ones(1)).dtype == torch.float64
    start = torch.ones(1)
    half = numbers_for(ModelLens(tiny_model("llama", torch.bfloat16)), start)
    assert half.dtype == torch.float32
    assert half.requires_grad
    assert half.data_ptr() != start.data_ptr()
