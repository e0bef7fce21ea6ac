"""Folding edits of heads into the output projections.

Σ_h (f_h z_h + s_h) W_h + b  =  Σ_h z_h (f_h W_h) + (b + Σ_h s_h W_h)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparing.adapters.lens import ModelLens
from sparing.core.edits import HeadEdit
from sparing.errors import InvalidInputError, UnsupportedModelError


def fold_into(lens: ModelLens, edits: Sequence[HeadEdit]) -> None:
    """Change the weights of a lens' model; everything is worked out before anything is changed.

    Raises:
        InvalidInputError, UnsupportedModelError: see `editing.fold`.
    """
    maps = [_composed(lens, edits, layer) for layer in range(lens.num_layers)]
    projections: list[Any] = [layer.require_projection(lens.model) for layer in lens.layers]
    if any(projection.weight.is_meta for projection in projections):
        problem = "some of its weights are put away on the disk or in main memory, where they cannot be changed"
        raise UnsupportedModelError(type(lens.model).__name__, problem, "load it without a device map")
    needs_bias = any(bool(shift.any()) for _, shift in maps)
    if needs_bias and any(p.bias is None for p in projections):
        _give_biases(lens, projections)
    with torch.no_grad():
        for layer, (factors, shifts) in enumerate(maps):
            weight = lens.output_weight(layer)  # (Hq, Dv, E), a view of the parameter
            if bool(shifts.any()):
                moved = torch.einsum("hd,hde->e", shifts.to(weight.device), weight.double())
                projections[layer].bias += moved.to(projections[layer].bias.dtype)
            weight *= factors.to(weight)[:, None, None]


def _composed(lens: ModelLens, edits: Sequence[HeadEdit], layer: int) -> tuple[Tensor, Tensor]:
    """The edits of a layer, in their order as in nested blocks, as one factor and shift per head."""
    factors = torch.ones(lens.num_heads, dtype=torch.float64)
    shifts = torch.zeros(lens.num_heads, lens.head_dim, dtype=torch.float64)
    for each in edits:
        mine = each.scale_and_shift(layer, lens.num_heads, lens.head_dim)
        if mine is None:
            allowed = "edits that scale or shift heads' outputs by fixed numbers"
            fix = f"{type(each).__name__} depends on the text: use it with sparing.edit"
            raise InvalidInputError("edit", type(each).__name__, allowed, fix)
        factor, shift = mine
        factors, shifts = factor * factors, factor[:, None] * shifts + shift
    return factors, shifts


def _give_biases(lens: ModelLens, projections: Sequence[Any]) -> None:
    """Let the output projections have a bias: switch on the configuration's, and set what else it switches on to 0.

    Raises:
        UnsupportedModelError: the architecture has no such switch, so a checkpoint could not hold the bias.
    """
    model, name = lens.model, type(lens.model).__name__
    config = model.config
    if not hasattr(config, "attention_bias") or config.attention_bias:
        problem = "its output projections have no bias, and its configuration cannot give them one"
        raise UnsupportedModelError(name, problem, "scale or zero heads only, or keep the edit as a `with` block")
    switched = type(config).from_dict({**config.to_dict(), "attention_bias": True})
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(switched)
    added = {key for key in wanted.state_dict() if key.endswith(".bias")} - set(model.state_dict())
    paths = {module: path for path, module in model.named_modules()}
    if not {f"{paths[p]}.bias" for p in projections} <= added:
        problem = "attention_bias in its configuration gives the output projections no bias"
        raise UnsupportedModelError(name, problem, "scale or zero heads only, or keep the edit as a `with` block")
    for key in added:
        module: Any = model.get_submodule(key.removesuffix(".bias"))
        module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]), requires_grad=False)
    config.attention_bias = True
