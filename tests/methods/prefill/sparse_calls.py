"""Attention calls of a prompt on plain tensors, and what every sparse method is asked: slow, in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import sparing
from sparing.core.pattern import Pattern
from sparing.core.prefill import PromptCall, SparsePrefill
from sparing.core.scorer import Softmax
from sparing.kernels.sparse import attend_call
from sparing.testing import tiny_model

EPS = 2.0**-24


def random_call(
    tokens: int = 150,
    start: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    seed: int = 0,
    size: float = 1.0,
) -> PromptCall:
    """Random states; `size` scales the logits."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, tokens - start, dim, generator=g) * size
    keys, values = (torch.randn(kv_heads, tokens, dim, generator=g) for _ in range(2))
    return PromptCall(query, keys, values, Softmax(dim**-0.5), attend_call)


def part_of(call: PromptCall, start: int, end: int) -> PromptCall:
    """The rows [start, end) of a call that begins at 0, with the keys up to there."""
    rows = slice(start, end)
    return replace(call, query=call.query[:, rows], keys=call.keys[:, :end], values=call.values[:, :end])


def logits(call: PromptCall) -> Tensor:
    """(Hq, Q, N) float64, capped as the model does; keys after their row are -inf."""
    keys = call.keys.double().repeat_interleave(call.group, dim=0)
    found = call.query.double() @ keys.mT * call.softmax.scaling
    if call.softmax.softcap is not None:
        found = torch.tanh(found / call.softmax.softcap) * call.softmax.softcap
    return found.masked_fill(torch.ones_like(found[0], dtype=torch.bool).triu(call.start + 1), -torch.inf)


def mask_of(pattern: Pattern) -> Tensor:
    """(Hq, Q, N) bool: what the pattern says, row by row."""
    rows = torch.arange(pattern.start, pattern.tokens)
    return torch.stack([pattern.may_read(head, rows) for head in range(pattern.heads)])


def assert_faithful(method: SparsePrefill, call: PromptCall) -> Tensor:
    """Sparse output is dense attention under the method's own mask; returns the mask."""
    attended = method.attend(call)
    mask = mask_of(attended.pattern)
    weights = logits(call).masked_fill(~mask, -torch.inf).softmax(-1)
    wanted = weights @ call.values.double().repeat_interleave(call.group, dim=0)
    # A logit is off by at most D ε |q||k| s, a sum of N products of at most |v| by N ε.
    size = call.query.norm(dim=-1).max() * call.keys.norm(dim=-1).max() * call.softmax.scaling
    bound = 2 * EPS * float(call.keys.shape[-1] * size + call.tokens) * float(call.values.abs().max())
    assert float((attended.part.out - wanted).abs().max()) <= bound
    return mask


def assert_budget(method: SparsePrefill, call: PromptCall, unused: int) -> Pattern:
    """No more pairs than allowed, unless what is always on needs more; and less than `unused` pairs of a layer left."""
    pattern = method.pattern(call)
    spent, allowed = int(pattern.pairs().sum()), method.pairs(call) * call.heads
    assert spent == int(mask_of(pattern).sum())
    assert spent <= allowed, f"{spent} pairs of {allowed}"
    assert allowed - spent < unused, f"{allowed - spent} of {allowed} pairs are unused"
    return pattern


def said(method: SparsePrefill, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """The logits of a tiny model that reads a prompt in chunks of the given sizes."""
    model = tiny_model("llama")
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), sparing.use(model, replace(method, dispatch="always")) as session:
        cache = session.new_cache()
        cache.expect_prompt(ids.shape[1])
        found, start = [], 0
        for size in sizes:
            end = start + size
            found.append(
                model(
                    ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                    past_key_values=cache,
                ).logits
            )  # fmt: skip
            start = end
    assert start == ids.shape[1]
    return torch.cat(found, dim=1)


def tokens(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    """(rows, count) random ids."""
    return torch.randint(1, 64, (rows, count), generator=torch.Generator().manual_seed(seed))


def assert_batch_is_rows(method: SparsePrefill, lengths: tuple[int, ...] = (90, 61)) -> None:
    """Each row of a left-padded batch gives what it gives alone."""
    longest = max(lengths)
    ids = tokens(longest, len(lengths))
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    together = said(method, ids, [longest], mask)
    for row, length in enumerate(lengths):
        alone = said(method, ids[row : row + 1, longest - length :], [length])
        torch.testing.assert_close(together[row : row + 1, longest - length :], alone, rtol=0, atol=2e-4)
