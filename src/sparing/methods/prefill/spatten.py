"""SpAtten: tokens and heads that little attention goes to, or little comes from, leave all later layers (2012.09852).

Importance of token j: s_j = sum over the layers so far, heads h and rows i of A_h[i, j], the attention that it has
received. Behind the first layers (`front`) each layer takes in only the tokens with the largest s_j; who has left once
never comes back, so survivors are nested, and a token that is gone has no query, key, value, MLP row or cache entry in
any later layer. Importance of head h: the sum over the layers so far and rows of |output of h|_1. Behind the first
layers (`front_heads`) the output of the heads with the least is 0 in this layer and all later ones, by their index.
Local value pruning (`value_keep`): of each row's probabilities, only the largest share meets a value. A token's
position stays its own, and the last token is never pruned: the answer begins there.

Cost: the importance takes all attention rows once more, tile by tile, in every layer but the last: k² D per head of the
k tokens that are there (the paper's chip has the probabilities at hand). Saved: all of a layer's work for tokens that
are gone, and their part of the cache. `value_keep` and `keep_heads` simulate what the chip would not fetch or compute;
they save nothing here.

Deviations:
1. `keep` is the mean over all layers. The paper gives ratios per layer between a start and an end for each task;
   here they lie on a line around the mean (`slope`).
2. Tokens are pruned while a prompt is read, and importance begins anew with each turn. The paper adds generated rows
   and prunes on; here what is decoded stays, and so does what earlier turns have left.
3. All heads are used by default: the paper tunes models with heads pruned, this does not. Heads are chosen once, by
   the first prompt, and the K and V of a KV head that nobody asks any more are stored all the same.
4. Rows of the padding and of drafts behind the prompt count for nothing, and drafts are never pruned.
5. Progressive quantisation (most significant bits first) is left out: memory that is read in bit planes is hardware.
6. Sliding-window, linear and hybrid layers are allowed in front only, where all tokens are; attention there goes
   uncounted. A ratio below what the front layers have leaves the others one token each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparing.core.cascade import Cascade, falling, whole_layers
from sparing.core.method import register
from sparing.core.scorer import KeyValues, Queries
from sparing.errors import require
from sparing.measures.attention import attention_tiles, column_mass


@register(
    "spatten",
    family="sparse_prefill",
    unit="prompt_token",
    moment="prefill",
    paper="2012.09852",
    summary="tokens with the most attention so far go on to later layers",
)
@dataclass(frozen=True)
class SpAtten(Cascade):
    """Cascade token and head pruning. See the module.

    Attributes:
        keep_heads: share of the query heads that are used, on average over layers, in (0, 1].
        front_heads: share of the layers, in [0, 1), that come first and use all heads; at least one does.
        value_keep: share of the keys that a row sees whose values it reads, in (0, 1].
    """

    keep_heads: float = 1.0
    front_heads: float = 0.3
    value_keep: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.keep_heads <= 1, "keep_heads", self.keep_heads, "a share of heads in (0, 1]")
        require(0 <= self.front_heads < 1, "front_heads", self.front_heads, "a share of layers in [0, 1)")
        require(0 < self.value_keep <= 1, "value_keep", self.value_keep, "a share of keys in (0, 1]")

    def importance(self, queries: Queries, stored: KeyValues) -> Tensor:
        """Attention received, summed over heads and rows."""
        return column_mass(queries, stored).sum(1)

    def head_importance(self, out: Tensor, counts: Tensor) -> Tensor:
        """L1 norm of the outputs."""
        return (out.float().abs().sum(-1) * counts[..., None]).sum(1)

    def heads(self, heads: int, layers: int) -> list[int] | None:
        """See `Cascade.heads`."""
        if self.keep_heads == 1:
            return None
        total = int(self.keep_heads * heads * layers + 0.5)
        return falling(total, heads, layers, whole_layers(self.front_heads, layers), self.slope)

    def attend(self, queries: Queries, stored: KeyValues, spared: Tensor) -> Tensor | None:
        """Attention with local value pruning."""
        if self.value_keep == 1 or bool(spared.all()):
            return None
        return top_values(queries, stored, spared.double().clamp_min(self.value_keep))

    @property
    def reads_all(self) -> bool:
        """True if nothing is pruned at all."""
        return super().reads_all and self.keep_heads == 1 and self.value_keep == 1


def top_values(queries: Queries, stored: KeyValues, shares: Tensor) -> Tensor:
    """Attention (B, Hq, Q, Dv) in which each row leaves out all but the largest of its probabilities.

    A row that sees c keys uses ceil(share * c) of them, and those that equal the last one. What is left out is not
    made up for, so a row errs by at most the mass left out times the largest |value|.

    Args:
        shares: (B,) float64 in (0, 1].
    """
    batch, query_heads, count, _ = queries.states.shape
    kv_heads, values = stored.keys.shape[1], stored.values
    out = values.new_zeros(batch, query_heads, count, values.shape[-1])
    for rows, visible, probabilities in attention_tiles(queries, stored):
        where = stored.positions[:, :, None, :visible]
        sees = (stored.valid[:, :, None, :visible] & (where <= queries.positions[rows, None])).sum(-1, keepdim=True)
        used = (sees * shares[:, None, None, None] - 1e-9).ceil().long().clamp_min(1)
        used = used.repeat_interleave(query_heads // kv_heads, dim=1)
        largest = probabilities.topk(int(used.max()), dim=-1).values
        kept = probabilities.masked_fill(probabilities < largest.gather(-1, used - 1), 0.0).to(values.dtype)
        part = kept.reshape(batch, kv_heads, -1, visible) @ values[:, :, :visible]
        out[:, :, rows] = part.view(batch, query_heads, -1, values.shape[-1])
    return out
