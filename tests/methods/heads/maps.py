"""Whole attention maps of tiny models in float64, by transformers' own eager attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

# What a number may differ by that was computed in float64 and is kept in float32, relative to numbers up to 1.
CLOSE = 1e-6
NAMES = ("llama", "gemma3", "gpt2")

_softmax = functional.softmax


def maps(model: Any, ids: Sequence[int]) -> Tensor:
    """(L, Hq, T, T) attention of one text. Eager attention would take its softmax in float32; here it may not."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    exact = mock.patch.object(functional, "softmax", lambda x, dim, dtype=None: _softmax(x, dim))
    with exact, torch.no_grad():
        layers = model(torch.tensor([list(ids)]), output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    return torch.cat(layers)


def greedy(model: Any, ids: Sequence[int], steps: int) -> list[int]:
    """The next tokens, each by a whole forward."""
    said = list(ids)
    for _ in range(steps):
        with torch.no_grad():
            said.append(int(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
    return said[len(ids) :]


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids of the tiny models."""
    return tuple(torch.randint(1, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist())
