"""The network that is trained: Llama's architecture, written out so that it compiles well on a CPU.

The parameter names are those of transformers' `LlamaForCausalLM`, which loads the weights as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the defaults are the bundled model's."""

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    hidden: int = 352
    rope_theta: float = 100_000.0
    epsilon: float = 1e-5


def rotations(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, head_width) of the rotary embedding at positions (T,)."""
    steps = torch.arange(0, shape.head_width, 2).float() / shape.head_width
    angles = torch.outer(positions.float(), 1.0 / shape.rope_theta**steps)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        own, shared = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, own, bias=False)
        self.k_proj = nn.Linear(shape.width, shared, bias=False)
        self.v_proj = nn.Linear(shape.width, shared, bias=False)
        self.o_proj = nn.Linear(own, shape.width, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        size, length, _ = x.shape
        split = (size, length, -1, self.shape.head_width)
        query = _rotate(self.q_proj(x).view(split).transpose(1, 2), cosines, sines)
        key = _rotate(self.k_proj(x).view(split).transpose(1, 2), cosines, sines)
        value = self.v_proj(x).view(split).transpose(1, 2)
        groups = self.shape.heads // self.shape.kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(size, length, -1))


class FeedForward(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.width, shape.epsilon)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, shape.epsilon)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cosines, sines)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, shape.epsilon)

    def forward(self, ids: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Return the last hidden states (B, T, width) for ids (B, T)."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cosines, sines)
        return self.norm(x)


class Network(nn.Module):
    """The language model; input and output embeddings are one matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Body(shape)
        for name, weights in self.named_parameters():
            if weights.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * shape.layers) if into_residual else 0.02
                nn.init.normal_(weights, std=std)

    def loss(self, ids: Tensor, weights: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Return the loss, in nats, of predicting ids[:, 1:] (B, T), summed with the given weights (B, T)."""
        hidden = self.model(ids[:, :-1], cosines, sines)
        counted = weights.flatten().nonzero().squeeze(1)
        return _OutputLoss.apply(
            hidden.flatten(0, 1)[counted],
            self.model.embed_tokens.weight,
            ids[:, 1:].flatten()[counted],
            weights.flatten()[counted],
        )


class _OutputLoss(torch.autograd.Function):
    """Weighted cross entropy of the output layer, with its gradient taken at once, chunk by chunk.

    A chunk's logits stay in the cache of the processor and are never kept: a third of the time of a step.
    """

    CHUNK = 1024

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        by_hidden, by_embedding = torch.empty_like(hidden), torch.zeros_like(embedding)
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), _OutputLoss.CHUNK):
            part = slice(start, start + _OutputLoss.CHUNK)
            weight = weights[part, None]
            chances = functional.linear(hidden[part], embedding).softmax(-1)
            true = chances.gather(1, targets[part, None])
            total -= (true.clamp_min(1e-30).log() * weight).sum()
            chances.scatter_(1, targets[part, None], true - 1)
            by_hidden[part] = (chances @ embedding) * weight
            by_embedding.addmm_(chances.T, hidden[part] * weight)
        ctx.save_for_backward(by_hidden, by_embedding)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_embedding = ctx.saved_tensors
        return by_hidden * grad, by_embedding * grad, None, None
