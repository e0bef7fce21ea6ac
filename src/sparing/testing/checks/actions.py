"""Checks of what becomes of the tokens that are not kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparing.adapters.structure import read_structure
from sparing.core.actions import Action, Folded
from sparing.core.scorer import KeyValues
from sparing.session import use
from sparing.testing.checks.common import MethodFactory
from sparing.testing.checks.scoring import example
from sparing.testing.driving import Driver, random_prompt
from sparing.testing.inspection import held_tokens
from sparing.testing.models import tiny_model

# exp and log of a float32 bias lose this much of a token's weight, at most.
LOST = 1e-5


def check_actions_stay_in_their_head(make: MethodFactory) -> None:
    """What is stored of a head comes from its own tokens: no other head or row, no pad, and inputs stay as they are."""
    action = make(keep=0.5).parts().action
    stored, kept, scores = _lanes(action)
    before = [tensor.clone() for tensor in (stored.keys, stored.values, scores)]
    folded = action.apply(kept, stored, scores)
    for tensor, copy in zip((stored.keys, stored.values, scores), before, strict=True):
        assert torch.equal(tensor, copy), f"{type(action).__name__} changes what it is given"
    for row, heads in enumerate(kept):
        for head, slots in enumerate(heads):
            mine = folded.kept[row][head]
            allowed = len(slots) + action.reserve if action.drops else int(stored.valid[row, head].sum())
            assert len(mine) <= allowed, f"{len(mine)} tokens are stored of {allowed} allowed"
            assert mine.tolist() == sorted(set(mine.tolist())), f"the slots {mine.tolist()} are not in order"
            assert bool(stored.valid[row, head, mine].all()), "a pad is stored"
            other = action.apply(kept, *_with_other_lanes(stored, scores, row, head))
            pairs = zip(_lane(folded, row, head), _lane(other, row, head), strict=True)
            for what, (one, two) in zip(("keys", "values", "bias"), pairs, strict=True):
                assert torch.equal(one, two), f"{what} of row {row}, KV head {head} depend on other heads, or on pads"


def _lanes(action: Action) -> tuple[KeyValues, list[list[Tensor]], Tensor]:
    """A left-padded batch in which tokens resemble each other, of which every third is kept, and positive scores."""
    _, stored = example(rows=2, tokens=40, pads=(0, 9))
    similar = torch.arange(40) // 2 * 2  # tokens in pairs, and all of them in one half space
    keys, values = ((x + 2.0)[:, :, similar].clone() for x in (stored.keys, stored.values))
    rotary = read_structure(tiny_model("llama")).rotary if action.needs_rotary else None
    stored = replace(stored, keys=keys, values=values, rotary=rotary)
    kept = [[valid.nonzero().squeeze(-1)[::3] for valid in row] for row in stored.valid]
    return stored, kept, torch.rand(stored.valid.shape, generator=torch.Generator().manual_seed(1))


def _with_other_lanes(stored: KeyValues, scores: Tensor, row: int, head: int) -> tuple[KeyValues, Tensor]:
    """The same lane among others that hold something else, with nonsense in its pads."""
    generator = torch.Generator().manual_seed(2)
    keys, values, new = (torch.rand(x.shape, generator=generator) for x in (stored.keys, stored.values, scores))
    for fresh, own in ((keys, stored.keys), (values, stored.values), (new, scores)):
        fresh[row, head] = own[row, head]
        fresh[~stored.valid] = torch.nan
    return replace(stored, keys=keys, values=values), new


def _lane(folded: Folded, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = folded.kept[row][head]
    bias = torch.zeros(len(slots)) if folded.bias is None else folded.bias[row, head, slots]
    return folded.keys[row, head, slots], folded.values[row, head, slots], bias


def check_weights_are_counts(make: MethodFactory, name: str) -> None:
    """A stored token stands for one token or more, and a head for no more tokens than it has seen; for all of them if
    the action says so. Also with drafted tokens behind the prompt, and in the next turn.
    """
    model, method = tiny_model(name), make(keep=0.3)
    for prompt in random_prompt(67, 47).split(method):
        with use(model, method) as session:
            cache = session.new_cache()
            driver = Driver(model, cache)
            cache.expect_prompt(64)
            driver.feed(prompt.ids, prompt.mask)
            cache.report()
            seen = [67 - pad for pad in prompt.pads]
            _assert_weights(held_tokens(cache), seen, method.parts().action)
            cache.expect_prompt(67 + 20)
            driver.feed(random_prompt(*[20] * len(seen), seed=1).ids)
            cache.report()
            _assert_weights(held_tokens(cache), [n + 20 for n in seen], method.parts().action)


def _assert_weights(held: dict[int, KeyValues], seen: list[int], action: Action) -> None:
    for layer, stored in held.items():
        bias = torch.zeros(stored.valid.shape) if stored.bias is None else stored.bias
        weights = bias.exp().masked_fill(~stored.valid, 0.0)
        assert float(weights[stored.valid].min()) >= 1 - LOST, f"layer {layer}: a token counts for less than one"
        for row, tokens in enumerate(seen):
            for head, total in enumerate(weights[row].sum(-1).tolist()):
                what = f"layer {layer}, row {row}, head {head} stands for {total:.4f} of {tokens} tokens"
                assert total <= tokens * (1 + LOST), what
                assert not action.counts_all or total >= tokens * (1 - LOST), what
