"""DeltaLLM while the prompt is read: chains by hand, window and rest by the equation, the share of zeros."""

from dataclasses import replace

import pytest
import torch

import sparing
from methods.prefill.sparse_calls import EPS, assert_batch_is_rows, logits, random_call, said, tokens
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.deltallm import DeltaLLMPrefill, chains
from sparing.testing import tiny_model


def chain(numbers, theta, size):
    """One channel of one head: the recursion, a number at a time, begun again at every block."""
    held, result = 0.0, []
    for at, number in enumerate(numbers):
        difference = number - held
        held += difference if at % size == 0 or abs(difference) >= theta else 0.0
        result.append(held)
    return result


def by_hand(call, theta, size, window):
    """(Hq, Q, Dv) float64: logits of true keys for a window of blocks, of the chain's keys for all others."""
    keys = torch.tensor([
        [chain(channel, theta, size) for channel in head.double().mT.tolist()] for head in call.keys
    ], dtype=torch.float64).mT  # fmt: skip
    near = -(-window // size)
    rows, columns = torch.arange(call.start, call.tokens)[:, None], torch.arange(call.tokens)
    true, simulated = logits(call), logits(replace(call, keys=keys))
    mixed = torch.where(rows // size - columns // size <= near, true, simulated)
    return mixed.softmax(-1) @ call.values.double().repeat_interleave(call.group, dim=0)


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.5, 50.0])
@pytest.mark.parametrize(("count", "start"), [(150, 0), (144, 0), (150, 37), (150, 96), (20, 0), (150, 140)])
@pytest.mark.parametrize("window", [0, 20, 64])
def test_it_attends_as_the_equation_says(theta, count, start, window):
    call = random_call(count, start)
    attended = DeltaLLMPrefill(1.0, block=16, theta=theta, window=window).attend(call)
    size = call.query.norm(dim=-1).max() * call.keys.norm(dim=-1).max() * call.softmax.scaling
    bound = 4 * EPS * float(call.keys.shape[-1] * size + count) * float(call.values.abs().max())
    assert float((attended.part.out - by_hand(call, theta, 16, window)).abs().max()) <= bound


def test_a_chain_worked_out_by_hand():
    keys = torch.tensor([1.0, 1.2, 1.5, 1.4, 3.0, 2.9, 2.5, 2.6])[None, :, None].unflatten(1, (2, 4))
    result, skipped = chains(keys, 0.4)
    assert result.flatten().tolist() == pytest.approx([1.0, 1.0, 1.5, 1.5, 3.0, 3.0, 2.5, 2.5])
    assert skipped.flatten().tolist() == [False, True, False, True, False, True, False, True]
    assert torch.equal(chains(keys, 0.0)[0], keys)


@pytest.mark.parametrize("theta", [0.1, 0.7])
def test_no_number_is_off_by_theta(theta):
    call = random_call(300)
    keys, _ = DeltaLLMPrefill(1.0, block=16, theta=theta).differences(call)
    assert float((keys - call.keys).abs().max()) < theta
    assert not torch.equal(keys, call.keys)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 75])
@pytest.mark.parametrize("start", [0, 120])
def test_keep_is_the_share_of_differences_that_are_not_zero(keep, start):
    call, method = random_call(300, start), DeltaLLMPrefill(keep, block=16)
    attended = method.attend(call)
    zeros, numbers = attended.zeros
    allowed = method.pairs(call) / call.grid(16).all_pairs()
    assert numbers == 2 * 300 * 16
    assert allowed - 0.005 <= 1 - zeros / numbers <= allowed  # 9600 numbers, no two alike
    assert bool((attended.pattern.density() == 1).all())


def test_a_theta_is_a_lower_limit():
    call = random_call(300)
    few = DeltaLLMPrefill(0.9, block=16, theta=3.0)
    assert 1 - few.attend(call).zeros[0] / (2 * 300 * 16) < 0.2
    assert float((few.differences(call)[0] - call.keys).abs().max()) < 3.0
    many, free = (DeltaLLMPrefill(0.2, block=16, theta=theta) for theta in (0.01, None))
    assert many.attend(call).zeros[0] == pytest.approx(free.attend(call).zeros[0], rel=0.01)


def test_the_report_says_what_is_zero():
    with (
        torch.no_grad(),
        sparing.use(tiny_model("llama"), DeltaLLMPrefill(0.25, block=16, dispatch="always")) as session,
    ):
        session.model(tokens(150), use_cache=True)
        said_so = str(session.cache.prefilling.report)
    assert "100.0% of dense attention" in said_so
    share = float(said_so.split("keys, ")[1].split("%")[0])
    assert 75.0 <= share < 76.0


def test_chunks_are_refused_and_batches_are_rows():
    method = DeltaLLMPrefill(0.4, block=16, window=16)
    with pytest.raises(MethodRefusedError, match="deltallm_prefill"):
        said(method, tokens(128), [64, 64])
    assert_batch_is_rows(method)
    assert DeltaLLMPrefill(1.0).reads_all
    assert not DeltaLLMPrefill(1.0, theta=0.1).reads_all


def test_what_is_refused():
    for bad in ({"window": -1}, {"theta": -0.1}, {"theta": float("nan")}, {"theta": float("inf")}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            DeltaLLMPrefill(**bad)
