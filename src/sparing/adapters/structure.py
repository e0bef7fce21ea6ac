"""What sparing needs to know of a model, read from its configuration and modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sparing.adapters.rotary import ModelRotary, find_rotary
from sparing.errors import UnsupportedModelError


@dataclass(frozen=True)
class Structure:
    """A model's structure.

    Attributes:
        name: for messages.
        config: the configuration that the cache is built from.
        full_layers: cache indices of plain full-attention layers, the ones that can be compressed.
        attention_layers: their numbers among all attention layers, which is how measurements of heads count.
        rotates: True if keys are cached rotated. rotary: how to invert that; None if unknown or not rotated.
        learned_positions: how many positions there are, where each has an embedding of its own; None elsewhere.
    """

    name: str
    config: Any
    full_layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    rotates: bool
    rotary: ModelRotary | None
    learned_positions: int | None


def read_structure(model: nn.Module) -> Structure:
    """Read a model.

    Raises:
        UnsupportedModelError: not a transformers decoder whose attention can be exchanged, or no layer to compress.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(name, "not a transformers model", "load it with AutoModelForCausalLM")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(name, "encoder-decoder models are not supported", "use a decoder-only model")
    if not model._can_set_attn_implementation():
        problem = "its attention does not go through transformers' AttentionInterface"
        raise UnsupportedModelError(name, problem, "use a model type that supports attn_implementation='sdpa'")
    require_whole_heads(model)
    require_plain_cache(model)
    layers = DynamicCache(config=model.config).layers
    full = tuple(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)
    if not full:
        problem = "it has no plain full-attention layer (sliding windows and state spaces have nothing to evict)"
        raise UnsupportedModelError(name, problem, "run it without sparing")
    attending = [isinstance(layer, DynamicLayer) for layer in layers]
    numbers = tuple(sum(attending[:index]) for index in full)
    text = model.config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rotates, rotary = find_rotary(model, head_dim)
    return Structure(name, model.config, full, numbers, rotates, rotary, _learned_positions(model, text))


def _learned_positions(model: PreTrainedModel, text: Any) -> int | None:
    there = getattr(text, "max_position_embeddings", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    # Some models keep a few entries in front for pads.
    is_learned = there is not None and any(there <= table.num_embeddings <= there + 2 for table in tables)
    return there if is_learned else None


def require_whole_heads(model: nn.Module) -> None:
    """Refuse a model whose heads are spread over processes: scores and budgets of all heads are never in one place.

    Raises:
        UnsupportedModelError: the model was loaded tensor-parallel.
    """
    if getattr(model, "_tp_size", None) is not None:
        problem = "its heads are spread over processes (tensor parallelism), so budgets that heads share would be wrong"
        raise UnsupportedModelError(type(model).__name__, problem, 'load it with device_map="auto" in one process')


def require_plain_cache(model: nn.Module) -> None:
    """Refuse a model whose state transformers' own `DynamicCache` cannot hold.

    Raises:
        UnsupportedModelError: a recurrent model, and an early transformers 5.
    """
    if getattr(model, "_is_stateful", False) and not hasattr(Cache, "has_previous_state"):
        problem = "in this version of transformers its recurrent state needs a cache class of its own"
        raise UnsupportedModelError(type(model).__name__, problem, "install a newer transformers")
