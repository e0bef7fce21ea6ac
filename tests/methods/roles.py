"""What the tests of methods with measured heads share: measurements with given numbers, and what a tiny model keeps."""

from __future__ import annotations

from typing import Any

import torch

from sparing.adapters.lens import ModelLens
from sparing.core.method import Method
from sparing.core.scores import ModelIdentity, Scores
from sparing.testing import held_positions, random_prompt, run_method, tiny_model

# Two layers, four query heads, two KV heads: what the tiny Llama and the cases of `oracles` have.
MODEL = ModelLens(tiny_model("llama")).identity

AXES = {"duo": ("layer", "kv_head"), "layer_error": ("layer",)}


def measured(scorer: str, values: Any, model: ModelIdentity = MODEL) -> Scores:
    return Scores(torch.tensor(values), AXES.get(scorer, ("layer", "head")), scorer, model)


def kept(method: Method, length: int = 64, name: str = "llama") -> dict[int, list[list[int]]]:
    """Cache layer → KV head → positions that are held after a random prompt."""
    run = run_method(tiny_model(name), method, random_prompt(length, steps=0))
    return {layer: [head.tolist() for head in rows[0]] for layer, rows in held_positions(run.cache).items()}
