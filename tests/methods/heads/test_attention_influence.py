"""AttentionInfluence: losses by hand on the copying model, and on random models with heads averaged by plain hooks."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.errors import InvalidInputError
from sparing.methods.heads import attention_influence
from sparing.methods.heads.attention_influence import Influence, influence, mean_losses
from sparing.testing import planted, tiny_model
from tests.methods.heads import slow
from tests.methods.heads.maps import NAMES, tokens

# Losses of a few nats, from a float32 log-softmax over 64 tokens.
CLOSE = 1e-5
SLIDING_WINDOW = 16  # of gemma3's first layer

TEXT = (5, 6, 7, 8, 5, 6, 7, 8, 5)
# What stands behind the earlier copies of each row's token, which is what the model expects to come next. Row 0 sees
# only itself, and the first token counts as before itself; tokens without an earlier copy are followed by anything.
BEHIND = ({5: 1}, {5: 1, 6: 1}, {5: 1, 6: 1, 7: 1}, {5: 1, 6: 1, 7: 1, 8: 1}, {5: 1, 6: 1}, {7: 1}, {8: 1}, {5: 1})
SEEN = tuple(Counter(TEXT[: t + 1]) for t in range(len(TEXT) - 1))


def nats(shares, following):
    """Cross-entropy of the next token when the `next` slot holds these shares, through the last norm.

    The norm divides by the deviation of a stream with three ones and the shares; it gives back four ones.
    """
    total = sum(shares.values())
    shares = {token: count / total for token, count in shares.items()}
    mean, eps = 4 / planted.WIDTH, 1e-5
    squares = 3 + sum(share**2 for share in shares.values())
    scale = math.sqrt((mean - mean**2 + eps) / (squares / planted.WIDTH - mean**2 + eps))
    logits = {token: planted.CONFIDENCE * scale * share for token, share in shares.items()}
    rest = planted.SLOT - len(logits)
    return math.log(sum(map(math.exp, logits.values())) + rest) - logits.get(following, 0.0)


def mean_nats(rows):
    return sum(nats(shares, TEXT[t + 1]) for t, shares in enumerate(rows)) / len(rows)


def test_losses_worked_by_hand():
    """Without the copying head the model expects what stands anywhere before; the uniform heads are so already."""
    lens = ModelLens(planted.copying_model())
    base, reference = mean_nats(BEHIND), mean_nats(SEEN)
    found = influence(lens, [TEXT], [planted.INDUCTION])[0]
    assert found.base == pytest.approx(base, abs=CLOSE)
    assert found.reference == pytest.approx(reference, abs=CLOSE)
    assert found.tokens == 9
    assert found.score == pytest.approx((reference - base) / base, rel=CLOSE)
    assert found.score > 0
    unchanged = influence(lens, [TEXT], [planted.UNIFORM, planted.UNIFORM_TOO])[0]
    assert unchanged.score == pytest.approx(0, abs=CLOSE)


def averaged(model, name, heads):
    """Hooks that replace what heads say by the mean of the values that each row sees."""
    handles = []
    for layer, head in heads:
        kept = []
        block = slow.blocks(model)[layer]
        maker = block.attn.c_attn if name == "gpt2" else block.self_attn.v_proj
        window = SLIDING_WINDOW if name == "gemma3" and layer == 0 else 10**6

        def keep(_, args, out, kept=kept):
            kept[:] = [out[0, :, -slow.HEADS * slow.DIM :] if name == "gpt2" else out[0]]

        def replace(_, args, kept=kept, head=head, window=window):
            at = head if name == "gpt2" else head // (slow.HEADS // slow.KV_HEADS)
            values = kept[0][:, at * slow.DIM : (at + 1) * slow.DIM]
            means = [values[max(0, t - window + 1) : t + 1].mean(0) for t in range(len(values))]
            return (slow.with_head(args[0], head, torch.stack(means)),)

        handles += [maker.register_forward_hook(keep)]
        handles += [slow.projection(model, layer).register_forward_pre_hook(replace)]
    return handles


def loss(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return float(sum(-logits[t].log_softmax(-1)[ids[t + 1]] for t in range(len(ids) - 1)) / (len(ids) - 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", [[(0, 3)], [(0, 0), (0, 1), (1, 2)]])
def test_random_models_with_heads_averaged_by_plain_hooks(name, heads):
    """Texts of three lengths in one batch, so that two of them have pads."""
    model = tiny_model(name, torch.float64)
    texts = [tokens(length, length) for length in (30, 2, 17)]
    found = influence(ModelLens(model), texts, heads)
    for text, each in zip(texts, found, strict=True):
        assert each.base == pytest.approx(loss(model, text), abs=CLOSE)
        handles = averaged(model, name, heads)
        assert each.reference == pytest.approx(loss(model, text), abs=CLOSE)
        for handle in handles:
            handle.remove()
        assert each.tokens == len(text)
    assert max(abs(each.score) for each in found) > 1e-3, "the heads make no difference, nothing is tested"


def test_long_texts_are_added_up_in_parts(monkeypatch):
    model = tiny_model("llama")
    ids = torch.tensor([tokens(40)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    logits = model(ids).logits.detach()
    whole = mean_losses(logits, ids, mask)
    monkeypatch.setattr(attention_influence, "POSITIONS_AT_ONCE", 7)
    assert torch.allclose(mean_losses(logits, ids, mask), whole, rtol=1e-12)


def test_the_score_is_relative_to_the_base():
    assert Influence(2.0, 3.0, 10).score == 0.5
    assert Influence(2.0, 1.0, 10).score == -0.5
    assert Influence(0.0, 1.0, 10).score == 0.0, "known by heart"


@pytest.mark.parametrize("head", [(2, 0), (0, 4), (-1, 0)])
def test_heads_that_the_model_lacks_are_refused(head):
    with pytest.raises(InvalidInputError, match="head"):
        influence(ModelLens(tiny_model("llama")), [tokens(9)], [head])
    with pytest.raises(InvalidInputError, match="at least one"):
        influence(ModelLens(tiny_model("llama")), [tokens(9)], [])
