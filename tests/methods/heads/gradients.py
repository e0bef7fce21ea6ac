"""Slow and obvious attribution: autograd on a plain forward with plain hooks; nothing of the code under test."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.heads import slow


def heads_place(model: Any, layer: int) -> tuple[Any, str]:
    return slow.projection(model, layer), "input"


# The kinds of the residual scorers, in their order.
PLACES = (
    lambda model, layer: (slow.blocks(model)[layer], "input"),
    lambda model, layer: (slow.projection(model, layer), "output"),
    lambda model, layer: (slow.mlp(model, layer), "output"),
)


def effects(model: Any, sample: Any, place: Any, backward: Any = None) -> Tensor:
    """(L, T, E) of (a_clean - a_corrupt) * dm/da at the corrupt run; `backward` is a model with other gradients."""
    clean = slow.sites_of(model, sample.clean, place)
    corrupt = slow.sites_of(model, sample.corrupt, place)
    first, second = (slow.difference(slow.run(model, ids), sample) for ids in (sample.clean, sample.corrupt))
    gradients = gradients_of(backward or model, sample, place)
    found = [(a - b) * g / (first - second) for a, b, g in zip(clean, corrupt, gradients, strict=True)]
    return torch.stack(found)


def gradients_of(model: Any, sample: Any, place: Any) -> list[Tensor]:
    """Per layer the (T, E) gradient of logit(answer) - logit(wrong) at a place of the corrupt run."""
    kept: list[Tensor] = []
    with ExitStack() as stack:
        for layer in range(len(slow.blocks(model))):
            module, side = place(model, layer)
            if side == "input":
                hook = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
            else:
                hook = module.register_forward_hook(lambda _, args, out: kept.append(out))
            stack.callback(hook.remove)
        logits = model(torch.tensor([sample.corrupt]), use_cache=False).logits[0, -1]
    return [g[0] for g in torch.autograd.grad(logits[sample.answer] - logits[sample.wrong], kept)]


def per_head(found: Tensor) -> Tensor:
    """(L, Hq) from (L, T, Hq * D)."""
    return found.view(*found.shape[:2], slow.HEADS, slow.DIM).sum((1, 3))


class ExactNorm(nn.Module):
    """A Llama's norm in the dtype of its input: the model's own rounds to float32 in between.

    With a fixed scale, the norm of the paper's LN-rule; with scale 1, no norm at all, which is linear.
    """

    def __init__(self, weight: Tensor, eps: float, fixed: bool = False, linear: bool = False) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(weight.detach().clone()), eps
        self.fixed, self.linear = fixed, linear

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            return x * self.weight
        scale = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return self.weight * (x / (scale.detach() if self.fixed else scale))


def with_norms(model: Any, **how: bool) -> Any:
    """The model with all its norms replaced."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("Norm"):
            model.set_submodule(name, ExactNorm(module.weight, module.variance_epsilon, **how))
    return model


class RuledMLP(nn.Module):
    """A Llama's MLP with the identity and half rules written as the paper's stop-gradients."""

    def __init__(self, mlp: Any, identity: bool, half: bool) -> None:
        super().__init__()
        self.mlp, self.identity, self.half = mlp, identity, half

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.mlp.gate_proj(x), self.mlp.up_proj(x)
        act = nn.functional.silu(gate)
        if self.identity:
            stable = gate + torch.where(gate < 0, -1e-6, 1e-6)
            act = stable * (act / stable).detach()
        product = act * up
        return self.mlp.down_proj(product / 2 + (product / 2).detach() if self.half else product)


def with_rules(model: Any, rules: str) -> Any:
    """A Llama whose gradients follow the paper's rules."""
    with_norms(model, fixed="layer_norm" in rules)
    for block in slow.blocks(model):
        block.mlp = RuledMLP(block.mlp, "identity" in rules, "half" in rules)
    return model
