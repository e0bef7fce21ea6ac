"""DeltaLLM: keys that a chain of thresholded differences gives back."""

import pytest
import torch
from oracles import random_case

import sparing
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.kv.deltallm import DeltaLLM, Differences, reconstructed
from sparing.methods.kv.streaming_llm import Recency
from sparing.testing import random_prompt, run_method, tiny_model

PADS = (0, 3, 7)


def chain(numbers: list[float], theta: float) -> list[float]:
    """One channel of one head: the recursion, a number at a time."""
    held, result = numbers[0], [numbers[0]]
    for number in numbers[1:]:
        difference = number - held
        held += difference if abs(difference) >= theta else 0.0
        result.append(held)
    return result


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.5, 100.0])
def test_reconstructs_as_the_recursion_says(theta):
    stored = random_case(seed=1).stored
    keys, skipped = reconstructed(stored.keys.double(), stored.valid, theta)
    for row, pad in enumerate(PADS):
        for head in range(2):
            for channel in range(8):
                wanted = chain(stored.keys[row, head, pad:, channel].double().tolist(), theta)
                assert keys[row, head, pad:, channel].tolist() == pytest.approx(wanted, abs=1e-12)
    assert torch.equal(keys, stored.keys.double()) == (theta == 0.0)
    assert bool(((keys - stored.keys.double()).abs() < max(theta, 1e-300))[stored.valid].all())
    assert not skipped[~stored.valid].any()
    assert not skipped[:, :, 0].any()


def test_a_chain_worked_out_by_hand():
    keys = torch.tensor([1.0, 1.2, 1.5, 1.4, 3.0, 2.9])[None, None, :, None]
    result, skipped = reconstructed(keys, torch.ones(1, 1, 6, dtype=torch.bool), 0.4)
    assert result.flatten().tolist() == pytest.approx([1.0, 1.0, 1.5, 1.5, 3.0, 3.0])
    assert skipped.flatten().tolist() == [False, True, False, True, False, True]


def test_errors_do_not_add_up_and_doing_it_again_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(1, 2, 400, 4, generator=generator).cumsum(2) * 0.05
    valid = torch.ones(1, 2, 400, dtype=torch.bool)
    once, _ = reconstructed(keys, valid, 0.2)
    assert float((once - keys).abs().max()) < 0.2
    assert torch.equal(reconstructed(once, valid, 0.2)[0], once)
    turns = torch.cat([reconstructed(keys[:, :, :250], valid[:, :, :250], 0.2)[0], keys[:, :, 250:]], dim=2)
    assert torch.equal(reconstructed(turns, valid, 0.2)[0], once)  # a second turn goes on where the first ended


def test_the_window_keeps_its_keys_and_values_stay():
    stored = random_case(seed=3).stored
    kept = [[torch.arange(9, 13), torch.arange(9, 13)] for _ in range(3)]
    folded = Differences(0.8).apply(kept, stored, torch.zeros(3, 2, 13))
    assert torch.equal(folded.keys[:, :, 9:], stored.keys[:, :, 9:])
    assert not torch.equal(folded.keys[:, :, :9], stored.keys[:, :, :9])
    assert torch.equal(folded.values, stored.values)
    assert [slots.tolist() for slots in folded.kept[1]] == [list(range(3, 13))] * 2
    exact, skipped = reconstructed(stored.keys, stored.valid, 0.8)
    outside = sum(int(skipped[row, :, pad:9].sum()) for row, pad in enumerate(PADS))
    assert folded.zeros == (outside, 2 * (13 + 10 + 6) * 8)
    assert torch.equal(folded.keys[0, :, :9], exact[0, :, :9])


def test_theta_zero_and_a_window_of_everything_are_exact():
    prompt = random_prompt(50, steps=4)
    model = tiny_model("llama", torch.float64)
    dense = run_method(model, DeltaLLM(1.0), prompt).logits
    for method in (DeltaLLM(0.2, theta=0.0), DeltaLLM(50, theta=9.0)):
        for mine, theirs in zip(run_method(model, method, prompt).logits, dense, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    other = run_method(model, DeltaLLM(0.2, theta=9.0), prompt).logits
    assert float((other[-1] - dense[-1]).abs().max()) > 1e-3


def test_the_report_says_what_is_zero_and_that_nothing_is_freed():
    run = run_method(tiny_model("llama"), DeltaLLM(0.2, theta=1e9), random_prompt(50))
    # All numbers outside the window of 10 but those of the first token: 39 of 50 tokens.
    assert "nothing freed: of the differences that stand for its keys, 78.0% are zero" in str(run.cache.report())
    assert run.cache.report().bytes_kept >= run.cache.report().bytes_full
    exact = run_method(tiny_model("llama"), DeltaLLM(1.0), random_prompt(50))
    assert exact.cache.report().notes == ()


def test_what_is_refused():
    assert DeltaLLM().theta == 0.1
    for theta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="theta"):
            DeltaLLM(theta=theta)
    with pytest.raises(MethodRefusedError, match="frees nothing"):
        sparing.Evict(0.5, Recency(), moment="every_step", action=Differences())
