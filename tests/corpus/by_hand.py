"""AttentionInfluence of one text of a Llama, with plain torch hooks: nothing of the code under test is used."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def losses(model: Any, ids: list[int], heads: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Mean cross-entropy in nats per token: of the model, and with these heads attending to all they see alike."""
    base = mean_loss(model, ids)
    with ExitStack() as stack:
        for layer in {layer for layer, _ in heads}:
            stack.enter_context(_Uniform(model, layer, [head for at, head in heads if at == layer]))
        return base, mean_loss(model, ids)


def mean_loss(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[t, ids[t + 1]]) for t in range(len(ids) - 1)) / (len(ids) - 1)


class _Uniform:
    """In the output projection's input, the heads' parts become running means of their KV head's values."""

    def __init__(self, model: Any, layer: int, heads: list[int]) -> None:
        self.attention = model.model.layers[layer].self_attn
        config = model.config
        self.dim, self.heads = self.attention.head_dim, heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.values: Tensor | None = None

    def __enter__(self) -> None:
        self.hooks = [
            self.attention.v_proj.register_forward_hook(self._keep),
            self.attention.o_proj.register_forward_pre_hook(self._replace),
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, module: Any, args: Any, output: Tensor) -> None:
        self.values = output

    def _replace(self, module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        assert self.values is not None
        z = args[0].clone()
        for head in self.heads:
            kv = head // self.group
            values = self.values[0, :, kv * self.dim : (kv + 1) * self.dim]
            for t in range(z.shape[1]):
                z[0, t, head * self.dim : (head + 1) * self.dim] = values[: t + 1].mean(0)
        return (z,)
