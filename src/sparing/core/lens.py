"""What a head scorer or a head edit sees of a running model. Hooks and model classes are elsewhere (adapters/lens.py).

Shape legend: B rows (sequences), T new tokens, S stored and new tokens, Hq query heads, H KV heads, D head size,
Dv value size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sparing.core.scorer import Softmax
from sparing.core.scores import ModelIdentity


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one layer.

    Attributes:
        layer: number among the model's attention layers, from 0.
        queries: (B, Hq, T, D); keys: (B, H, S, D); values: (B, H, S, Dv), as the model's attention gets them:
            normalised, rotated, stored tokens included. Query head h reads KV head h // (Hq / H).
        softmax: how the model turns dot products into attention.
        may_see: rows → (B or 1, 1, rows, S) bool: which keys these query rows may see (causality, sliding
            window and padding together). Rows of pads may see nothing.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    softmax: Softmax
    may_see: Callable[[slice], Tensor]
    starts: Callable[[], Tensor] = lambda: torch.zeros(1, dtype=torch.int64)

    @property
    def first(self) -> int:
        """How many stored tokens come before the first query row."""
        return self.keys.shape[2] - self.queries.shape[2]


Attend = Callable[[AttentionCall], Tensor]

# Wraps the attention of every layer: gets the call and what would have been done with it, and returns the heads'
# outputs (B, T, Hq, Dv). To watch only: `return attend(call)`.
AttentionHook = Callable[[AttentionCall, Attend], Tensor]

# Places in the residual stream: what a layer gets, what its attention and its MLP add, and what it hands on.
Site = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]

# (layer, tensor) → its replacement, or None to leave it.
SiteHook = Callable[[int, Tensor], Tensor | None]


class Lens(Protocol):
    """A model whose attention, heads and residual stream can be watched and changed.

    Attributes:
        num_layers: attention layers. num_heads, num_kv_heads: of each of them.
        head_dim: size of a head's output (Dv). vocabulary_size: how many token ids there are.
        max_length: positions that the model was made for, None if it does not say.
        tokenizer: the model's own, None if it was not given.
    """

    model: Any
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    max_length: int | None
    tokenizer: Any

    @property
    def identity(self) -> ModelIdentity:
        """Which model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        ...

    def hooked(
        self,
        attention: AttentionHook | None = None,
        heads: SiteHook | None = None,
        sites: Mapping[Site, SiteHook] | None = None,
    ) -> AbstractContextManager[None]:
        """Watch or change the model for the length of a `with` block; blocks may be nested.

        What flows through is changed by the outer block first, then by the inner one.

        Args:
            attention: wraps the attention of every layer.
            heads: gets what goes into the output projection, (B, T, Hq, Dv).
            sites: get tensors of the residual stream, (B, T, E). "attn_out" is the output projection's output.
        """
        ...

    def forward(self, ids: Tensor, mask: Tensor | None = None, last: int | None = None, cache: Any = None) -> Tensor:
        """Run the model and return its logits.

        Args:
            ids: (B, T) token ids. mask: (B, S) bool, False for left pads; None if there are none.
            last: only the logits of so many last positions (the rest is never computed); None for all.
            cache: a transformers cache to go on from and to fill, or a `prefix`.

        Returns:
            (B, T or last, vocabulary) logits in the model's dtype.
        """
        ...

    def final_states(self, ids: Tensor, mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """What goes into the unembedding, (B, T or last, E): the residual stream after the final norm."""
        ...

    def new_cache(self) -> Any:
        """An empty cache of the model's own kind, for `forward`."""
        ...

    def prefix(self, ids: Tensor) -> Any:
        """(1, T) ids that many prompts begin with → what their forwards go on from: a `cache` that is only read.

        It serves batches of any size. None if there are no ids, or where the model carries more from token to token
        than keys and values; then forwards have to begin at the beginning.
        """
        ...

    def forward_from(
        self, layer: int, residual: Tensor, mask: Tensor | None = None, last: int | None = None, cache: Any = None
    ) -> Tensor:
        """Run the model from an attention layer's block on, given the (B, T, E) residual stream that goes into it.

        `layer` may be `num_layers`: then only what follows the last block is run (norm, unembedding, caps).
        """
        ...

    def relevance(self, rules: frozenset[str]) -> AbstractContextManager[None]:
        """Other gradients, the same values, for the length of a `with` block: any of "layer_norm", "identity", "half".

        Raises:
            UnsupportedModelError: the model has a part that the rules are not defined for.
        """
        ...

    def output_weight(self, layer: int) -> Tensor:
        """(Hq, Dv, E) slices of the output projection, so that attn_out = Σ_h z_h @ weight[h] (+ bias)."""
        ...
