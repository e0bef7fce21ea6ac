"""The one attention function.

It computes dense attention exactly as the model would have, over whatever the layer returns, hands queries, keys
and values to the layer that owns the cache, and attends over ragged heads once a layer is compressed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparing.adapters.attach import Registration
from sparing.adapters.handles import UPDATED, RaggedHandle
from sparing.adapters.masks import lazy_mask, mask_for_base, padding_of
from sparing.core.scorer import Softmax
from sparing.errors import UnsupportedModelError

AttentionResult = tuple[Tensor, Tensor | None]


def attention_over(base: str) -> Callable[..., AttentionResult]:
    """The attention function for models that were loaded with the implementation `base`."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> AttentionResult:
        softmax = softmax_of(query, scaling, kwargs)
        padding = padding_of(attention_mask)
        if isinstance(key, RaggedHandle):
            if kwargs.get("position_bias") is not None:
                problem = "adds a position bias to its logits, which ragged heads do not offer"
                raise UnsupportedModelError(type(module).__name__, problem)
            UPDATED.take()
            return key.layer.attend(query, softmax, padding).transpose(1, 2).contiguous(), None
        layer = UPDATED.take()
        if layer is not None:
            layer.receive(module, query, key)
            sparse = layer.attend_sparsely(query, key, value, softmax, attention_mask, kwargs.get("position_bias"))
            if sparse is not None:
                layer.observe(query, key, value, softmax, padding)
                return layer.gated(sparse.transpose(1, 2)).contiguous(), None
        mask = mask_for_base(attention_mask)
        if layer is not None:
            mask = layer.short_mask(query, mask, base)
        out = base_attention(base, module)(module, query, key, value, mask, scaling=scaling, **kwargs)
        if layer is not None:
            layer.observe(query, key, value, softmax, padding)
            return layer.gated(out[0]), out[1]
        return out

    return attention


def base_attention(base: str, module: nn.Module) -> Callable[..., AttentionResult]:
    """What the model would have called: sdpa is shared, eager is the model file's own."""
    if base == "eager":
        function: Callable[..., AttentionResult] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    shared: Callable[..., AttentionResult] = ALL_ATTENTION_FUNCTIONS[base]
    return shared


def softmax_of(query: Tensor, scaling: float | None, extras: dict[str, Any]) -> Softmax:
    """The softmax of an attention call, by its further arguments."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Softmax(scale, extras.get("softcap"), extras.get("s_aux"))


CACHING = Registration({"sdpa": "sparing", "eager": "sparing_eager"}, attention_over, lazy_mask)
