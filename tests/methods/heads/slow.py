"""Slow and obvious patching: one whole forward per site, with plain torch hooks on the model's modules.

Knows the three tiny models that the tests use by their module names, and imports nothing of the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sparing.core.samples import PairSample
from sparing.testing import tiny_model

NAMES = ("llama", "qwen3", "gpt2", "gemma3")
HEADS, KV_HEADS, DIM = 4, 2, 8


def model_of(name: str, seed: int = 0) -> Any:
    return tiny_model(name, torch.float64, seed)


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def projection(model: Any, layer: int) -> Any:
    block = blocks(model)[layer]
    return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj


def mlp(model: Any, layer: int) -> Any:
    return blocks(model)[layer].mlp


def pair(model: Any, length: int = 12, seed: int = 0) -> PairSample:
    """Prompts that differ in two tokens, and the two tokens whose logits they pull apart most."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, 64, (length,), generator=g)
    corrupt = clean.clone()
    corrupt[3] = 1 + (clean[3] + 4) % 62
    corrupt[5] = 1 + (clean[5] + 9) % 62
    with torch.no_grad():
        apart = model(clean[None]).logits[0, -1] - model(corrupt[None]).logits[0, -1]
    return PairSample(tuple(clean.tolist()), tuple(corrupt.tolist()), int(apart.argmax()), int(apart.argmin()))


Hook = Callable[[Tensor], Tensor | None]


def run(model: Any, ids: tuple[int, ...], hooks: list[tuple[Any, str, Hook]] = ()) -> Tensor:  # type: ignore[assignment]
    """(V,) last logits of a whole forward; hooks are (module, "input" or "output", what becomes of the tensor)."""
    with ExitStack() as stack, torch.no_grad():
        for module, side, change in hooks:
            stack.callback(_hook(module, side, change).remove)
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def _hook(module: Any, side: str, change: Hook) -> Any:
    if side == "input":

        def before(_: Any, args: tuple[Any, ...]) -> Any:
            new = change(args[0])
            return None if new is None else (new, *args[1:])

        return module.register_forward_pre_hook(before)

    def after(_: Any, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = change(first)
        return None if new is None else ((new, *output[1:]) if isinstance(output, tuple) else new)

    return module.register_forward_hook(after)


def heads_of(model: Any, ids: tuple[int, ...]) -> list[Tensor]:
    """Per layer what goes into the output projection, (T, Hq, D)."""
    found: list[Tensor] = []
    keep: list[tuple[Any, str, Hook]] = [
        (projection(model, layer), "input", lambda x: found.append(x[0].view(-1, HEADS, DIM)))
        for layer in range(len(blocks(model)))
    ]
    run(model, ids, keep)
    return found


def sites_of(model: Any, ids: tuple[int, ...], place: Callable[[Any, int], tuple[Any, str]]) -> list[Tensor]:
    """Per layer the (T, E) tensor at a place (module, side)."""
    found: list[Tensor] = []
    run(model, ids, [(*place(model, layer), lambda x: found.append(x[0])) for layer in range(len(blocks(model)))])
    return found


def difference(logits: Tensor, sample: PairSample) -> float:
    return float(logits[sample.answer] - logits[sample.wrong])


def metric(model: Any, sample: PairSample, logits: Tensor) -> float:
    clean, corrupt = (difference(run(model, ids), sample) for ids in (sample.clean, sample.corrupt))
    return (difference(logits, sample) - corrupt) / (clean - corrupt)


def with_head(x: Tensor, head: int, value: Tensor) -> Tensor:
    """(1, T, Hq·D) with one head's part replaced by (T, D)."""
    new = x.clone()
    new[0, :, head * DIM : (head + 1) * DIM] = value
    return new
