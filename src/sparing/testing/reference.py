"""The reference for whole models: an ordinary cache, and attention in which dropped keys are at minus infinity.

Nothing of the path under test is used: the keys of every token stay in transformers' own `DynamicCache`, and what
was dropped is masked, per KV head, by an attention function written out here.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_NAME = "dropped_keys_reference"
# Per layer of the cache: [row][kv_head] → positions that were kept, of those before `Kept.end`.
Heads = list[list[Tensor]]


class DroppedKeysReference:
    """Runs a model with the keys of dropped tokens masked. A context manager; one at a time.

    Attributes:
        kept: layer index → [row][kv_head] → positions still visible; layers that are missing are not restricted.
            One KV head in the plan of a layer with several stands for all of them.
        end: positions from here on are visible to whoever comes later, whatever `kept` says.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.kept: dict[int, Heads] = {}
        self.end = 0

    def __enter__(self) -> DroppedKeysReference:
        AttentionInterface.register(_NAME, self._attention)
        AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        self._before = self.model.config._attn_implementation
        self.model.set_attn_implementation(_NAME)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.set_attn_implementation(self._before)
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits of the new tokens; `mask` covers all tokens so far."""
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        logits: Tensor = output.logits
        return logits

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2) * scale
        if kwargs.get("softcap") is not None:
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        if attention_mask is not None:
            logits = logits + attention_mask
        heads = self.kept.get(int(module.layer_idx))  # type: ignore[arg-type]
        if heads is not None:
            visible = self._visible(heads, key).repeat_interleave(groups, dim=1)
            logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
        sinks = kwargs.get("s_aux")
        if sinks is not None:
            column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1).to(logits.dtype)
            weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None

    def _visible(self, heads: Heads, key: Tensor) -> Tensor:
        """(B, H, N) bool, True for what was kept and for what came later."""
        rows, kv_heads, tokens = key.shape[:3]
        visible = torch.zeros(rows, kv_heads, tokens, dtype=torch.bool)
        visible[:, :, self.end :] = True
        for row, per_head in enumerate(heads):
            for head in range(kv_heads):
                visible[row, head, per_head[head if len(per_head) > 1 else 0]] = True
        return visible
