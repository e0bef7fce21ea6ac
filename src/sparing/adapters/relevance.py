"""Relevance rules: other gradients through norms, activations and gated MLPs, with the forward pass as it was.

Every rule returns y.detach() + (l - l.detach()), where l is what gradients are to flow through: the value is that of
the model bit for bit, the gradient is l's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparing.adapters.discovery import LensLayer, linear_width, swapped
from sparing.errors import UnsupportedModelError

# Keeps activation(x) / x finite at x = 0.
STABILISER = 1e-6


@contextmanager
def relevance_rules(model: nn.Module, layers: list[LensLayer], rules: frozenset[str]) -> Iterator[None]:
    """Let gradients flow by the given rules ("layer_norm", "identity", "half") while the block is open.

    Raises:
        UnsupportedModelError: a module that a rule would be for is not understood.
    """
    with ExitStack() as stack:
        if "layer_norm" in rules:
            norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
            for norm in norms:
                stack.enter_context(swapped(norm, _frozen_scale(norm)))
        for layer in layers:
            if layer.mlp is None or _is_mixture(layer.mlp):
                problem = f"layer {layer.number} has no plain MLP (a mixture of experts has no rule)"
                raise UnsupportedModelError(type(model).__name__, problem, "use attribution_patching")
            if "identity" in rules:
                for module in layer.mlp.modules():
                    if _is_activation(module):
                        stack.enter_context(swapped(module, _proportional(module)))
            if "half" in rules and (down := _gated_product_taker(layer.mlp)) is not None:
                stack.callback(down.register_forward_pre_hook(_halve).remove)
        yield


def with_gradient_of(value: Tensor, path: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return value.detach() + (path - path.detach())


def _frozen_scale(norm: nn.Module) -> Callable[..., Tensor]:
    """x / scale.detach(): the scale is a number, the mean (LayerNorm) is not."""
    original = norm.forward

    def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
        if more or named:
            raise UnsupportedModelError(type(norm).__name__, "a norm with a gate has no relevance rule")
        with torch.no_grad():
            y: Tensor = original(x)
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            # Whatever the norm does per channel (weight, 1 + weight, bias) shows on inputs of known scale.
            bias = original(torch.zeros_like(x[:1])).to(exact)
            centred = exact - exact.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else exact
            eps = next((float(getattr(norm, n)) for n in ("variance_epsilon", "eps") if getattr(norm, n, None)), 0.0)
            scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
            gain = _gain(norm, original, x, bias, eps)
        path = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
        return with_gradient_of(y, path * (scale * gain).to(x.dtype))

    return forward


def _gain(norm: nn.Module, original: Callable[..., Tensor], x: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(..., channels) factor of each channel, float32 or better."""
    if isinstance(norm, nn.LayerNorm):
        weight = norm.weight if norm.weight is not None else torch.ones_like(x[..., :1])
        return weight.to(bias)
    ones = torch.ones_like(x[:1])
    gain: Tensor = (original(ones).to(bias) - bias) * (1 + eps) ** 0.5
    return gain


def _proportional(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """x · (act(x) / x).detach()."""
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = original(x)
            sign = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
            ratio = y / (x + sign * STABILISER)
        return with_gradient_of(y, x * ratio)

    return forward


def _halve(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The product of gate and up gives half of its gradient to each."""
    product = args[0]
    return (product / 2 + (product / 2).detach(), *args[1:])


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    is_activation = home in ("torch.nn.modules.activation", "transformers.activations")
    return is_activation and not isinstance(module, nn.ReLU)


def _is_mixture(mlp: nn.Module) -> bool:
    return any(isinstance(m, nn.ModuleList) for m in mlp.modules()) or any(p.dim() > 2 for p in mlp.parameters())


def _gated_product_taker(mlp: nn.Module) -> nn.Module | None:
    """The down projection of a gated MLP: three matrices, or two of which the first makes gate and up at once."""
    linears = [m for m in mlp.modules() if linear_width(m)]
    if len(linears) == 3:
        return linears[-1]
    if len(linears) == 2 and _outputs(linears[0]) == 2 * (linear_width(linears[1]) or 0):
        return linears[-1]
    return None


def _outputs(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1])
