"""ACT against the paper's procedure, column by column in loops, and against a map worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.editing import edit
from sparing.errors import InvalidInputError
from sparing.measures import attention
from sparing.methods.heads.act import RedistributeSinks
from tests.methods.heads import edited_attention as slow
from tests.methods.heads.slow import model_of

ALL = tuple((layer, head) for layer in range(2) for head in range(4))


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """Three tiles of rows instead of one."""
    monkeypatch.setattr(attention, "ROWS_PER_TILE", 16)


def calibrated(rows, visible, beta, theta):
    """The paper's three steps on one head's (T, T) map, the first token spared; `visible` is (T, T) bool."""
    tokens = len(rows)
    sinks = []
    for j in range(1, tokens):
        viewers = [i for i in range(tokens) if visible[i, j]]
        if sum(float(rows[i, j]) for i in viewers) / len(viewers) > theta:
            sinks.append(j)
    new = rows.clone()
    for i in range(tokens):
        others = [j for j in range(tokens) if j not in sinks]
        rest = sum(float(rows[i, j]) for j in others)
        if rest == 0.0:
            continue
        freed = sum((1 - beta) * float(rows[i, j]) for j in sinks)
        for j in range(tokens):
            new[i, j] = beta * rows[i, j] if j in sinks else rows[i, j] + freed * rows[i, j] / rest
    assert torch.allclose(new.sum(-1), torch.ones(tokens, dtype=rows.dtype))
    return new


@pytest.mark.parametrize(("beta", "theta"), [(0.4, 0.07), (0.0, 0.05)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3"])
def test_sinks_give_to_the_rest_as_the_paper_says(name, beta, theta):
    def change(rows, logits):
        return calibrated(rows, ~logits.isinf(), beta, theta)

    slow.check_first_layer(model_of(name), RedistributeSinks(((0, 1), (0, 2)), beta, theta), [1, 2], change)


# Column means over the rows that see them: 0.7125, 0.45, 0.25, 0.1. With θ = 0.3 token 1 is a sink; token 0 is spared.
ROWS = torch.tensor(
    [
        [1.00, 0.00, 0.00, 0.00],
        [0.40, 0.60, 0.00, 0.00],
        [0.25, 0.50, 0.25, 0.00],
        [0.50, 0.25, 0.15, 0.10],
    ],
    dtype=torch.float64,
)
# β = 0.4: row 1 frees 0.36 for token 0 alone; row 2 frees 0.3, half and half; row 3 frees 0.15 onto 0.75, a fifth each.
EDITED = torch.tensor(
    [
        [1.00, 0.00, 0.00, 0.00],
        [0.76, 0.24, 0.00, 0.00],
        [0.40, 0.20, 0.40, 0.00],
        [0.60, 0.10, 0.18, 0.12],
    ],
    dtype=torch.float64,
)


def test_by_hand():
    made = RedistributeSinks(((0, 0),), 0.4, 0.3)
    is_sink = torch.tensor([[[False, True, False, False]]])
    assert torch.allclose(made.redistributed(ROWS[None, None], is_sink), EDITED)
    assert torch.allclose(calibrated(ROWS, torch.ones(4, 4).tril().bool(), 0.4, 0.3), EDITED)
    values = torch.tensor([1000.0, 100.0, 10.0, 1.0], dtype=torch.float64)
    found = made.attention(slow.call_with(ROWS, values), slow.attend)
    assert torch.allclose(found.flatten(), EDITED @ values)


def test_rows_that_see_sinks_only_stay_and_all_keep_their_sum():
    rows = torch.tensor([[[[0.0, 0.7, 0.3], [0.2, 0.5, 0.3], [0.0, 0.0, 0.0], [0.1, 0.2, 0.3]]]], dtype=torch.float64)
    sinks = torch.tensor([[[False, True, True]]])
    found = RedistributeSinks(((0, 0),), 0.25).redistributed(rows, sinks)
    assert torch.equal(found[0, 0, 0], rows[0, 0, 0])
    assert torch.allclose(found.sum(-1), rows.sum(-1))
    assert found[0, 0, 1].tolist() == pytest.approx([0.8, 0.125, 0.075])
    assert not found[0, 0, 2].any(), "a pad's row stays 0"


def test_the_first_token_is_found_behind_pads():
    for name in ("llama", "gemma3", "gpt2"):
        slow.check_batch_and_decoding(model_of(name), RedistributeSinks(ALL, 0.2, 0.05), decodes=False)


def test_single_later_tokens_are_not_edited():
    model = model_of("llama")
    call = slow.call_with(ROWS, torch.arange(4.0))
    last = type(call)(
        0, call.queries[:, :, 3:], call.keys, call.values, call.softmax, lambda r: call.may_see(slice(3, 4))
    )
    assert torch.equal(RedistributeSinks(((0, 0),), 0.0, 0.05).attention(last, slow.attend), slow.attend(last))
    with torch.no_grad(), edit(model, RedistributeSinks(ALL, 0.0, 0.05)):
        prompt = model(slow.IDS[:1, :-1], use_cache=True)
        edited = model(slow.IDS[:1, -1:], past_key_values=prompt.past_key_values).logits
    assert edited.isfinite().all()


@pytest.mark.parametrize("made", [RedistributeSinks(ALL, 1.0, 0.05), RedistributeSinks(ALL, 0.4, 0.99)])
def test_keeping_all_or_finding_no_sinks_changes_nothing(made):
    model = model_of("llama")
    with torch.no_grad():
        plain = model(slow.IDS).logits
        with edit(model, made):
            found = model(slow.IDS).logits
    assert torch.equal(found, plain) if made.beta == 1.0 else torch.allclose(found, plain, atol=1e-4)


def test_generated_tokens_change():
    model, ids = model_of("llama"), slow.IDS[:1]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **how)
    with edit(model, RedistributeSinks(ALL, 0.0, 0.03)):
        assert not torch.equal(model.generate(ids, **how), plain)
    assert torch.equal(model.generate(ids, **how), plain)


def test_bad_input_is_refused():
    for field, values in (("beta", (-0.1, 1.1, math.nan)), ("theta", (0.0, 1.0, math.nan))):
        for value in values:
            with pytest.raises(InvalidInputError, match=f"{field}: .*a share in"):
                RedistributeSinks(((0, 0),), **{field: value})
    with pytest.raises(InvalidInputError, match=r"pairs: .*at least one"):
        RedistributeSinks(())
    with pytest.raises(InvalidInputError, match="layers 0 to 1"), edit(model_of("llama"), RedistributeSinks(((2, 0),))):
        pass
