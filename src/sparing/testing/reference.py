"""The reference for whole models: an ordinary cache, and attention in which dropped keys are at minus infinity.

Nothing of the path under test is used: the keys of every token stay in transformers' own `DynamicCache`, and what
was dropped is masked, per KV head, by an attention function written out here. Where tokens were changed (merged,
turned) no choice of the model's own keys says what should come out; then the keys, values and biases that are held
stand in for the tokens up to `end`, and everything else, later tokens included, is the model's own.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sparing.core.reader import Choice
from sparing.core.scorer import KeyValues
from sparing.testing.reading import read_instead

_NAME = "dropped_keys_reference"
# Per layer of the cache: [row][kv_head] → positions that were kept, of those before `Kept.end`.
Heads = list[list[Tensor]]


class DroppedKeysReference:
    """Runs a model with the keys of dropped tokens masked. A context manager; one at a time.

    Attributes:
        kept: layer index → [row][kv_head] → positions still visible; layers that are missing are not restricted.
            One KV head in the plan of a layer with several stands for all of them.
        held: layer index → what is held instead of the tokens before `end`, for layers whose tokens were changed.
        reads: layer index → what the one token of this call reads, for methods that drop nothing.
        end: positions from here on are visible to whoever comes later, whatever `kept` says.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.kept: dict[int, Heads] = {}
        self.held: dict[int, KeyValues] = {}
        self.reads: dict[int, Choice] = {}
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
        index, visible = int(module.layer_idx), None  # type: ignore[arg-type]
        if index in self.reads:
            query, key, visible = read_instead(self.reads[index], query, key)
        held = self.held.get(index)
        if held is not None:
            key, value, attention_mask = self._standing_in(held, key, value, attention_mask, groups)
        logits = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2) * scale
        if kwargs.get("softcap") is not None:
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        if attention_mask is not None:
            logits = logits + attention_mask
        heads = self.kept.get(index)
        if heads is not None and held is None:
            visible = self._visible(heads, key)
        if visible is not None:
            logits = logits.masked_fill(~visible.repeat_interleave(groups, dim=1)[:, :, None], -torch.inf)
        sinks = kwargs.get("s_aux")
        if sinks is not None:
            column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1).to(logits.dtype)
            weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None

    def _standing_in(
        self, held: KeyValues, key: Tensor, value: Tensor, mask: Tensor | None, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and what is added to the logits, with the held tokens in front of those from `end` on."""
        key, value = (
            torch.cat([mine.to(own.dtype), own[:, :, self.end :]], dim=2)
            for mine, own in ((held.keys, key), (held.values, value))
        )
        before = held.valid & (held.positions < self.end)
        bias = torch.zeros_like(before, dtype=key.dtype) if held.bias is None else held.bias.to(key.dtype)
        bias = bias.masked_fill(~before, -torch.inf).repeat_interleave(groups, dim=1)
        assert mask is not None, "an eager mask was registered"
        rows, heads, count = bias.shape[0], bias.shape[1], mask.shape[2]
        later = mask[..., self.end :].expand(rows, heads, count, -1)
        return key, value, torch.cat([bias[:, :, None].expand(-1, -1, count, -1), later], dim=-1)

    def _visible(self, heads: Heads, key: Tensor) -> Tensor:
        """(B, H, N) bool, True for what was kept and for what came later."""
        rows, kv_heads, tokens = key.shape[:3]
        visible = torch.zeros(rows, kv_heads, tokens, dtype=torch.bool)
        visible[:, :, self.end :] = True
        for row, per_head in enumerate(heads):
            for head in range(kv_heads):
                visible[row, head, per_head[head if len(per_head) > 1 else 0]] = True
        return visible
